"""Settings of a run except its rule and model, and recipes. This module does not import torch."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Annotated, Any, Literal

from tyro.conf import arg

from layerwise.core.ranges import DataTask, TokenizerKind, Where
from layerwise.errors import LayerwiseError, short, suggestion, unknown, why
from layerwise.files import MissingFile, read_text, shown
from layerwise.records import DamagedRecord, convert

FLAGS = {
    "targets": "data.label-column",
    "categories": "data.categories",
    "gaps": "data.gaps",
    "tokenizer": "data.tokenizer",
    "vocabulary": "data.vocabulary",
    "window": "data.window",
    "documents": "data.documents",
}
"""Maps options of a text or a table to their spelling on the command line."""
OF_TEXTS = ("tokenizer", "vocabulary", "window", "documents")
"""Options of a text."""


@dataclass(frozen=True)
class DataSettings:
    """Data: what to learn from, and what its labels are."""

    data: str = "digits"
    """digits | mnist | fashion_mnist | cifar10 | cifar100 | cora | diabetes | digit_scenes | tinyshakespeare |
    text:PATH | hf:owner/name | imagefolder:PATH | parquet:PATH | PATH.csv."""
    task: DataTask = "classification"
    """What the labels are: a class, numbers, several labels, a class per pixel, or the next token (the task of every
    text)."""
    loss: Literal["mse", "l1", "huber", "gaussian"] = "mse"
    """Loss of --task regression; with gaussian the network predicts a variance, too."""
    targets: Annotated[tuple[str, ...], arg(name=FLAGS["targets"])] = ()
    """Of a table: the column of labels, or several (default: the one called label, class, target or y)."""
    categories: Annotated[Literal["refuse", "onehot"], arg(name=FLAGS["categories"])] = "refuse"
    """Of a table: columns of words are refused, or become a column of zeros and ones for each word of the training
    rows."""
    gaps: Annotated[Literal["refuse", "mean", "median", "most_frequent"], arg(name=FLAGS["gaps"])] = "refuse"
    """Of a table: empty cells are refused, or get the mean, median or most frequent number of the training rows (words:
    the most frequent one)."""
    tokenizer: Annotated[TokenizerKind, arg(name=FLAGS["tokenizer"])] = "characters"
    """Of a text: characters | bytes | bpe (byte-level, trained on the training split)."""
    vocabulary: Annotated[int, arg(name=FLAGS["vocabulary"])] = 4096
    """Of a text: number of tokens of a bpe tokenizer."""
    window: Annotated[int, arg(name=FLAGS["window"])] = 128
    """Of a text, or of a table's column of text: tokens per sample."""
    documents: Annotated[bool, arg(name=FLAGS["documents"])] = False
    """Of a text: empty lines separate documents, which are shuffled, and which splits do not cut."""
    augment: tuple[str, ...] = ()
    """Random changes of training images: flip, crop, cutout."""
    mixup: float = 0.0
    """Alpha of mixup, which adds up pairs of samples and their labels (0: none; usual are 0.2 to 1)."""
    cutmix: float = 0.0
    """Alpha of CutMix, which puts a box of one image into another (0: none; usual is 1)."""
    image_size: int | None = None
    """Side in pixels to which images are resized (default: their own size)."""
    val_fraction: float = 0.1
    """Share of the training set that is held out for validation; 0 trains on everything."""
    train_samples: int | None = None
    """Train on only this many samples, the same ones for every seed (default: all)."""
    label_noise: float = 0.0
    """Share of wrong labels in the training and validation split, the same ones for every seed."""
    label_noise_kind: Literal["symmetric", "pairs"] = "symmetric"
    """Wrong labels are any other class, or the partner in pairs of classes that look alike (cifar10 only)."""
    clean_validation: bool = False
    """Keep the true labels of the validation split."""


@dataclass(frozen=True)
class ModelSettings:
    """How the network is prepared for learning."""

    cuts: str = "block"
    """Where to cut the model: block | layer | auto | names of modules or patterns (layers.*), separated by commas."""
    blocks: int | None = None
    """Join blocks until there are this many, balanced by their floating-point operations."""
    output: str | None = None
    """Entry of the model's output that holds the logits (default: logits, or the tensor itself)."""
    tied: Literal["last", "first", "frozen"] | None = None
    """Which block trains a parameter that several blocks use, if the model is cut at its calls (default: the last)."""
    replace: tuple[str, ...] = ()
    """Modules that replace the network's own: approx_gelu | approx_silu | mask_relu | ms_norm |
    division_conv | division_norm | binary | biper | shared_bits | low_precision | bi_mask | sparse | velora."""
    compile: bool = False
    """Run every block through torch.compile."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last order."""


