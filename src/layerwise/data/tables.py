"""Tables of numbers with a class per row, from CSV files."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.core.ranges import DataTask
from layerwise.data.encoding import Encoding, Handling, is_number
from layerwise.data.lines import Lines, read_lines
from layerwise.data.naming import LABEL_NAMES, check_words, few, is_missing
from layerwise.data.numbers import EXACT, checked_numbers, chosen_targets
from layerwise.data.sources import InMemorySource
from layerwise.errors import LayerwiseError

NUMBER = re.compile(
    r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
)  # without the words that float() accepts and people use for missing values
PLAIN = re.compile(r"[0-9+\-.eE \t,]*")  # rows of such cells, joined by commas, may go through float()
WHOLE = re.compile(r"[+-]?[0-9]+")
UNNAMED = re.compile(r"(Unnamed: [0-9]+(\.[0-9]+)*)?")  # pandas' name for a column without a name


class TableSource(InMemorySource):
    """Rows of numbers, laid out as images of one pixel whose channels are the columns.

    Args:
        images: float64 (N, columns, 1, 1).
        labels: int64 (N,), float32 (N, D) of numbers or several labels.
    """

    pictures = False
    dtype = torch.float64


class Table(NamedTuple):
    """A table with labels."""

    source: TableSource
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    """Names of the columns of numbers, in order."""
    notes: tuple[str, ...]
    """Notes on what was left out or looks wrong, one sentence each."""
    cells: np.ndarray | None = None
    """Words and numbers (N, columns) if they are still to be encoded; the source then holds the numbers of the rows."""
    where: Callable[[int], str] = "row {}".format
    """The place of a row, in words."""


def read_table(
    path: Path, task: DataTask = "classification", targets: Sequence[str] = (), handling: Handling | None = None
) -> Table:
    """Read a CSV file: a line of names, then rows of numbers with a label each.

    One column holds the labels: the first of label, labels, class, target and y that exists. Every different word is
    a class: whole numbers in their order, anything else in alphabetical order. A column of row numbers without a name,
    as pandas writes it, is left out.

    Args:
        path: of the file.
        task: what the labels are: classes, numbers (float32 (N, D)), or zeros and ones (float32 (N, K)).
        targets: names of the columns of labels; needed for several.
        handling: what is done with words and gaps; both are refused if not given.

    Raises:
        LayerwiseError: a file that `read_columns` refuses; no column of labels, or no other one; another column without
            a name; a label that is absent or a fraction; fewer than two classes.
    """
    lines = read_lines(path)
    wanted = chosen_targets(targets, lines.names, task, lines.title)
    unnamed = {place: name for place, name in enumerate(lines.names) if UNNAMED.fullmatch(name)}
    columns = [(place, name) for place, name in enumerate(lines.names) if name not in wanted and place not in unnamed]
    notes = [*lines.notes, *(_left_out(lines, place) for place in unnamed)]
    _check_names(lines, [name for _, name in columns])
    if not columns:
        raise LayerwiseError(f"{lines.title} has no column but {wanted[0]!r}; give columns of numbers to learn from.")
    places, handling = [place for place, _ in columns], handling or Handling()
    faults = _faults(lines, places, handling)
    if task == "classification":
        faults += _unlabelled(lines, wanted[0])
    else:
        _check_names(lines, wanted)
        faults += _faults(lines, [lines.names.index(name) for name in wanted], Handling())
    lines.check(faults, "correct the lines, or fill gaps with --data.gaps and take words with --data.categories")
    if task == "classification":
        classes, labels = _classes(lines, wanted[0])
    else:
        classes = wanted
        found = _numbers(lines, [lines.names.index(name) for name in wanted]).flatten(1)
        labels = checked_numbers(found, task, wanted, lines.where)
    cells = None
    if handling != Handling():
        cells = _cells(lines, places)
        _check_long(lines, places)
        values = torch.arange(len(cells), dtype=torch.float64)[:, None, None, None]
    else:
        values = _numbers(lines, places)
    notes += [
        f"the class {name!r} of {lines.title} looks like a missing label; take its lines out if it is none"
        for name in classes
        if task == "classification" and name.lower() in ("na", "none")
    ]
    notes += [
        f"the labels of {lines.title} are those of column {wanted[0]!r}, and column {name!r} is one of the numbers to "
        "learn from; --data.label-column chooses another"
        for _, name in columns
        if not targets and name in LABEL_NAMES
    ]
    notes += _row_numbers(lines, columns)
    names = tuple(name for _, name in columns)
    return Table(TableSource(values, labels), classes, names, tuple(notes), cells, lines.where)


def read_columns(path: Path, columns: Sequence[str], encoding: Encoding | None = None) -> Tensor:
    """The named columns of a CSV file, float64 (N, columns, 1, 1); others are ignored.

    With the encoding of a run, its columns are read, whatever they hold, and become the numbers of its training rows.

    Raises:
        LayerwiseError: no such file or column, a cell that is not a finite number, a row with too many or too few
            cells, a name that two columns have, different long whole numbers that floating point cannot distinguish.
    """
    lines = read_lines(path)
    lines.check()
    if encoding is not None:
        columns = [column.name for column in encoding.columns]
    places = {name: place for place, name in enumerate(lines.names)}
    absent = next((name for name in columns if name not in places), None)
    if absent is not None:
        raise LayerwiseError(f"{lines.title} has no column {absent!r}; its columns are {few(lines.names)}.")
    _check_names(lines, columns)
    if encoding is not None:
        _check_long(lines, [places[column.name] for column in encoding.columns if not column.words])
        return encoding.numbers(_cells(lines, [places[name] for name in columns]), lines.where)
    lines.check(_faults(lines, [places[name] for name in columns], Handling()))
    return _numbers(lines, [places[name] for name in columns])


def read_classes(lines: Lines, target: str | None = None) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes of a table in order, and the labels int64 (N,), as `read_table` returns them."""
    return _classes(lines, chosen_targets((target,) if target else (), lines.names, "classification", lines.title)[0])


