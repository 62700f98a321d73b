"""Reads the files of a comparison, run or benchmark. Nothing in them is trusted: the folder may come from someone else.

Only regular files inside the folder are opened (no links out of it, no pipes, no devices). msgspec checks the type of
every field that is used, and names the first one that is wrong.
"""

import csv
import io
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar, get_args

import msgspec
import numpy as np

from layerwise.core.ranges import DataTask
from layerwise.core.tasks import Metric, metric_of
from layerwise.files import MissingFile, read_bytes, read_text, shown
from layerwise.records import LIMIT, Count, convert, damaged, read_json, read_lines
from layerwise.runs.log import LogLine

ADVICE = "run the command that wrote this folder again"
UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold, and the other control characters."""
T = TypeVar("T")

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Depth = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{0,8}$")]
"""A number of blocks, as a name in JSON."""
Text = Annotated[str, msgspec.Meta(max_length=100_000)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e300)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
MOST_CLASSES = 20
"""The largest number of classes for which `diagnostics.json` holds a confusion matrix."""
MOST_FILTERS = 24
"""The largest number of units of the first layer of which `diagnostics.json` holds the weights."""
Few = msgspec.Meta(min_length=2, max_length=MOST_CLASSES)
Confusion = Annotated[list[Annotated[list[Count], Few]], Few]
"""Counts, by true class and by the class that it is taken for."""


class Sample(TypedDict):
    """A text that a run has generated."""

    prompt: Text
    text: Text


class Result(TypedDict):
    """The fields of `result.json` that a comparison uses."""

    epochs: Finite
    steps: Count
    metric: NotRequired[Name]
    test_accuracy: NotRequired[Share]
    val_accuracy: NotRequired[Share | None]
    test_f1: NotRequired[Share]
    val_f1: NotRequired[Share | None]
    test_miou: NotRequired[Share]
    val_miou: NotRequired[Share | None]
    test_rmse: NotRequired[Finite]
    val_rmse: NotRequired[Finite | None]
    test_bits_per_byte: NotRequired[Finite]
    val_bits_per_byte: NotRequired[Finite | None]
    sample: NotRequired[Sample]
    chance: NotRequired[Share | None]
    test_loss: float
    val_loss: float | None
    parameters: Count
    flops_per_step: Count | None
    skipped_steps: Count
    memory_mib: dict[Name, Finite]
    train_seconds: Finite
    samples_per_second: Finite
    command: Text


class Failure(TypedDict):
    """The fields of `failed.json`."""

    kind: Name
    reason: Text


class Changes(TypedDict, total=False):
    """What was changed in a rule to bring it under the peak."""

    micro: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    blocks: Annotated[int, msgspec.Meta(ge=1, le=2**62)] | None
    group: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    policy: Name


class PeakFit(TypedDict):
    """How a rule came under a peak of memory, or how far it came; bytes of activations + gradients."""

    peak: Count
    held_as_asked: Count
    held: Count
    reached: bool
    changes: Changes
    notes: list[Text]
    why: Text
    ratio: NotRequired[Positive | None]
    ratio_as_asked: NotRequired[Positive | None]
    seconds_per_step: NotRequired[Positive]
    flops_per_step: NotRequired[Count]
    joules_per_sample: NotRequired[Finite | None]


class Plan(TypedDict, total=False):
    """The measured costs of a rule's step."""

    flops_per_step: Positive
    seconds_per_step: Positive
    peak_bytes: Count
    held_bytes: Count
    fit: PeakFit
    held_at: dict[Depth, Count]
    steps_per_epoch: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class CompareRecord(TypedDict):
    """The fields of `compare.json`."""

    command: Text
    seeds: Count
    fixed: dict[Name, Any]
    plan: dict[Name, Plan]


class ModelName(TypedDict):
    """The name of the model that all runs share."""

    name: Name


class FixedOptions(TypedDict):
    """The common options that a report names."""

    data: Text
    model: ModelName
    budget: Literal["epochs", "steps", "seconds", "flops"]
    epochs: Finite
    steps: Finite | None
    seconds: Finite | None
    flops: Finite | None
    tune: Count
    accumulate: NotRequired[Annotated[int, msgspec.Meta(ge=1, le=2**62)]]


