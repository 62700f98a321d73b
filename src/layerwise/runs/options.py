"""The options of a training run: one dataclass that is the command line, the recipe and the checkpoint's record."""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from layerwise import models, rules
from layerwise.core import own_code
from layerwise.core.ranges import TRAINING, check_ranges
from layerwise.core.rule import Rule
from layerwise.data.catalogue import is_text
from layerwise.data.numbers import DataTask
from layerwise.data.text import TextOptions
from layerwise.data.tokenizer import TokenizerKind
from layerwise.errors import LayerwiseError, short, suggestion, unknown, why
from layerwise.files import MissingFile, read_text, shown
from layerwise.memory.fitting import read_size
from layerwise.memory.offload import Where
from layerwise.models import ModelOptions
from layerwise.records import LARGEST, DamagedRecord, convert

FLAGS = {name: f"data.{name}" for name in TextOptions._fields}
"""Options to how they are written on the command line, where that is not their name."""
OF_TASKS = {
    "loss": ("regression",),
    "label_smoothing": ("classification", "language_model"),
    **dict.fromkeys(TextOptions._fields, ("language_model",)),
}
"""Options to the tasks that they are about."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a network with a learning rule.

    Choose the rule and the model by name, `--rule sll --model vgg`; the options of both follow below.
    """

    rule: Rule = field(default_factory=lambda: rules.create("sll"))
    model: ModelOptions = field(default_factory=lambda: models.options("mlp")())
    task: DataTask = "classification"
    """What the labels are: a class, numbers, several labels that hold or not, a class per pixel, or the next token,
    which is that of every text."""
    loss: Literal["mse", "l1", "huber", "gaussian"] = "mse"
    """Loss of --task regression; with gaussian the network predicts a variance, too."""
    data: str = "digits"
    """digits | mnist | fashion_mnist | cifar10 | cifar100 | cora | diabetes | digit_scenes | tinyshakespeare |
    text:PATH | hf:owner/name | imagefolder:PATH | parquet:PATH | PATH.csv."""
    tokenizer: Annotated[TokenizerKind, arg(name=FLAGS["tokenizer"])] = "characters"
    """Of a text: characters | bytes | bpe (byte-level, trained on the training split)."""
    vocabulary: Annotated[int, arg(name=FLAGS["vocabulary"])] = 4096
    """Of a text: number of tokens of a bpe."""
    window: Annotated[int, arg(name=FLAGS["window"])] = 128
    """Of a text: tokens that a sample holds."""
    documents: Annotated[bool, arg(name=FLAGS["documents"])] = False
    """Of a text: empty lines part documents, whose order is drawn, and which splits do not cut."""
    targets: tuple[str, ...] = ()
    """Columns of labels of a table; the one called label (or class, target, y) if not given."""
    augment: tuple[str, ...] = ()
    """Random changes of training images: flip, crop, cutout."""
    image_size: int | None = None
    """Side in pixels to which images are resized; their own size if not given."""
    val_fraction: float = 0.1
    """Share of the training set that is held out for validation; 0 trains on everything."""
    train_samples: int | None = None
    """Train on so many samples only, the same ones whatever the seed; all of them if not given."""
    label_noise: float = 0.0
    """Share of wrong labels in the training and validation split, the same ones whatever the seed."""
    label_noise_kind: Literal["symmetric", "pairs"] = "symmetric"
    """Any other class, or pairs of classes that look alike (cifar10 only)."""
    clean_validation: bool = False
    """Keep the true labels of the validation split."""
    cuts: str = "block"
    """Where to cut the model: block | layer | auto | names of modules or patterns (layers.*), separated by commas."""
    output: str | None = None
    """Name of the entry of the model's output that holds the logits; logits, or the tensor itself, if not given."""
    tied: Literal["last", "first", "frozen"] | None = None
    """Who trains a parameter that several blocks use, where the model is cut at its calls; the last if not given."""
    blocks: int | None = None
    """Join the blocks to this many, balanced by their floating-point operations."""
    epochs: int = 10
    """Passes over the training set."""
    steps: int | None = None
    """Number of batches in all; overrides the epochs."""
    batch_size: int = 128
    """Samples per batch."""
    optimizer: str = "adamw"
    """adamw | adam | sgd (Nesterov momentum 0.9) | rmsprop | any class of torch.optim."""
    optimizer_options: dict[str, float] = field(default_factory=dict)
    """Further numbers for the optimizer: --optimizer-options momentum 0.95."""
    lr: float = 1e-3
    """Learning rate (the peak, under a schedule)."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Factor of the learning rate per block: --lr-multipliers block1 0.5 head 2."""
    weight_decay: float = 0.01
    """Weight decay of weights; norms and biases have none."""
    schedule: Literal["constant", "cosine", "onecycle"] = "onecycle"
    """Curve of the learning rate."""
    warmup: float = 0.3
    """Share of the run that is spent warming up."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the classes."""
    clip: float | None = None
    """Largest norm of one group's gradient."""
    accumulate: int = 1
    """Batches per update."""
    micro: int = 1
    """Parts in which every block runs its batch, one after the other, before it steps: less memory, the same update."""
    peak: str | None = None
    """Most memory of activations and gradients, such as 200MiB: the run takes the fewest parts (--micro) that stay
    within it. In a comparison also auto: the lowest of the rules as they are."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the blocks (autocast)."""
    compile: bool = False
    """Run every block through torch.compile."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last order."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """Stop at a non-finite loss or gradient, or leave such updates out and count them."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and every random draw."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto (the accelerator where there is one)."""
    threads: int | None = None
    """Threads of the CPU; the same number gives the same bits."""
    offload: Where = "none"
    """Keep blocks in host memory or on disk, and on the device only those that are about to run."""
    offload_folder: str | None = None
    """Folder for the file of --offload disk; that of the run if not given."""
    out: str | None = None
    """Folder of the run; runs/<data>-<model>-<rule>-seed<seed> if not given."""
    overwrite: bool = False
    """Replace what is in the folder of the run."""
    save_every: int | None = None
    """Steps between checkpoints; one per epoch if not given."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between measurements on the validation split; one per epoch if not given."""
    tensorboard: bool = False
    """Write the same scalars for TensorBoard."""

    def __post_init__(self) -> None:
        check_ranges(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in TRAINING})
        if self.threads is not None and self.threads > MOST_THREADS:
            raise LayerwiseError(f"threads is {self.threads}; the most is {MOST_THREADS}.")
        if is_text(self.data) and self.task == "classification":
            object.__setattr__(self, "task", "language_model")  # a text has no other
        for name, own in OF_TASKS.items():
            if self.task not in own and self._differs(name):
                raise LayerwiseError(f"{name} is about {own[0]}, and the task is {self.task}; leave it out.")
        if self._differs("vocabulary") and self.tokenizer != "bpe":
            raise LayerwiseError(f"vocabulary is that of a bpe, and the tokenizer is {self.tokenizer}; leave it out.")
        if self.peak not in (None, "auto"):
            read_size(self.peak)
        if self.augment and self.task == "segmentation":
            raise LayerwiseError("augment changes images and not their masks; leave it out of a segmentation.")
        for part in (self, self.rule, self.model):
            for f in dataclasses.fields(part):
                _check_number(f.name, getattr(part, f.name))

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default