def _check_names(lines: Lines, used: Sequence[str]) -> None:
    counts = Counter(lines.names)
    twice = next((name for name in used if counts[name] > 1), None)
    if twice is not None:
        raise LayerwiseError(f"{lines.title} has two columns called {twice!r}; give every column its own name.")


def _left_out(lines: Lines, place: int) -> str:
    """A note on a column without a name, if it is empty or numbers the rows."""
    cells = [row[place].strip() for row in lines.rows]
    if not any(cells):
        return f"column {place + 1} of {lines.title} has no name and no content and is left out"
    if all(WHOLE.fullmatch(cell) for cell in cells) and len(set(cells)) == len(cells):
        return f"column {place + 1} of {lines.title} has no name and numbers the rows, so it is left out"
    raise LayerwiseError(f"column {place + 1} of {lines.title} has no name; name it, or take it out.")


def _row_numbers(lines: Lines, columns: Sequence[tuple[int, str]]) -> list[str]:
    """A note on each column that counts the rows, gaps aside: it reveals the class if the rows are sorted by class."""
    found = []
    for place, name in columns:
        cells = [(index, row[place]) for index, row in enumerate(lines.rows) if not is_missing(row[place])]
        if len(cells) < 3 or not _plain(cells[0][1]):
            continue
        start = float(cells[0][1]) - cells[0][0]
        if all(_plain(cell) and float(cell) == start + index for index, cell in cells):
            found.append(
                f"column {name!r} of {lines.title} counts the rows; take it out unless the classes depend on it"
            )
    return found


def _numbers(lines: Lines, places: Sequence[int]) -> Tensor:
    """Columns as float64 (N, columns, 1, 1), whose faults have been checked."""
    table = np.array([[float(row[place]) for place in places] for row in lines.rows]).reshape(-1, len(places))
    _check_long(lines, [places[column] for column in np.flatnonzero((np.abs(table) >= EXACT).any(0)).tolist()])
    return torch.from_numpy(table)[:, :, None, None]


