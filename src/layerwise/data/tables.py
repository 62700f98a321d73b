"""Tables of numbers with a class per row, out of CSV files."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.data.rows import LABEL_NAMES, pick
from layerwise.data.sources import InMemorySource
from layerwise.errors import LayerwiseError


class TableSource(InMemorySource):
    """Rows of numbers, laid out as images of one pixel whose channels are the columns.

    Args:
        images: float64 (N, columns, 1, 1).
        labels: int64 (N,).
    """

    pictures = False
    dtype = torch.float64


class Table(NamedTuple):
    """A table with labels."""

    source: TableSource
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    """Names of the columns of numbers, in order."""


def read_table(path: Path) -> Table:
    """Read a CSV file: a line of names, then rows of numbers with a label each.

    One column holds the labels: the first of label, labels, class, target and y that is there. Words are classes in
    alphabetical order, whole numbers in their own.

    Raises:
        LayerwiseError: a file that `read_columns` refuses; no column of labels, or no other one; a label that is absent
            or a fraction; fewer than two classes.
    """
    names, rows = _read(path)
    label = pick("label", [name for name in names if name in LABEL_NAMES], LABEL_NAMES, names, str(path))
    columns = tuple(name for name in names if name != label)
    if not columns:
        raise LayerwiseError(f"{path} has no column but {label!r}; give columns of numbers to learn from.")
    place = names.index(label)
    classes, labels = _classes(path, label, [(line, row[place].strip()) for line, row in rows])
    return Table(TableSource(_numbers(path, names, rows, columns), labels), classes, columns)


def read_columns(path: Path, columns: Sequence[str]) -> Tensor:
    """The named columns of a CSV file, float64 (N, columns, 1, 1); others are not looked at.

    Raises:
        LayerwiseError: no such file or column, a cell that is no finite number, a row with too many or too few cells, a
            name that two columns have.
    """
    names, rows = _read(path)
    absent = [name for name in columns if name not in names]
    if absent:
        raise LayerwiseError(f"{path} has no column {absent[0]!r}; its columns are {', '.join(names)}.")
    return _numbers(path, names, rows, columns)


def column_statistics(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per column of `(N, columns, 1, 1)`; the deviation is 1 for a constant column."""
    table = values.flatten(1).numpy()  # by numpy, whose sums do not depend on the number of threads
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = table.mean(0), np.where(np.ptp(table, 0) > 0, table.std(0), 1.0)
    if not np.isfinite([mean, std]).all():
        raise LayerwiseError("the numbers of the table are too large for a mean and a standard deviation; scale them.")
    return tuple(mean.tolist()), tuple(std.tolist())


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Names of the columns; the rows with the number of their line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            rows = [(lines.line_num, row) for row in lines if row]
    except FileNotFoundError as reason:
        raise LayerwiseError(f"there is no file {path}; give the path of a CSV file.") from reason
    except (OSError, UnicodeDecodeError, csv.Error) as reason:
        raise LayerwiseError(
            f"{path} is not a readable CSV file ({reason}); write it as UTF-8 with commas."
        ) from reason
    if len(rows) < 2:
        raise LayerwiseError(f"{path} holds no rows; give a line of column names, then a line per sample.")
    names = [name.strip() for name in rows[0][1]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LayerwiseError(f"{path} has two columns called {twice!r}; give every column a name of its own.")
    for line, row in rows[1:]:
        if len(row) != len(names):
            raise LayerwiseError(
                f"line {line} of {path} has {len(row)} cells, and the first line {len(names)} names; correct it."
            )
    return names, rows[1:]


def _numbers(path: Path, names: list[str], rows: list[tuple[int, list[str]]], columns: Sequence[str]) -> Tensor:
    places = [(name, names.index(name)) for name in columns]
    values = [[_number(path, line, name, row[place]) for name, place in places] for line, row in rows]
    return torch.tensor(values, dtype=torch.float64)[:, :, None, None]


def _number(path: Path, line: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LayerwiseError(
            f"line {line} of {path} has {cell!r} in column {column!r}, which is no finite number; fill gaps, and write "
            "categories as numbers."
        )
    return value


def _classes(path: Path, column: str, words: list[tuple[int, str]]) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes in order, and the labels int64 (N,)."""
    for line, word in words:
        if not word:
            raise LayerwiseError(f"line {line} of {path} has no label in column {column!r}; label it or take it out.")
    found = [word for _, word in words]
    try:
        values = [float(word) for word in found]
    except ValueError:
        classes = sorted(set(found))
    else:
        fraction = next((word for word, value in zip(found, values, strict=True) if not value.is_integer()), None)
        if fraction is not None:
            raise LayerwiseError(
                f"{path} has the label {fraction} in column {column!r}, which is no class; give whole numbers or words."
            )
        found = [str(int(value)) for value in values]
        classes = sorted(set(found), key=int)
    if len(classes) < 2:
        raise LayerwiseError(f"{path} holds the one class {classes[0]!r}; give data with two or more classes.")
    number = {name: label for label, name in enumerate(classes)}
    return tuple(classes), torch.tensor([number[name] for name in found])
