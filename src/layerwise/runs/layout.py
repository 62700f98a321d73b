"""Paths of the files of a run."""

import re
from pathlib import Path

from layerwise.errors import LayerwiseError
from layerwise.files import kind_of, shown

OPTIONS = "config.json"
"""The file with the options of a run; a folder without it is not a run."""


def check_run(folder: Path) -> None:
    """Raise LayerwiseError if a folder holds no run."""
    if kind_of(folder / OPTIONS) is None:
        raise LayerwiseError(f"{shown(folder)} holds no run (no {OPTIONS}); give the folder of a run.")


def grid_run_folder(label: str, what: str, part: str) -> str:
    """Folder of a run below that of its grid.

    >>> grid_run_folder("sll:overlap=1", "seed 0", "runs")
    'runs/sll-overlap=1/seed0'
    """
    rule = re.sub(r"[^\w.=+-]", "-", label)
    return f"{part}/{rule}/{what.replace(' ', '')}"