def _cells(lines: Lines, places: Sequence[int]) -> np.ndarray:
    """Columns as words (N, columns), without spaces around them; missing values are empty."""
    rows = [["" if is_missing(row[place]) else row[place].strip() for place in places] for row in lines.rows]
    return np.array(rows, dtype=object).reshape(-1, len(places))


def _faults(lines: Lines, places: Sequence[int], handling: Handling) -> list[str]:
    """Part of a sentence for every cell that is not a finite number and that no option allows."""
    wordy = set()
    if handling.categories != "refuse":
        wordy = {
            place for place in places if not all(_plain(row[place]) or is_missing(row[place]) for row in lines.rows)
        }
    found = []
    for index, row in enumerate(lines.rows):
        cells = [row[place] for place in places]
        if PLAIN.fullmatch(",".join(cells)) and _finite(cells):
            continue
        for place, cell in zip(places, cells, strict=True):
            gap = is_missing(cell)
            if (gap and handling.gaps != "refuse") or (place in wordy and not gap) or _plain(cell):
                continue
            found.append(
                f"line {lines.numbers[index]} of {lines.title} has {_brief(cell)} in column {lines.names[place]!r}, "
                "which is not a finite number; fill gaps (--data.gaps median), and write categories as numbers "
                "(--data.categories onehot)"
            )
    return found


def _plain(cell: str) -> bool:
    return is_number(cell.strip(" \t"))


def _finite(cells: Sequence[str]) -> bool:
    try:
        return bool(np.isfinite([float(cell) for cell in cells]).all())
    except ValueError:
        return False


def _unlabelled(lines: Lines, column: str) -> list[str]:
    """Part of a sentence for every row without a label."""
    place = lines.names.index(column)
    found = []
    for line, row in zip(lines.numbers, lines.rows, strict=True):
        if is_missing(word := row[place].strip()):
            instead = f" but {word!r}, which stands for a missing one" if word else ""
            found.append(
                f"line {line} of {lines.title} has no label in column {column!r}{instead}; label it or take it out"
            )
    return found


def _check_long(lines: Lines, places: Sequence[int]) -> None:
    """Refuse a column of numbers and gaps in which different long whole numbers are the same float64."""
    for place in places:
        cells = [cell for row in lines.rows if not is_missing(cell := row[place].strip())]
        if not all(map(_plain, cells)):
            continue  # a column of words
        first: dict[float, Decimal] = {}
        for cell in cells:
            if abs(float(cell)) < EXACT or len(cell) > 400:
                continue
            whole = Decimal(cell)
            if whole != whole.to_integral_value():
                continue
            other = first.setdefault(float(whole), whole)
            if other != whole:
                raise LayerwiseError(
                    f"{other} and {whole} in column {lines.names[place]!r} of {lines.title} are the same as "
                    "floating-point numbers; take the column out, or subtract what they share."
                )


def _classes(lines: Lines, column: str) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes in order, and the labels int64 (N,)."""
    _check_names(lines, [column])
    place = lines.names.index(column)
    words = [row[place].strip() for row in lines.rows]
    lines.check(_unlabelled(lines, column))
    different = set(words)
    if all(NUMBER.fullmatch(word) for word in different):
        fraction = next((word for word in words if _value(word) != _value(word).to_integral_value()), None)
        if fraction is not None:
            raise LayerwiseError(
                f"{lines.title} has the label {fraction[:50]} in column {column!r}, which is not a class; give whole "
                "numbers or words."
            )
        classes = sorted(different, key=lambda word: (_value(word), word))
    else:
        classes = sorted(different)
    if len(classes) < 2:
        raise LayerwiseError(f"{lines.title} holds only the class {classes[0]!r}; give data with two or more classes.")
    number = {name: label for label, name in enumerate(check_words(classes, lines.title))}
    return tuple(classes), torch.tensor([number[word] for word in words], device="cpu")


def _value(word: str) -> Decimal:
    """A number as it is written, exactly; 0 if its exponent is too large."""
    try:
        return Decimal(word)
    except InvalidOperation:
        return Decimal(0)


def _brief(cell: str) -> str:
    return ascii(cell) if len(cell) <= 50 else f"{cell[:50]!a}..."
