"""Classes of images, or of the rows of a table, with a trained run."""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerwise.data.tables import read_columns
from layerwise.errors import LayerwiseError
from layerwise.runs.building import load_run

BATCH = 256


def predictions(folder: Path, given: Path, device: str = "auto") -> tuple[str, list[str]]:
    """CSV with the class and its probability for every input, and what the user should know of the run.

    Args:
        folder: folder of a trained run.
        given: an image, a folder of images, or a `.npy` array of pixels `(N, C, H, W)`, 0 to 255; for a run on a
            table, a CSV file with the same columns.
        device: where to run.

    Raises:
        LayerwiseError: no run, no images, or images that the network cannot take, a table without its columns.
    """
    _, facts, learner, notes = load_run(folder, device)
    if facts.graph:
        raise LayerwiseError(f"the run in {folder} knows the nodes of its own graph only; use layerwise eval.")
    names, values = _read(given, facts.shape) if not facts.columns else _rows(given, facts.columns)
    mean = torch.tensor(facts.mean, dtype=values.dtype).view(-1, 1, 1)
    std = torch.tensor(facts.std, dtype=values.dtype).view(-1, 1, 1)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["input", "class", "probability"])
    for start in range(0, len(values), BATCH):
        x = ((values[start : start + BATCH] - mean) / std).float()
        probabilities = learner(x).float().softmax(-1).cpu()
        for name, row in zip(names[start : start + BATCH], probabilities, strict=True):
            rows.writerow([name, facts.classes[int(row.argmax())], f"{float(row.max()):.6f}"])
    return text.getvalue(), notes


def _rows(given: Path, columns: tuple[str, ...]) -> tuple[list[str], Tensor]:
    """Numbers of the rows, from 0, and the values of the columns, float64 `(N, columns, 1, 1)`."""
    values = read_columns(given, columns)
    return [str(row) for row in range(len(values))], values


def _read(given: Path, shape: tuple[int, int, int]) -> tuple[list[str], Tensor]:
    """Names and brightness in [0, 1] `(N, C, H, W)`, resized to the shape that the network was trained on."""
    if not given.exists():
        raise LayerwiseError(f"there is no file or folder {given}; give an image, a folder of images or a .npy array.")
    if given.suffix == ".npy":
        try:
            array = np.load(given, allow_pickle=False)
        except (ValueError, OSError, EOFError) as reason:
            raise LayerwiseError(f"{given} is not a readable .npy array ({reason}).") from reason
        if array.ndim != 4 or array.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            raise LayerwiseError(f"{given} has shape {array.shape}; the network takes (N, {wanted}).")
        if not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
            raise LayerwiseError(f"{given} holds NaN, infinity or no numbers; give pixels from 0 to 255.")
        if not len(array):
            raise LayerwiseError(f"{given} holds no images.")
        return [str(i) for i in range(len(array))], torch.from_numpy(array.astype(np.float32)) / 255
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as reason:
        raise LayerwiseError("reading images needs Pillow; pip install 'layerwise[data]'.") from reason
    files = sorted(file for file in given.rglob("*") if file.is_file()) if given.is_dir() else [given]
    channels, height, width = shape
    images, names = [], []
    for file in files:
        try:
            with Image.open(file) as image:
                picture = image.convert("L" if channels == 1 else "RGB").resize((width, height))
        except (UnidentifiedImageError, OSError) as reason:
            raise LayerwiseError(f"{file} is not an image that can be read; remove it or give another.") from reason
        images.append(torch.from_numpy(np.array(picture)).reshape(height, width, channels).permute(2, 0, 1))
        names.append(str(file))
    if not images:
        raise LayerwiseError(f"{given} holds no images.")
    return names, torch.stack(images).float() / 255