class Spread(TypedDict):
    """Mean and standard deviation of n values; no deviation of one value, or where one is not finite."""

    mean: float
    sd: float | None
    n: Count


class Difference(TypedDict):
    """A paired difference and its interval."""

    mean: Finite
    low: Finite | None
    high: Finite | None
    n: Count


class FailedRun(TypedDict):
    """A run that failed, and why."""

    seed: int
    reason: Text


class RuleSummary(TypedDict):
    """The fields of `summary.json` for one rule."""

    n: Count
    test_samples: NotRequired[Count | None]
    failed: list[FailedRun]
    lr: Finite | None
    weight_decay: Finite | None
    test_accuracy: NotRequired[Spread | None]
    test_f1: NotRequired[Spread | None]
    test_miou: NotRequired[Spread | None]
    test_rmse: NotRequired[Spread | None]
    test_bits_per_byte: NotRequired[Spread | None]
    steps: NotRequired[Spread | None]
    train_seconds: Spread | None
    peak_mib: Spread | None
    activations_gradients_mib: Spread | None
    flops: Spread | None
    difference_to_backprop: Difference | None
    fit: NotRequired[PeakFit]
    held_at: NotRequired[dict[Depth, Count]]


class Summary(TypedDict):
    """The fields of `summary.json`."""

    metric: NotRequired[Name]
    chance: NotRequired[Share | None]
    rules: dict[Name, RuleSummary]


class Machine(TypedDict):
    """The fields of `environment.json`."""

    cpu: Text
    cores: Count | None
    devices: list[Text]
    system: Text
    python: Text
    torch: Text
    packages: dict[Name, Text]


class Filters(TypedDict):
    """Pictures of the first layer's weights: the shape of each, and its bytes in base64."""

    shape: list[Count]
    pixels: Annotated[list[Text], msgspec.Meta(min_length=1, max_length=MOST_FILTERS)]


class Diagnostics(TypedDict):
    """The fields of `diagnostics.json`."""

    command: NotRequired[Text]
    """Of the run."""
    filters: NotRequired[Filters]
    blocks: dict[Name, dict[Name, Finite | None]]
    confusion: NotRequired[dict[Name, Confusion]]


class Shares(TypedDict):
    """The shares of a step's time."""

    forward: Finite
    backward: Finite
    optimizer: Finite
    other: Finite


class MemoryRow(TypedDict):
    """A row of `layerwise bench memory`."""

    rule: Name
    model: Name
    depth: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    gradients: Count
    activations: Count
    offload: NotRequired[Name]
    resident: NotRequired[Count | None]


class SpeedRow(TypedDict):
    """A row of `layerwise bench speed`."""

    rule: Name
    model: Name
    depth: Count
    seconds: Positive
    ratio: Positive
    baseline: Name
    rounds: Count
    shares: NotRequired[Shares]


class ScalingRow(TypedDict):
    """A row of `layerwise bench scaling`; a row that was only simulated lacks the measured fields."""

    rule: Name
    model: Name
    way: Name
    ranks: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    depth: Count
    rounds: NotRequired[Count]
    seconds: NotRequired[Positive]
    samples_per_second: NotRequired[Positive]
    ratio: NotRequired[Positive]
    busy: NotRequired[list[Finite]]
    queued: NotRequired[list[Finite]]
    waiting: NotRequired[list[Finite]]


class MeasuredRow(TypedDict):
    """A row of `layerwise bench scaling` that was measured."""

    rule: Name
    model: Name
    way: Name
    ranks: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    depth: Count
    rounds: Count
    seconds: Positive
    samples_per_second: Positive
    ratio: Positive
    busy: list[Finite]
    queued: list[Finite]
    waiting: list[Finite]


class Bench(TypedDict):
    """A benchmark's file."""

    command: Text
    environment: Machine | None
    rows: list[Any]


