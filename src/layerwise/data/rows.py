"""Undecoded images with their labels: rows of arrow tables, or files one by one."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from layerwise.data.columns import is_binary
from layerwise.data.machine import need
from layerwise.data.naming import few
from layerwise.errors import LayerwiseError
from layerwise.files import check_regular, read_bytes, shown

WITHHELD = -1  # the label that the Hugging Face hub gives to samples of a test split with withheld labels


class Rows(ABC):
    """One split of undecoded images.

    Attributes:
        values: the label of each row: whole numbers or words, or None if there is none.
        names: the class names that whole numbers index, or None if no names are recorded.
        files: what the rows are read from.
        image_column: name of the column that holds the images.
        notes: what was left out, a sentence each.
    """

    values: list
    names: tuple[str, ...] | None
    files: tuple[Path, ...]
    image_column: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The encoded image of one row."""

    @abstractmethod
    def where(self, row: int) -> str:
        """The place of one row, for messages."""

    @property
    def withheld(self) -> bool:
        """Whether no row has a label, as in a test split with withheld labels."""
        return bool(self.values) and all(value is None or value == WITHHELD for value in self.values)


class TablePart(NamedTuple):
    """The rows of one file, or of one split of the hub."""

    title: str
    """Its name in messages."""
    labels: list
    names: tuple[str, ...] | None
    folder: Path | None
    """The folder to which relative paths of images refer."""


class TableRows(Rows):
    """Rows of arrow tables, in memory or mapped from disk.

    Args:
        image_column: name of the column that holds the images.
        images: the images as arrow columns, which follow each other.
        parts: the labels, file by file.
        files: what the rows are read from.
        folders: those that may hold images which cells name by their path.

    Raises:
        LayerwiseError: parts with differing class lists, or with numbers in one and words in another; a path that leads
            out of the folders.
    """

    def __init__(
        self,
        image_column: str,
        images: Sequence[Any],
        parts: Sequence[TablePart],
        files: Sequence[Path],
        folders: Sequence[Path],
    ):
        self.image_column, self.images, self.folders = image_column, images, folders
        self.parts = [part for part in parts if part.labels] or list(parts[:1])
        self.names = _same_classes(self.parts)
        self.values = [value for part in self.parts for value in part.labels]
        self.ends = list(accumulate(len(part.labels) for part in self.parts))
        self.image_ends = list(accumulate(len(column) for column in images))
        self.files = (*files, *self._named_files())

    def read(self, row: int) -> bytes:
        content = _content(self._cell(row))
        return content if isinstance(content, bytes) else read_bytes(self._path(row, content))

    def where(self, row: int) -> str:
        part, inner = _place(self.ends, row)
        return f"row {inner} of {self.parts[part].title}"

    def _cell(self, row: int) -> Any:
        column, inner = _place(self.image_ends, row)
        return self.images[column][inner].as_py()

    def _named_files(self) -> list[Path]:
        """The files that cells name instead of holding an image, each of them checked."""
        named = []
        for column, start in zip(self.images, [0, *self.image_ends], strict=False):
            named += [start + row for row in _rows_without_bytes(column)]
        paths = [(row, _content(self._cell(row))) for row in named]
        return sorted({self._path(row, path) for row, path in paths if path and isinstance(path, str)})

    def _path(self, row: int, path: str) -> Path:
        """The file that a cell names, if it lies in the folder of the data."""
        if not path:
            raise LayerwiseError(f"{self.where(row)} holds no image; fill it or take it out.")
        start = self.parts[_place(self.ends, row)[0]].folder
        file = Path(path) if start is None else start / path
        try:
            found = file.resolve()
        except (OSError, ValueError, RuntimeError):
            found = None
        if found is None or not any(found.is_relative_to(folder.resolve()) for folder in self.folders):
            raise LayerwiseError(
                f"{self.where(row)} names the file {shown(path)}, which is not in the folder of the data; put the "
                "image there, or into the cell."
            )
        check_regular(found, f"{self.where(row)} names it as its image")
        return found


class FileRows(Rows):
    """One image file per row.

    Args:
        folder: the folder that holds the files; links may not lead out of it. None for files that the user
            named one by one.
        files: the files.
        values: the class of each, an index of `names`, or None; default None for all.
        names: the class names.
    """

    def __init__(
        self,
        folder: Path | None,
        files: Sequence[Path],
        values: Sequence[int | None] | None = None,
        names: tuple[str, ...] | None = None,
    ):
        self.folder, self.files, self.names = folder, tuple(files), names
        self.values = [None] * len(self.files) if values is None else list(values)

    def read(self, row: int) -> bytes:
        return read_bytes(self.files[row], "replace it or take it out", self.folder)

    def where(self, row: int) -> str:
        return shown(self.files[row])


def _same_classes(parts: Sequence[TablePart]) -> tuple[str, ...] | None:
    """The class list that all parts share; numbers in one part and words in another share nothing."""
    first = parts[0]
    for part in parts[1:]:
        if part.names != first.names:
            raise LayerwiseError(
                f"the class lists of {first.title} ({few(first.names)}) and of {part.title} ({few(part.names)}) "
                "differ; give all files of a split the same list."
            )
    words = [next((isinstance(value, str) for value in part.labels if value is not None), None) for part in parts]
    for part, kind in zip(parts, words, strict=True):
        other = next((index for index, found in enumerate(words) if None not in (kind, found) and found != kind), None)
        if other is not None:
            held = ("whole numbers", "words") if not kind else ("words", "whole numbers")
            raise LayerwiseError(
                f"the labels of {part.title} are {held[0]} and those of {parts[other].title} are {held[1]}; "
                "write them alike."
            )
    return first.names


def _rows_without_bytes(column: Any) -> list[int]:
    """The rows of an image column whose cell holds no bytes."""
    pyarrow, compute = need("pyarrow"), need("pyarrow.compute")
    rows, start = [], 0
    for chunk in column.chunks:
        cells = chunk
        if pyarrow.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
            cells = compute.struct_field(chunk, "bytes")
        if not is_binary(cells.type):
            rows += range(start, start + len(chunk))
        elif cells.null_count:
            rows += [start + row for row in compute.indices_nonzero(compute.is_null(cells)).to_pylist()]
        start += len(chunk)
    return rows


def _content(cell: Any) -> bytes | str:
    """The encoded image of a cell, or the path of the file that holds it."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    return cell if isinstance(cell, (bytes, str)) else ""


def _place(ends: Sequence[int], row: int) -> tuple[int, int]:
    """The part that holds a row, and the row's number there."""
    part = bisect_right(ends, row)
    return part, row - (ends[part - 1] if part else 0)
