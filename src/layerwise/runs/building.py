"""Builds the device, data, model and learner of a run from its options, and loads a run."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch

from layerwise import data, models
from layerwise.core.blocks import Partition
from layerwise.core.devices import pick_device
from layerwise.core.graphs import Graph
from layerwise.core.optim import Schedule
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.tasks import UNLABELLED, LanguageModel, MultiLabel, Regression, Segmentation, Task
from layerwise.data.catalogue import is_table
from layerwise.data.masks import IGNORED
from layerwise.data.tokenizer import from_json
from layerwise.errors import LayerwiseError, short, why
from layerwise.files import kind_of, read_text, shown
from layerwise.learner import Learner, checks
from layerwise.learner.setup import ONE_PROCESS, WHOLE_NETWORK
from layerwise.memory.mmap import OnFile, into_memory
from layerwise.memory.stores import nearest_folder
from layerwise.models import GraphModelOptions, ModelOptions
from layerwise.parallel.alone import OneProcess, WholeNetwork
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage
from layerwise.records import Amount, Count, convert
from layerwise.replacements import replace
from layerwise.runs import checkpoint
from layerwise.runs.folders import check_unchanged, read_options
from layerwise.runs.options import TrainOptions, model_name


@dataclass(frozen=True)
class DataSignature:
    """Facts of a run's data: enough to build the network, to predict, and to detect another data set."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[int, ...]
    """Labelled samples of the training, validation and test split."""
    graph: tuple[int, ...] = ()
    """Nodes and edges, if the samples are the nodes of a graph."""
    columns: tuple[str, ...] = ()
    """Names of the columns, if the samples are the rows of a table."""
    form: tuple[str | int, ...] = ()
    """Mode and background of `ImageFormat`, if the samples are images; not in checkpoints of version 0.1.0."""
    target_mean: tuple[float, ...] = ()
    """Mean of each target, if labels are numbers."""
    target_std: tuple[float, ...] = ()
    """Standard deviation of each."""
    token_bytes: tuple[int, ...] = ()
    """Number of bytes of each token, if the samples are windows of a text."""
    contents: tuple[str, ...] = ()
    """Facts that distinguish one text from another, its tokenizer first."""
    encoding: tuple[str, ...] = ()
    """How each column of a table with words or missing values was encoded, see `data.encoding`."""

    @property
    def image_mode(self) -> str:
        """PIL's name of the mode that images are converted to."""
        return str(self.form[0]) if self.form else ("L" if self.shape[0] == 1 else "RGB")

    @property
    def ground(self) -> int:
        """Grey level of transparent pixels."""
        return int(self.form[1]) if self.form else 255

    @classmethod
    def of(cls, dataset: data.Dataset) -> "DataSignature":
        """The facts of a data set."""
        parts = (dataset.train, dataset.val, dataset.test)
        sizes = tuple(0 if part is None else _labelled(part) for part in parts)
        graph = () if dataset.graph is None else (len(dataset.graph.labels), dataset.graph.edges.shape[1])
        form = () if dataset.form is None else (dataset.form.mode, dataset.form.ground)
        return cls(
            dataset.shape,
            dataset.classes,
            dataset.mean,
            dataset.std,
            sizes,
            graph,
            dataset.columns,
            form,
            dataset.target_mean,
            dataset.target_std,
            () if dataset.tokenizer is None else dataset.tokenizer.sizes,
            dataset.contents,
            dataset.encoding,
        )

    @classmethod
    def in_state(cls, state: Mapping[str, Any]) -> "DataSignature":
        """The facts of the data that a checkpoint was trained on.

        Raises:
            LayerwiseError: the checkpoint holds no such facts.
        """
        name, advice = "the checkpoint's description of its data", "take an older checkpoint"
        found: DataSignature = convert(state["data"], cls, name, advice)
        channels = {len(found.mean), len(found.std)}
        right = (
            len(found.shape) == len(found.sizes) == 3
            and len(found.graph) in (0, 2)
            and min(*found.shape, len(found.classes)) >= 1
            and min(0, *found.sizes, *found.graph) == 0
            and (channels == {found.shape[0]} or channels == {1})
            and all(math.isfinite(number) for number in (*found.mean, *found.std))
            and min(found.std) > 0
            and len(found.target_mean) == len(found.target_std) in (0, len(found.classes))
            and all(math.isfinite(number) for number in (*found.target_mean, *found.target_std))
            and min(found.target_std, default=1) > 0
            and len(found.token_bytes) in (0, len(found.classes))
            and min(found.token_bytes, default=1) > 0
        )
        if not right:
            raise LayerwiseError(f"{name} is damaged ({short(state['data'])}); {advice}.")
        return found

    @property
    def about_inputs(self) -> dict[str, str]:
        """What someone needs besides the weights to use the network: how inputs are made, what outputs mean; in JSON.

        Inputs are `(value - mean) / std`, per channel of an image, whose 8-bit pixels are divided by 255 first, or per
        column of a table. An output of the network is a class, or a number `target_mean + target_std * output`.
        """
        found: dict[str, Any] = {"shape": self.shape}
        if not self.token_bytes:  # the tokens of a text are those of the run's tokenizer
            found |= {"classes": self.classes, "mean": self.mean, "std": self.std}
        for name in ("columns", "target_mean", "target_std"):
            if value := getattr(self, name):
                found[name] = value
        if self.encoding:
            found["encoding"] = [json.loads(row) for row in self.encoding]
        if self.form:
            found |= {"image_mode": self.image_mode, "ground": self.ground}
        return {name: json.dumps(value, ensure_ascii=False) for name, value in found.items()}

    def check(self, dataset: data.Dataset) -> None:
        """Raise LayerwiseError unless these are the facts of `dataset`."""
        found = asdict(DataSignature.of(dataset))
        for name, value in asdict(self).items():
            if found[name] != value and not (name == "form" and not value):
                raise LayerwiseError(
                    f"the data {dataset.name} has changed since the run began: its {name} was {_few(value)} and is "
                    f"{_few(found[name])}; restore the data, or start a new run."
                )