BENCHES: dict[str, Any] = {"activations": MemoryRow, "way": ScalingRow, "ratio": SpeedRow}
"""A field that only one benchmark has, to the type of its rows."""


def read_record(folder: Path, name: str, kind: type[T]) -> T:
    """The values of a JSON file below `folder`, of the type `kind`; fields that `kind` does not name are left out.

    Characters that cannot be printed are replaced.

    Raises:
        MissingFile: there is no such file.
        LayerwiseError: a file that cannot be read, or is not what its writer writes.
    """
    value = printable(read_json(folder / name, Any, ADVICE, inside=folder))
    return convert(value, kind, shown(folder / name), ADVICE)


def metric_named(name: str, file: Path) -> Metric:
    """A metric by its name, if it is one by which runs are compared.

    Raises:
        LayerwiseError: there is none of that name.
    """
    known = {metric.name: metric for metric in map(metric_of, get_args(DataTask))}
    if name not in known:
        raise damaged(shown(file), f"there is no metric {name[:40]!r}", ADVICE)
    return known[name]


def read_result(folder: Path, name: str) -> dict[str, Any]:
    """The fields of a run's `result.json`, with its metric on the test and the validation split.

    Raises:
        MissingFile: there is no such file.
        LayerwiseError: a file that cannot be read, or is not what its writer writes.
    """
    found: dict[str, Any] = dict(read_record(folder, name, Result))
    found.setdefault("metric", "accuracy")
    metric = metric_named(found["metric"], folder / name).name
    for part in ("test", "val"):
        if f"{part}_{metric}" not in found:
            raise damaged(shown(folder / name), f"it has no {part}_{metric}", ADVICE)
    return found


def read_metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: `split`, `step`, `seconds` if there are any, and every number with a `/`.

    Numbers that are not finite are None.

    Raises:
        LayerwiseError: a file that is missing or damaged.
    """
    found = []
    for line in read_lines(folder / name, Any, ADVICE, inside=folder):
        line = printable(line)
        kept: dict[str, Any] = dict(convert(line, LogLine, shown(folder / name), ADVICE))
        for key, value in line.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and (key == "seconds" or ("/" in key and len(key) <= 200)):
                kept[key] = float(value) if abs(value) < 1e300 else None
        found.append(kept)
    return found


def read_rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The finished and failed runs that `results.csv` lists: `rule`, `seed`, `status`.

    Raises:
        LayerwiseError: a file that is missing or damaged.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(folder / name, ADVICE, folder, LIMIT)), strict=True))
    except csv.Error as reason:
        raise damaged(shown(folder / name), str(reason), ADVICE) from reason
    for row in rows:
        for column in ("rule", "seed", "status"):
            if not isinstance(row.get(column), str):
                raise damaged(shown(folder / name), f"a row has no {column}", ADVICE)
        if not re.fullmatch("[0-9]{1,9}", row["seed"]):
            reason = f"a seed is {row['seed'][:40]!r}, which is not a whole number"
            raise damaged(shown(folder / name), reason, ADVICE)
    return rows


def read_correct(folder: Path) -> np.ndarray | None:
    """Which samples of the test split a run classified correctly: bool `(N,)`; None for a run that did not keep them.

    Raises:
        LayerwiseError: a damaged file.
    """
    file = folder / "test_correct.npy"
    try:
        found = np.load(io.BytesIO(read_bytes(file, ADVICE, inside=folder, limit=LIMIT)), allow_pickle=False)
    except MissingFile:
        return None
    except (ValueError, EOFError, OSError, MemoryError) as reason:
        raise damaged(shown(file), str(reason), ADVICE) from reason
    if not isinstance(found, np.ndarray) or found.dtype != np.bool_ or found.ndim != 1 or not len(found):
        raise damaged(shown(file), "it is not an array of truth values (N,)", ADVICE)
    return found


def printable(value: Any) -> Any:
    """A value read from JSON; in its texts, every character that cannot be printed is replaced."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return value


def finite(value: float | None) -> float | None:
    """The value, or None if it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else None
