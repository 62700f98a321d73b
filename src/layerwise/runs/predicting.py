"""Predicts images, or the rows of a table, with a trained run."""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from layerwise.core.tasks import MultiLabel, Regression, Task
from layerwise.data import InMemorySource, Source, StreamedSource, TableSource
from layerwise.data.encoding import Encoding
from layerwise.data.folders import SUFFIXES
from layerwise.data.machine import need
from layerwise.data.pictures import ImageFormat
from layerwise.data.rows import FileRows
from layerwise.data.sentences import read_sentences
from layerwise.data.sources import notes_on_colours
from layerwise.data.tables import read_columns
from layerwise.errors import LayerwiseError
from layerwise.files import kind_of, list_files, open_regular, shown
from layerwise.runs.building import DataSignature, in_order, load_run, words_of

BATCH = 256
ADVICE = "give an image, a folder of images or a .npy array"


def predictions(folder: Path, given: Path, device: str = "auto") -> tuple[str | bytes, list[str]]:
    """Return a CSV with the prediction for every input, and notes for the user.

    The columns after `input` are `class` and its `probability`; or each target, in its own units, and under the
    gaussian loss its standard deviation; or the predicted `labels` and the probability of each. With a class per
    pixel it is a `.npy` array instead, uint8 `(N, H, W)`, in the order of the inputs.

    Inputs are converted by the same functions as in training.

    Args:
        folder: folder of a trained run.
        given: an image, a folder of images, or a `.npy` array of pixels `(N, C, H, W)`, 0 to 255; for a run on a
            table, a CSV file with the same columns, or the same column of text.
        device: where to run.

    Raises:
        LayerwiseError: no run, no images, or images that the network cannot take, a table without its columns.
    """
    options, facts, learner, notes = load_run(folder, device)
    if facts.token_bytes:
        raise LayerwiseError(f"the run in {folder} is on text and continues a text: give --prompt instead of INPUT.")
    if facts.graph:
        raise LayerwiseError(f"the run in {folder} knows only the nodes of its own graph; use layerwise eval.")
    if (words := words_of(options)) is not None:
        source: Source = read_sentences(given, words, facts.contents)
        names, left_out = [str(row) for row in range(len(source))], []
    else:
        names, source, left_out = _table(given, facts) if facts.columns else _images(given, facts)
    batches = in_order(source, BATCH, options, facts, learner.device)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    if options.task == "segmentation":
        return _array([learner.task.decode(learner(x)) for x, _ in batches.epoch(0)]), notes + left_out
    rows.writerow(["input", *_columns(learner.task, facts)])
    remaining = iter(names)
    for x, _ in batches.epoch(0):
        outputs = learner(x).float()
        answered = outputs.flatten(1).isfinite().all(1)
        for row, right in zip(_cells(learner.task, outputs, facts), answered.tolist(), strict=True):
            name = next(remaining)
            if not right:
                raise LayerwiseError(
                    f"the network's output for the input {name} is not finite; check whether its values are out "
                    "of range, and what layerwise eval says about the run."
                )
            rows.writerow([name, *row])
    return text.getvalue(), notes + left_out


def _columns(task: Task, facts: DataSignature) -> list[str]:
    """Names of the columns of a prediction."""
    if isinstance(task, MultiLabel):
        return ["labels", *facts.classes]
    if not isinstance(task, Regression):
        return ["class", "probability"]
    deviations = [f"{name} sd" for name in facts.classes] if task.criterion == "gaussian" else []
    return [*facts.classes, *deviations]


def _cells(task: Task, outputs: torch.Tensor, facts: DataSignature) -> Iterator[list[str]]:
    """Values of the columns, input by input."""
    if isinstance(task, Regression):
        found = task.decode(outputs)
        if task.criterion == "gaussian":
            deviation = (0.5 * task.posterior(outputs).log_variance).exp() * outputs.new_tensor(task.std)
            found = torch.cat([found, deviation], -1)
        yield from ([f"{value:.7g}" for value in row] for row in found.tolist())
        return
    if isinstance(task, MultiLabel):
        for row in outputs.sigmoid().cpu():
            held = [name for name, value in zip(facts.classes, row.tolist(), strict=True) if value >= 0.5]
            yield [" ".join(held), *(f"{value:.6f}" for value in row.tolist())]
        return
    for row in outputs.softmax(-1).cpu():
        yield [facts.classes[int(row.argmax())], f"{float(row.max()):.6f}"]