def _labelled(part: data.Source) -> int:
    """Samples of a split that have a label."""
    return int((part.labels != UNLABELLED).sum()) if part.labels.dim() == 1 else len(part)


def _few(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")


def build_task(options: TrainOptions, facts: DataSignature) -> Task | None:
    """The task of a run; None for classes, where the learner needs only the label smoothing."""
    if options.task == "regression":
        return Regression(options.loss, mean=facts.target_mean, std=facts.target_std)
    if options.task == "segmentation":
        return Segmentation(ignore=IGNORED)
    if options.task == "language_model":
        return LanguageModel(shift=False, token_bytes=facts.token_bytes, label_smoothing=options.label_smoothing)
    return MultiLabel() if options.task == "multilabel" else None


def outputs_of(options: TrainOptions, facts: DataSignature) -> int:
    """Number of outputs of a run's network."""
    return len(facts.classes) * (2 if options.task == "regression" and options.loss == "gaussian" else 1)


def build_model(
    options: ModelOptions, facts: DataSignature, seed: int, graph: Graph | None = None, outputs: int | None = None
) -> torch.nn.Module:
    """The model for a data set, with initial weights that depend on `seed` only.

    By default it has one output per class. Without the data's graph, a graph network
    gets an empty one of the right size, which a checkpoint fills.

    Raises:
        LayerwiseError: the options contradict each other, or the model does not fit into memory.
    """
    with preserved_generators(torch.device("cpu")):
        seed_generators(derive_seed(seed, "model"), torch.device("cpu"))
        try:
            if not isinstance(options, GraphModelOptions):
                return options.build(facts.shape, outputs or len(facts.classes))
            if graph is None and facts.graph:
                graph = Graph.blank(*facts.graph, classes=len(facts.classes))
            return options.build(facts.shape, len(facts.classes), graph)
        except (RuntimeError, MemoryError, OverflowError) as reason:  # a size beyond memory, or 64 bits
            raise LayerwiseError(
                f"the model {model_name(options)!r} cannot be built with these options ({why(reason)}); choose a "
                "smaller one."
            ) from reason


def load_data(options: TrainOptions, folder: Path | None = None) -> data.Dataset:
    """Load the data set of a run; a text uses the tokenizer in the folder of the run, if one is given."""
    return data.load(
        options.data,
        val_fraction=options.val_fraction,
        train_samples=options.train_samples,
        size=options.image_size,
        label_noise=options.label_noise,
        label_noise_kind=options.label_noise_kind,
        clean_validation=options.clean_validation,
        task=options.task,
        targets=options.targets,
        text=data.TextOptions(*(getattr(options, name) for name in data.TextOptions._fields)),
        tokenizer=None if folder is None else read_tokenizer(folder, options),
        words=words_of(options),
        handling=data.Handling(options.categories, options.gaps),
    )


def words_of(options: TrainOptions) -> data.Words | None:
    """How to tokenize a table's column of text for a network of transformers with its own tokenizer."""
    if options.task != "classification" or not is_table(options.data):
        return None
    found = options.model.tokenizer() if isinstance(options.model, models.OutsideModel) else None
    return None if found is None else data.Words(found[0], found[1], options.window)


TOKENIZER = "tokenizer.json"


def read_tokenizer(folder: Path, options: TrainOptions) -> data.Tokenizer | None:
    """Read the tokenizer in the folder of a run on text; None if the data are not text.

    Raises:
        LayerwiseError: the file is missing or damaged.
    """
    if options.task != "language_model":
        return None
    file = folder / TOKENIZER
    return from_json(read_text(file, "put the tokenizer of the run back"), shown(file))


def check_tokenizer(folder: Path, tokenizer: data.Tokenizer, facts: DataSignature) -> None:
    """Raise LayerwiseError if the tokenizer in the folder of a run is not the one that it was trained with."""
    if facts.contents[:1] != (tokenizer.digest,):
        raise LayerwiseError(
            f"{shown(folder / TOKENIZER)} is not the tokenizer that the run was trained with; put that one back."
        )


def split_batches(
    options: TrainOptions, dataset: data.Dataset, device: torch.device
) -> tuple[data.Batches, data.Batches | None, data.Batches]:
    """Batches of the training, validation and test split; validation may be empty."""
    mixing = None
    if options.mixup or options.cutmix:
        mixing = data.Mixing(len(dataset.classes), options.mixup, options.cutmix)
    train = data.Batches(
        dataset.train,
        options.batch_size,
        seed=derive_seed(options.seed, "data"),
        augment=options.augment,
        mixing=mixing,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        channels_last=options.channels_last,
    )
    size = 2 * options.batch_size  # there are no gradients
    val = None if dataset.val is None else in_order(dataset.val, size, options, dataset, device)
    return train, val, in_order(dataset.test, size, options, dataset, device)


def in_order(
    source: data.Source, size: int, options: TrainOptions, scale: data.Dataset | DataSignature, device: torch.device
) -> data.Batches:
    """All samples of a source in its own order, as a run evaluates and predicts them.

    Args:
        source: the samples.
        size: of a batch.
        options: of the run.
        scale: knows the mean and the standard deviation of the training data.
        device: where the batches live.
    """
    return data.Batches(
        source,
        size,
        seed=0,
        mean=scale.mean,
        std=scale.std,
        device=device,
        shuffle=False,
        drop_last=False,
        channels_last=options.channels_last,
    )


def split_in_order(run: "Trained", split: str, size: int, folder: Path) -> data.Batches:
    """Load the data of a run again, check them, and return all samples of a split.

    Args:
        run: a loaded run.
        split: `"train"`, `"val"` or `"test"`.
        size: of a batch.
        folder: of the run, for the error message.

    Raises:
        LayerwiseError: the data have changed since the run, or the run has no such split.
    """
    dataset = load_data(run.options, folder)
    run.facts.check(dataset)
    source = getattr(dataset, split)
    if source is None:
        raise LayerwiseError(f"the run in {folder} has no validation split (--val-fraction 0); use --split test.")
    return in_order(source, size, run.options, dataset, run.learner.device)


def _example(facts: DataSignature) -> torch.Tensor:
    """A batch of the shape of the data."""
    if facts.contents:  # windows of tokens
        return torch.zeros(2, *facts.shape[2:], dtype=torch.int64, device="cpu")
    return torch.zeros(2, *facts.shape, device="cpu")


def _replaced(model: torch.nn.Module, options: TrainOptions, facts: DataSignature) -> torch.nn.Module:
    """Apply `--replace` to the model."""
    if not options.replace:
        return model
    with preserved_generators(torch.device("cpu")):
        return replace(model, options.replace, example=_example(facts))


def check_takes(options: TrainOptions) -> None:
    """Raise LayerwiseError if a model of the zoo takes tokens and the data are not text, or the reverse."""
    text = options.task == "language_model"
    if not isinstance(options.model, models.OutsideModel) and options.model.tokens != text:
        advice = "--model gpt" if text else "another model, or --data text:FILE"
        if isinstance(options.model, models.Recurrent):
            advice = f"--model.sequence {'tokens' if text else 'rows'}"
        raise LayerwiseError(
            f"the model {model_name(options.model)!r} takes {'tokens' if options.model.tokens else 'no tokens'}, and "
            f"{options.data} {'is' if text else 'is not'} text; choose {advice}."
        )


def build_learner(
    options: TrainOptions,
    facts: DataSignature,
    device: torch.device,
    total: int,
    stage: Stage | WholeNetwork = WHOLE_NETWORK,
    graph: Graph | None = None,
    replicas: Replicas | OneProcess = ONE_PROCESS,
) -> Learner:
    """The learner of a run with `total` steps, before its first step.

    Raises:
        LayerwiseError: options that the rule, the model or the optimizer refuses, or that contradict each other.
    """
    check_takes(options)
    folder = Path(options.offload_folder or nearest_folder(Path(options.out or "runs")))
    a_part = not stage.whole and options.offload == "none"  # the whole network may be larger than this rank's memory
    with OnFile(folder) if a_part or options.offload == "disk" else contextlib.nullcontext():
        model = build_model(options.model, facts, options.seed, graph, outputs_of(options, facts))
        model = _replaced(model, options, facts)
    where: dict[str, Any] = {name: getattr(options, name) for name in ("cuts", "blocks", "output", "tied")}
    if isinstance(options.model, models.OutsideModel):
        model = models.outside.cut(model, **where)
        where = {} if isinstance(model, Partition) else where
    example = _example(facts).to(device)
    updates = math.ceil(total / options.accumulate)
    learner = Learner(
        model,
        options.rule,
        optimizer=options.optimizer,
        optimizer_options=options.optimizer_options,
        lr=options.lr,
        lr_multipliers=options.lr_multipliers,
        weight_decay=options.weight_decay,
        schedule=Schedule(options.schedule, updates, options.warmup),
        clip=options.clip,
        accumulate=options.accumulate,
        micro=options.micro,
        precision=options.precision,
        compile=options.compile,
        channels_last=options.channels_last,
        nonfinite=options.nonfinite,
        label_smoothing=options.label_smoothing,
        task=build_task(options, facts),
        seed=options.seed,
        **where,
        example=example,
        stage=stage,
        replicas=replicas,
        device=device,
        offload=options.offload,
        offload_folder=folder,
    )
    wanted, given = options.rule.models, model_name(options.model)
    if wanted and given not in wanted:  # checked last, because a rule that checks this itself gives a better message
        raise LayerwiseError(
            f"rule {options.rule.name!r} does not train the model {given!r}; choose the model {' or '.join(wanted)}."
        )
    outputs = outputs_of(options, facts)
    if isinstance(options.model, models.OutsideModel) and learner.task.outputs != outputs:
        raise LayerwiseError(
            f"the network {given!r} has {learner.task.outputs} outputs, and {options.data} needs {outputs}; give its "
            "last layer as many (a function may ask for them as `outputs`)."
        )
    if a_part:
        into_memory(learner.network.model)
    return learner


class Trained(NamedTuple):
    """A loaded run."""

    options: TrainOptions
    facts: DataSignature
    learner: Learner
    notes: list[str]
    """Notes for the user: the run is not finished, a damaged checkpoint was skipped."""


def load_run(folder: Path, device: str = "auto") -> Trained:
    """Load the learner of the run in `folder`, ready to predict; its data set is not read.

    Raises:
        LayerwiseError: the folder holds no run, or no checkpoint that can be read.
    """
    options, state, notes = read_state(folder)
    facts = DataSignature.in_state(state)
    learner = build_learner(options, facts, pick_device(device), total=1)
    learner.load_state_dict(state["learner"])
    return Trained(options, facts, learner, notes)


def read_state(folder: Path) -> tuple[TrainOptions, dict[str, Any], list[str]]:
    """Read options and newest checkpoint of the run in `folder`, with notes for the user.

    Raises:
        LayerwiseError: the folder holds no run, or no checkpoint that can be read.
    """
    options = read_options(folder)
    state, notes = checkpoint.load_latest(folder / "checkpoints", mapped=options.offload != "none")
    if state is None:
        raise LayerwiseError(f"the run in {shown(folder)} has no checkpoint yet; train it first.")
    check_run_state(state, folder)
    check_unchanged(options, state["options"], folder)
    if kind_of(folder / "result.json") is None:
        notes.append(f"the run is not finished: these are its weights after step {state['learner']['steps']}")
    return options, state, notes


class MeasuredMemory(TypedDict):
    """The fields of a `MemoryUse`."""

    parameters: Count
    optimizer: Count
    gradients: Count
    activations: Count
    peak: Count


class RunState(TypedDict):
    """Content of a run's checkpoint; checkpoints of version 0.1.0 lack the fields that are not required."""

    learner: dict[str, Any]
    samples: Count
    seconds: Amount
    val: dict[str, float]
    memory: NotRequired[MeasuredMemory | None]
    measured: NotRequired[list[str] | None]
    flops: NotRequired[Count | None]
    threads: Count
    machines: NotRequired[list[dict[str, Any]] | None]
    options: dict[str, Any]
    data: dict[str, Any]


def check_run_state(state: Any, folder: Path) -> None:
    """Raise LayerwiseError unless the checkpoint of the run in `folder` has the fields of a run, with legal values."""
    name, advice = f"the checkpoint in {shown(folder)}", "take an older one, or start the run again"
    convert(state, RunState, name, advice)
    checks.check_parts(state["learner"])
