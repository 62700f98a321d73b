"""The log of a run: one JSON object per line of `metrics.jsonl`, and the same scalars for TensorBoard."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from layerwise.errors import LayerwiseError, why
from layerwise.files import MissingFile, kind_of, open_to_append, shown
from layerwise.records import Count, DamagedRecord, convert, read_lines
from layerwise.runs.writing import write_atomically

FILE = "metrics.jsonl"
ADVICE = "restore the file, or start the run again"
Log = Callable[[dict[str, Any]], None]


class LogLine(TypedDict):
    """Fields of every line."""

    step: Count
    split: str


@contextlib.contextmanager
def open_log(folder: Path, step: int, tensorboard: bool = False) -> Iterator[Log]:
    """Return a function that writes one line to the log of a run.

    Args:
        folder: of the run.
        step: step at which the run continues; later lines of an earlier process are dropped.
        tensorboard: write the numbers to `tensorboard/` in the folder, too.

    Raises:
        LayerwiseError: the files cannot be written, or TensorBoard is not installed.
    """
    file, events = folder / FILE, folder / "tensorboard"
    drop_lines_after(file, step)
    with _explained(events):
        writer = summary_writer()(str(events)) if tensorboard else None

    def log(values: dict[str, Any]) -> None:
        with _explained(file), open_to_append(file, ADVICE) as lines:
            lines.write(json.dumps(values) + "\n")
        if writer is not None:
            with _explained(events):
                for name, value in values.items():
                    if isinstance(value, float):
                        writer.add_scalar(f"{values['split']}/{name}", value, values["step"])

    try:
        yield log
    finally:
        if writer is not None:
            with _explained(events):
                writer.close()


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as reason:
        raise LayerwiseError(f"could not write {shown(file)} ({why(reason)}); free space, resume.") from reason


def summary_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        LayerwiseError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as reason:
        raise LayerwiseError("TensorBoard is not installed; pip install 'layerwise[tensorboard]'.") from reason
    return SummaryWriter


def read_log(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a log with all of their fields; none if there is no file yet.

    A line that a crash left incomplete is skipped.

    Raises:
        LayerwiseError: the file exists and cannot be read.
    """
    found = []
    with contextlib.suppress(MissingFile):
        for line in read_lines(file, dict[str, Any], ADVICE, torn=True):
            with contextlib.suppress(DamagedRecord):
                found.append(line | convert(line, LogLine, FILE, ADVICE))
    return found


def drop_lines_after(file: Path, step: int) -> None:
    """Drop lines that were logged after the checkpoint that the run continues from, and any incomplete line.

    Raises:
        LayerwiseError: the file cannot be read or written.
    """
    if kind_of(file) is None:
        return
    # The end is evaluated and logged again.
    kept = [line for line in read_log(file) if line["step"] <= step and line["split"] != "test"]
    write_atomically(file, "".join(f"{json.dumps(line)}\n" for line in kept))


def by_epoch(log: Path, per_epoch: int, metric: str = "accuracy") -> dict[str, list[float | None]]:
    """Read the head's accuracy, or another metric, epoch by epoch from `metrics.jsonl`.

    Args:
        log: the file.
        per_epoch: steps of an epoch; a part of an epoch at the end counts as one.
        metric: name of the metric.

    Returns:
        `"train"`, the mean over the batches that were logged in each epoch, and `"val"`, empty without validation.
    """
    found: dict[str, dict[int, list[float]]] = {"train": {}, "val": {}}
    for row in read_log(log):
        if row["split"] in found and f"head/{metric}" in row:
            found[row["split"]].setdefault((row["step"] - 1) // per_epoch, []).append(row[f"head/{metric}"])
    return {
        split: [sum(epochs[i]) / len(epochs[i]) if i in epochs else None for i in range(max(epochs, default=-1) + 1)]
        for split, epochs in found.items()
    }
