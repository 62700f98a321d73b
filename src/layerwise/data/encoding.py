"""Encodes columns of words and fills missing values; everything is learned only from the training rows.

The work is done by scikit-learn's `SimpleImputer` and `OneHotEncoder`. What they have learned is kept as plain text
(`Encoding.rows`), with which a run predicts the rows of another table.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.data.machine import need
from layerwise.errors import LayerwiseError
from layerwise.parsing import NUMBER

Categories = Literal["refuse", "onehot"]
Gaps = Literal["refuse", "mean", "median", "most_frequent"]


class Handling(NamedTuple):
    """How to treat cells that are not numbers."""

    categories: Categories = "refuse"
    """Columns of words: refuse them, or make a column of zeros and ones for each word."""
    gaps: Gaps = "refuse"
    """Empty cells: refuse them, or fill in the mean, the median or the most frequent number of the column (in a column
    of words always the most frequent word)."""


class Column(NamedTuple):
    """Facts about a column from the training rows."""

    name: str
    words: tuple[str, ...]
    """Its words in order; none for a column of numbers."""
    fill: str
    """The value that fills a gap; empty if gaps are refused."""


@dataclass(frozen=True)
class Encoding:
    """How the cells of a table become numbers.

    >>> cells = np.array([["red", "1"], ["blue", "3"], ["red", ""]], dtype=object)
    >>> found = Encoding.fitted(["colour", "size"], cells, Handling("onehot", "mean"))
    >>> found.names, found.numbers(cells).flatten(1).tolist()
    (('colour=blue', 'colour=red', 'size'), [[0.0, 1.0, 1.0], [1.0, 0.0, 3.0], [0.0, 1.0, 2.0]])
    >>> Encoding.of(found.rows) == found
    True
    """

    columns: tuple[Column, ...]

    @classmethod
    def fitted(cls, names: Sequence[str], cells: np.ndarray, handling: Handling) -> "Encoding":
        """Learn the words of each column and the value that fills its gaps.

        Args:
            names: of the columns.
            cells: the training rows (N, columns), words and numbers as they are in the file; "" is a gap.
            handling: how to treat words and gaps.

        Raises:
            LayerwiseError: a column without a single value.
        """
        imputer, found = need("sklearn.impute").SimpleImputer, []
        for place, name in enumerate(names):
            column = cells[:, place]
            held = [cell for cell in column if cell != ""]
            if not held:
                raise LayerwiseError(f"the column {name!r} is empty in the training rows; take it out.")
            words = () if all(map(is_number, held)) else tuple(sorted(set(held)))
            fill = ""
            if words and handling.gaps != "refuse":
                values = np.array([cell or None for cell in column], dtype=object)[:, None]
                fill = str(imputer(missing_values=None, strategy="most_frequent").fit(values).statistics_[0])
            elif handling.gaps != "refuse":
                values = np.array([float(cell) if cell else np.nan for cell in column])[:, None]
                fill = repr(float(imputer(strategy=handling.gaps).fit(values).statistics_[0]))
            found.append(Column(name, words, fill))
        return cls(tuple(found))

    @classmethod
    def of(cls, rows: Sequence[str]) -> "Encoding":
        """The encoding that `rows` describe.

        Raises:
            LayerwiseError: they are damaged.
        """
        try:
            found = [json.loads(row) for row in rows]
            return cls(tuple(Column(str(name), tuple(map(str, words)), str(fill)) for name, words, fill in found))
        except (TypeError, ValueError) as reason:
            raise LayerwiseError("the run's description of its table is damaged; take an older checkpoint.") from reason

    @property
    def rows(self) -> tuple[str, ...]:
        """A text per column, from which `of` rebuilds the encoding."""
        return tuple(json.dumps([column.name, [*column.words], column.fill]) for column in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of numbers: `column=word` for each word of a column of words."""
        return tuple(
            name
            for column in self.columns
            for name in ([f"{column.name}={word}" for word in column.words] if column.words else [column.name])
        )

    def numbers(self, cells: np.ndarray, where: Callable[[int], str] = "row {}".format) -> Tensor:
        """Rows of cells as float64 (N, columns of numbers, 1, 1). A word that no training row has is all zeros.

        Args:
            cells: of the rows, as in `fitted`.
            where: gives the place of a row, for the error message.

        Raises:
            LayerwiseError: a gap although gaps are refused, or a word in a column of numbers.
        """
        parts = []
        for place, column in enumerate(self.columns):
            filled = np.array([cell or column.fill for cell in cells[:, place]], dtype=object)
            wrong = [cell == "" or not (column.words or is_number(cell)) for cell in filled]
            bad = wrong.index(True) if any(wrong) else None
            if bad is not None:
                raise LayerwiseError(
                    f"{where(bad)} has {filled[bad]!r} in column {column.name!r}, which holds numbers without gaps in "
                    "the training rows; correct it, or train with --data.gaps or --data.categories."
                )
            if column.words:
                encoder: Any = need("sklearn.preprocessing").OneHotEncoder
                words = np.array(column.words, dtype=object)
                made = encoder(categories=[words], handle_unknown="ignore", sparse_output=False)
                parts.append(made.fit(words[:, None]).transform(filled[:, None]))
            else:
                parts.append(np.array([float(cell) for cell in filled])[:, None])
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float64))[:, :, None, None]


def is_number(cell: str) -> bool:
    """Whether a cell holds a finite number in plain digits.

    >>> is_number("1.5e3"), is_number("1_0"), is_number("red"), is_number("1e999")
    (True, False, False, False)
    """
    return NUMBER.fullmatch(cell) is not None and bool(np.isfinite(float(cell)))
