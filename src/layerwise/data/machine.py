"""Finds optional packages, their data, a cache, and folders of data sets on this machine."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise import extras
from layerwise.errors import LayerwiseError
from layerwise.files import kind_of, shown


def need(module: str) -> Any:
    """Import a module of the `data` extra, or say how to install it."""
    return extras.need(module, "data")


def sklearn_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: pixels uint8 (1797, 8, 8), labels int64 (1797,) from 0 to 9.

    They are read from the file that comes with the package; importing the package would take seconds of every run.
    """
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin).parent / "datasets/data/digits.csv.gz" if package and package.origin else None
    if file is None or not file.is_file():  # not installed, or its files lie elsewhere
        found = need("sklearn.datasets").load_digits()
        pixels, labels = found.data, found.target
    else:
        values = np.loadtxt(file, delimiter=",")
        pixels, labels = values[:, :-1], values[:, -1]
    # Stored as 0 to 16.
    grey = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8)
    return grey.view(-1, 8, 8), torch.from_numpy(labels).to(torch.int64)


def cache_folder() -> Path:
    """The cache folder, whose content may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"


def find_local(name: str, root: str | Path | None) -> Path | None:
    """The folder of a data set under `root` or else $LAYERWISE_DATA; None if there is no such folder."""
    base = root if root is not None else os.environ.get("LAYERWISE_DATA")
    if not base:
        return None
    if kind_of(base) != "folder":
        origin = "the data root" if root is not None else "LAYERWISE_DATA"
        raise LayerwiseError(f"{origin} names {shown(base)}, which is not a folder; set it to a folder of data sets")
    folder = Path(base) / name
    return folder if kind_of(folder) == "folder" else None