@dataclass(frozen=True)
class OptimizerSettings:
    """How long and how fast it learns."""

    epochs: int = 10
    """Passes over the training set."""
    steps: int | None = None
    """Total number of batches; overrides the epochs."""
    batch_size: int = 128
    """Samples per batch."""
    accumulate: int = 1
    """Batches per update."""
    optimizer: str = "adamw"
    """adamw | adam | sgd (Nesterov momentum 0.9) | rmsprop | any class of torch.optim."""
    optimizer_options: dict[str, float] = field(default_factory=dict)
    """Further numbers for the optimizer: --optimizer-options momentum 0.95."""
    lr: float = 1e-3
    """Learning rate (the peak, under a schedule)."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Factor of the learning rate per block, and of the readouts of all: --lr-multipliers block1 0.5 readouts 10."""
    weight_decay: float = 0.01
    """Weight decay of weights; norms and biases have none."""
    schedule: Literal["constant", "cosine", "onecycle"] = "onecycle"
    """Curve of the learning rate."""
    warmup: float = 0.3
    """Share of the run for warming up."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the classes."""
    clip: float | None = None
    """Largest norm of one group's gradient."""


@dataclass(frozen=True)
class MachineSettings:
    """Where the run executes, and how much memory it may take."""

    seed: int = 0
    """Seed of the initial weights, the order of the data and every random draw."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto (the accelerator if there is one)."""
    threads: int | None = None
    """Threads of the CPU; the same bits need the same number."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the blocks (autocast)."""
    micro: int = 1
    """Number of parts in which every block runs its batch, one after the other: less memory, the same update."""
    peak: str | None = None
    """Limit for activations and gradients, such as 200MiB: the run uses the fewest parts (--micro) that stay
    within it. In a comparison also auto: the lowest peak of the rules as given."""
    offload: Where = "none"
    """Keep blocks in host memory or on disk, and on the device only those that run now or next."""
    offload_folder: str | None = None
    """Folder for the file of --offload disk (default: that of the run)."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """Stop at a non-finite loss or gradient, or skip such updates and count them."""


@dataclass(frozen=True)
class OutputSettings:
    """What to write, and where."""

    out: str | None = None
    """Folder of the run (default: runs/<data>-<model>-<rule>-seed<seed>)."""
    overwrite: bool = False
    """Replace what is in the folder of the run."""
    save_every: int | None = None
    """Steps between checkpoints (default: one per epoch)."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between measurements on the validation split (default: one per epoch)."""
    tensorboard: bool = False
    """Write the same scalars for TensorBoard."""


@dataclass(frozen=True)
class RunSettings(OutputSettings, MachineSettings, OptimizerSettings, ModelSettings, DataSettings):
    """All settings of a run except its rule and model; each base is a group of the help."""


def build_options(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass of options from plain values.

    Args:
        cls: the dataclass.
        values: by field; missing fields take their defaults, and other objects stay as they are.
        where: the origin of the values, for an error.

    Raises:
        LayerwiseError: an unknown field, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    legal = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for name, value in values.items():
        if name not in legal:
            raise LayerwiseError(f"{where}: unknown field {name!r}; {suggestion(name, legal)}.")
        if dataclasses.is_dataclass(value):
            arguments[name] = value
            continue
        try:
            arguments[name] = convert(value, hints[name], name, "correct it")
        except DamagedRecord:
            raise LayerwiseError(f"{where}: {name} = {short(value)} is not {_described(hints[name])}.") from None
    return cls(**arguments)


def _described(hint: Any) -> str:
    """Describe a type for an error message."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


@dataclass(frozen=True)
class Recipe:
    """A named run with its expected figures, read from a small TOML file."""

    name: str
    about: str
    """One line."""
    values: Mapping[str, Any]
    """Fields of `TrainOptions`, as `from_mapping` takes them."""
    expected: Mapping[str, Any]
    """Measured figures: mean and standard deviation over seeds, with the command that gave them."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package.

    >>> "digits" in recipe_names()
    True
    """
    found = [file.name for file in files("layerwise.runs.recipes").iterdir()]
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name, or from a path that ends in `.toml`.

    Raises:
        LayerwiseError: no such recipe, or a file that is not TOML.
    """
    if name.endswith(".toml"):
        try:
            text = read_text(name, "give the path of a TOML file")
        except MissingFile as reason:
            raise LayerwiseError(f"there is no recipe file {shown(name)}; give the path of a TOML file.") from reason
    elif name in recipe_names():
        text = files("layerwise.runs.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise unknown("recipe", name, recipe_names())
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as reason:
        raise LayerwiseError(f"the recipe {shown(name)} cannot be read ({why(reason)}); correct the file.") from reason
    about, expected = values.pop("about", ""), values.pop("expected", {})
    convert(about, str, f"'about' of {shown(name)}", "correct it")
    convert(expected, dict[str, Any], f"'expected' of {shown(name)}", "correct it")
    return Recipe(name, about, values, expected)