MOST_THREADS = 1024  # a system refuses to start many more, and the process dies of that


def _check_number(name: str, value: Any) -> None:
    """Refuse NaN, infinity and whole numbers of more than 64 bits, also inside of tuples and tables."""
    if isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_number(name, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise LayerwiseError(f"{name} is {value}; give a finite number.")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise LayerwiseError(f"{name} is {short(value)}; the largest whole number is 2^63 - 1.")


def model_name(options: ModelOptions) -> str:
    """The name that a model's options are found by."""
    return models.name_of(options)


def run_name(options: TrainOptions) -> str:
    """Data set and model as a part of a folder's name.

    >>> run_name(from_mapping({"data": "hf:ylecun/mnist"}))
    'hf_ylecun_mnist-mlp'
    """
    model = model_name(options.model)
    if isinstance(options.model, models.OutsideModel):
        model = Path(model.partition(".py:")[2] or model.removeprefix("hf:").removeprefix("timm:")).stem
    return f"{options.data.replace('/', '_').replace(':', '_')}-{model}"


def to_mapping(options: TrainOptions) -> dict[str, Any]:
    """Options as nested plain values, as in a recipe; the inverse of `from_mapping`."""
    values = dataclasses.asdict(options)
    values["rule"] = {"name": rules.name_of(options.rule), **_recorded(options.rule), **values["rule"]}
    values["model"] = {"name": model_name(options.model), **_recorded(options.model), **values["model"]}
    return values


def _recorded(part: Rule | ModelOptions) -> dict[str, str]:
    """SHA-256 of the files that a rule or a model of the user's was loaded from."""
    if isinstance(part, models.OutsideModel):
        return {"sha256": part.sha256} if part.sha256 else {}
    found = own_code.origin(type(part))
    return {} if found is None else {"sha256": found[1]}


def own_code_of(values: Any) -> list[str]:
    """The files with code of the user's that options in the form of `to_mapping` name.

    >>> own_code_of({"rule": {"name": "mine.py:Rule"}, "model": {"name": "mlp"}})
    ['mine.py']
    """
    parts = [values.get(part) for part in ("rule", "model")] if isinstance(values, Mapping) else []
    names = [str(part.get("name")) for part in parts if isinstance(part, Mapping)]
    return sorted({name.rpartition(":")[0] for name in names if own_code.is_own(name)})


def from_mapping(values: Mapping[str, Any], where: str = "the options") -> TrainOptions:
    """Options from nested plain values; what is left out takes its default.

    Args:
        values: fields of `TrainOptions`; `rule` and `model` are tables with a `name` and their own fields.
        where: what the values come from, for the error sentence.

    Raises:
        LayerwiseError: an unknown field, or a value of the wrong kind or out of range.

    >>> from_mapping({"rule": {"name": "sll", "weight": 0.5}, "epochs": 3}).rule.weight
    0.5
    """
    if not isinstance(values, Mapping):
        raise LayerwiseError(f"{where}: there is no table of options but {short(values)}.")
    given = dict(values)
    parts: dict[str, Any] = {}
    for part, find, default in (("rule", rules.get, "sll"), ("model", models.options, "mlp")):
        table = given.pop(part, {})
        if not isinstance(table, Mapping):
            raise LayerwiseError(f"{where}: {part} is {short(table)}; write a table [{part}] with name = ...")
        table = dict(table)
        name = table.pop("name", default)
        if not isinstance(name, str):
            raise LayerwiseError(f"{where}, [{part}]: name = {short(name)} is not str.")
        outside = models.outside.is_outside(name)
        recorded = table.pop("sha256", None) if outside else None
        parts[part] = _build(find(name, recorded) if outside else find(name), table, f"{where}, [{part}]")
    return _build(TrainOptions, {**given, **parts}, where)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    legal = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for name, value in values.items():
        if name not in legal:
            raise LayerwiseError(f"{where}: unknown field {name!r}; {suggestion(name, legal)}.")
        if isinstance(value, (Rule, ModelOptions)):
            arguments[name] = value
            continue
        try:
            arguments[name] = convert(value, hints[name], name, "correct it")
        except DamagedRecord:
            raise LayerwiseError(f"{where}: {name} = {short(value)} is not {_described(hints[name])}.") from None
    return cls(**arguments)


def _described(hint: Any) -> str:
    """A type, for a sentence."""
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


def default_recipe(data: str | None) -> str:
    """The recipe that the command line starts from, for the data that are asked for.

    >>> default_recipe("digits"), default_recipe("text:book.txt")
    ('digits', 'shakespeare')
    """
    return "shakespeare" if data is not None and is_text(data) else "digits"


def to_words(options: TrainOptions) -> list[str]:
    """The shortest `layerwise train` arguments that give these options; the inverse of the command line.

    >>> to_words(from_mapping({**load_recipe("digits").values, "epochs": 3, "rule": {"name": "sll", "overlap": 1}}))
    ['--rule', 'sll', '--rule.overlap', '1', '--epochs', '3']
    """
    recipe = from_mapping(load_recipe(default_recipe(options.data)).values)  # what the command line starts from
    words = ["--rule", rules.name_of(options.rule), *_differing(options.rule, recipe.rule, "rule.")]
    if type(options.model) is not type(recipe.model):
        words += ["--model", model_name(options.model)]
    words += _differing(options.model, recipe.model, "model.")
    same = dataclasses.replace(recipe, rule=options.rule, model=options.model)
    return words + _differing(options, same, "")


def _differing(own: Any, base: Any, prefix: str) -> list[str]:
    """`--name value` of the fields in which an object differs from another, or from its type's defaults."""
    base = base if type(base) is type(own) else type(own)()
    words = []
    for name in (f.name for f in dataclasses.fields(own)):
        value = getattr(own, name)
        if value == getattr(base, name):
            continue
        flag = FLAGS.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            front, _, last = flag.rpartition(".")
            words.append(f"--{prefix}{flag}" if value else f"--{prefix}{front}{'.' * bool(front)}no-{last}")
        elif isinstance(value, dict):
            words += [f"--{prefix}{flag}", *(str(word) for item in value.items() for word in item)]
        elif isinstance(value, tuple):
            words += [f"--{prefix}{flag}", *map(str, value)]
        else:
            words += [f"--{prefix}{flag}", str(value)]
    return words