def _array(parts: list[torch.Tensor]) -> bytes:
    """Maps of classes as a `.npy` file."""
    file = io.BytesIO()
    np.save(file, torch.cat(parts).to(torch.uint8).cpu().numpy())
    return file.getvalue()


def _table(given: Path, facts: DataSignature) -> tuple[list[str], Source, list[str]]:
    """Numbers of the rows, from 0, and their values."""
    values = read_columns(given, facts.columns, Encoding.of(facts.encoding) if facts.encoding else None)
    return [str(row) for row in range(len(values))], TableSource(values, _unknown(len(values))), []


def _images(given: Path, facts: DataSignature) -> tuple[list[str], Source, list[str]]:
    """Names and images, in the format that the network was trained on."""
    kind = kind_of(given, ADVICE)
    if kind is None:
        raise LayerwiseError(f"there is no file or folder {shown(given)}; {ADVICE}.")
    if kind != "folder" and given.suffix.lower() == ".npy":
        array = _read_array(given, facts.shape)
        images = torch.from_numpy(array.astype(np.float32))
        return [str(i) for i in range(len(array))], InMemorySource(images, _unknown(len(array))), []
    need("PIL")
    notes = []
    files = [given]
    if kind == "folder":
        files = list_files(given, SUFFIXES, ADVICE)
        others = len(list_files(given)) - len(files)
        if others > 0:
            notes.append(f"{others} files under {shown(given)} are not images and are left out")
    if not files:
        raise LayerwiseError(f"{shown(given)} holds no images.")
    rows = FileRows(given if kind == "folder" else None, files)
    notes += notes_on_colours(rows, "images")
    _, height, width = facts.shape
    source = StreamedSource(rows, _unknown(len(files)), ImageFormat(facts.image_mode, height, width, facts.ground))
    return [str(file) for file in files], source, notes


def _read_array(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Read images (N, C, H, W) with pixels from 0 to 255 from a .npy file, which must not hold a pickle."""
    try:
        with open_regular(path, ADVICE) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found, _, kind = header(file)
            if kind.kind not in "iuf":
                raise LayerwiseError(f"{shown(path)} holds {kind}, not numbers; give pixels from 0 to 255.")
            if len(found) != 4 or found[1:] != shape:
                wanted = ", ".join(map(str, shape))
                raise LayerwiseError(f"{shown(path)} has shape {found}; the network takes (N, {wanted}).")
            if found[0] < 1:
                raise LayerwiseError(f"{shown(path)} holds no images.")
            if os.fstat(file.fileno()).st_size - file.tell() < found[0] * int(np.prod(shape)) * kind.itemsize:
                raise ValueError("it ends before its last number")
            file.seek(0)
            array = np.lib.format.read_array(file, allow_pickle=False)
    except LayerwiseError:
        raise
    except Exception as reason:  # numpy's parser raises these for damaged bytes
        why = str(reason).partition("\n")[0] or type(reason).__name__
        raise LayerwiseError(f"{shown(path)} is not a readable .npy array ({why}).") from reason
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
        raise LayerwiseError(
            f"{shown(path)} holds NaN, infinity or numbers outside 0 to 255; give pixels from 0 to 255."
        )
    if array.dtype.kind == "f" and 0 < array.max() <= 1 and (array % 1).any():
        raise LayerwiseError(
            f"{shown(path)} holds numbers from 0 to 1; multiply them by 255 to give pixels from 0 to 255."
        )
    return array


def _unknown(count: int) -> torch.Tensor:
    """Placeholders for the labels to be predicted."""
    return torch.zeros(count, dtype=torch.int64, device="cpu")
