"""Reads a CSV file as it is: detects its separator and encoding, and reports all its faults at once."""

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from layerwise.errors import LayerwiseError
from layerwise.files import open_regular, shown

ADVICE = "give the path of a CSV file"
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
SHOWN = 6
"""Faults that a sentence lists; the others are counted."""


@dataclass(frozen=True)
class Lines:
    """A CSV file as it is."""

    title: str
    names: list[str]
    rows: list[list[str]]
    numbers: list[int]
    """The line on which each row ends."""
    faults: list[str] = field(default_factory=list)
    """Faults of the file, each as part of a sentence."""
    notes: tuple[str, ...] = ()
    """Notes on unusual ways in which it was read, one sentence each."""

    def where(self, row: int) -> str:
        """The place of a row, in words."""
        return f"line {self.numbers[row]} of {self.title}"

    def check(self, faults: Sequence[str] = (), advice: str = "correct them, or take these lines out") -> None:
        """Raise LayerwiseError with all faults, also those found elsewhere; a single one becomes a sentence of its own.

        Args:
            faults: further ones, found elsewhere.
            advice: what to do about several.
        """
        found = [*self.faults, *faults]
        if len(found) == 1:
            raise LayerwiseError(f"{found[0]}.")
        if found:
            short = [fault.partition("; ")[0].replace(f" of {self.title}", "") for fault in found]
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise LayerwiseError(f"{self.title} has {len(found)} faults: {'; '.join(short[:SHOWN])}{more}; {advice}.")


def read_lines(path: Path) -> Lines:
    """A CSV file, whose separator (comma, semicolon, tab or bar) is the most frequent one in its first line.

    It is UTF-8, UTF-16 with a mark, or else Windows-1252. With semicolons, `1,5` is the number 1.5. Rows that do not
    have the cells of the first line are left out and are among the faults; call `check` before the rows are used.

    Raises:
        LayerwiseError: no such file, or one without rows.
    """
    title = shown(path)
    try:
        with open_regular(path, ADVICE) as raw:
            _check_memory(title, os.fstat(raw.fileno()).st_size)
            text, notes = _decoded(raw.read(), title)
        first = text.partition("\n")[0]
        separator = max(SEPARATORS, key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        found = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error, MemoryError) as reason:
        raise LayerwiseError(
            f"{title} is not a readable CSV file ({reason or 'too large'}); write it as UTF-8 with commas."
        ) from reason
    if len(found) < 2:
        raise LayerwiseError(f"{title} holds no rows; give a line of column names, then a line per sample.")
    names = [name.strip() for name in found[0][1]]
    if separator != ",":
        notes.append(f"the columns of {title} are separated by {SEPARATORS[separator]}")
    faults = [
        f"line {line} of {title} has {len(row)} cells, and the first line {len(names)} names; correct it"
        for line, row in found[1:]
        if len(row) != len(names)
    ]
    whole = [(line, row) for line, row in found[1:] if len(row) == len(names)]
    rows = [row for _, row in whole]
    if separator == ";" and any(DECIMAL_COMMA.fullmatch(cell.strip()) for row in rows for cell in row):
        notes.append(f"the commas in numbers of {title} are read as decimal points")
        rows = [[c.replace(",", ".") if DECIMAL_COMMA.fullmatch(c.strip()) else c for c in row] for row in rows]
    return Lines(title, names, rows, [line for line, _ in whole], faults, tuple(notes))


def _decoded(content: bytes, title: str) -> tuple[str, list[str]]:
    """The text of a file, and a note if its encoding is not UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16"), [f"{title} is read as UTF-16, as its first bytes say"]
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        if b"\0" in content:
            raise
        return content.decode("cp1252"), [f"{title} is not UTF-8 and is read as Windows-1252"]


def _check_memory(title: str, size: int) -> None:
    """Refuse a file that the memory of this machine cannot hold."""
    if hasattr(os, "sysconf") and size > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) > 0:
        raise LayerwiseError(
            f"{title} has {size} bytes, and a table is held in memory, which has {memory} here; give a smaller one."
        )
