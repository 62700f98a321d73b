"""Tables with a column of text and a label per row, as windows of the tokens of a pretrained model."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.data.lines import ADVICE, Lines, read_lines
from layerwise.data.naming import TEST_NAMES, few, split_of
from layerwise.data.tables import read_classes
from layerwise.data.tokenizer import in_the_library, library_tokenizer
from layerwise.data.tokens import TokenSource
from layerwise.errors import LayerwiseError
from layerwise.extras import MissingPackage
from layerwise.files import kind_of, read_text, shown

COLUMNS = ("text", "sentence", "review", "content")
"""Usual names of a column of text."""


class Words(NamedTuple):
    """How text becomes the tokens of a pretrained model."""

    file: Path
    """The tokenizer of the library `tokenizers` next to the model's weights."""
    padding: int
    """The padding token."""
    window: int
    """Tokens of a window T; longer texts are truncated."""


class SentenceSource(TokenSource):
    """Windows of T tokens, padded at the end, with a class for each.

    Args:
        inputs: whole numbers (N, T).
        labels: int64 (N,).
    """

    @property
    def checked_labels(self) -> Tensor:
        return self.labels

    def subset(self, indices: Tensor) -> "SentenceSource":
        return SentenceSource(self.inputs[indices], self.labels[indices])


class SentenceData(NamedTuple):
    """A table of sentences, with the splits in the same folder."""

    splits: dict[str, SentenceSource]
    """`train`, and `val` and `test` if there are files of such names in the same folder."""
    classes: tuple[str, ...]
    contents: tuple[str, ...]
    """Facts that identify it."""
    notes: list[str]


def text_column(names: list[str]) -> str | None:
    """The column of text among the names of a table's columns.

    >>> text_column(["id", "Sentence", "label"]), text_column(["width", "label"])
    ('Sentence', None)
    """
    found = [name for wanted in COLUMNS for name in names if name.lower() == wanted]
    return found[0] if found else None


def load_sentences(path: Path, words: Words, target: str | None, val_fraction: float) -> SentenceData:
    """The sentences of a CSV file. If it is called train, those called validation and test in its folder are read, too.

    Args:
        path: of the file.
        words: how text becomes tokens.
        target: name of the column of labels; the usual one if not given.
        val_fraction: 0 leaves the validation file out.

    Raises:
        LayerwiseError: a file that cannot be read, no column of text or of labels, a class that only a later split has.
    """
    tokenizer, notes = _tokenizer(words), []
    files = {"train": path, **(_beside(path, val_fraction, notes) if split_of(path.stem) == "train" else {})}
    splits, classes, contents = {}, (), [_digest(words)]
    for split, file in files.items():
        lines = read_lines(file)
        column = _column(lines)
        notes += lines.notes
        own, labels = read_classes(lines, target)
        if split == "train":
            classes = own
        elif unknown := [name for name in own if name not in classes]:
            raise LayerwiseError(
                f"{lines.title} has the class {unknown[0]!r}, which the training data do not have; correct its labels."
            )
        else:
            labels = torch.tensor([classes.index(name) for name in own], device="cpu")[labels]
        tokens, more = _encoded(tokenizer, lines, column, words)
        notes += more
        splits[split] = SentenceSource(tokens, labels)
        digest = hashlib.sha256(tokens.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        contents.append(f"{split}: {len(labels)} sentences, SHA-256 {digest}")
    return SentenceData(splits, classes, tuple(contents), notes)


def read_sentences(path: Path, words: Words, contents: Sequence[str]) -> tuple[SentenceSource, list[str]]:
    """The column of text of a CSV file as windows of tokens, with 0 as every label, and notes.

    Args:
        path: of the file.
        words: how text becomes tokens.
        contents: a run's record of its data; the tokenizer has to be the same.

    Raises:
        LayerwiseError: a file that cannot be read, no column of text, another tokenizer.
    """
    tokenizer = _tokenizer(words)
    if list(contents[:1]) != [_digest(words)]:
        raise LayerwiseError(
            f"{shown(words.file)} is not the tokenizer that the run was trained with; put that one back."
        )
    lines = read_lines(path)
    lines.check()
    tokens, notes = _encoded(tokenizer, lines, _column(lines), words)
    return SentenceSource(tokens, torch.zeros(len(tokens), dtype=torch.int64)), notes


def _column(lines: Lines) -> str:
    column = text_column(lines.names)
    if column is None:
        raise LayerwiseError(f"{lines.title} has no column of text among {few(lines.names)}; call it {COLUMNS[0]!r}.")
    return column


def _digest(words: Words) -> str:
    """A digest that identifies a tokenizer."""
    return hashlib.sha256(read_text(words.file, ADVICE).encode()).hexdigest()


def _beside(path: Path, val_fraction: float, notes: list[str]) -> dict[str, Path]:
    """Files of the same folder that are the validation and the test split of a training file."""
    known = {split_of(file.stem): file for file in sorted(path.parent.glob("*.csv")) if kind_of(file) == "file"}
    names = [name for name in TEST_NAMES if name in known]
    found: dict[str, Path] = {}
    for name in names:
        use = "val" if name != "test" and "test" in found else "test"
        if use not in found and (use == "test" or val_fraction):
            found[use] = known[name]
    if found:
        notes.append(f"the files {few([file.name for file in found.values()])} beside {shown(path)} are its splits")
    return found


def _tokenizer(words: Words) -> Any:
    text = read_text(words.file, "put the tokenizer beside the model's weights")
    try:
        found = library_tokenizer(text)
    except MissingPackage:
        raise
    except LayerwiseError as reason:
        raise LayerwiseError(f"{shown(words.file)}: {reason}") from reason
    found.enable_truncation(words.window)
    found.enable_padding(pad_id=words.padding, length=words.window)
    return found


def _encoded(tokenizer: Any, lines: Lines, column: str, words: Words) -> tuple[Tensor, list[str]]:
    """The tokens of a column, int64 (N, T), and what to tell about them."""
    place = lines.names.index(column)
    with in_the_library(f"{shown(words.file)} cannot read the text"):
        found = tokenizer.encode_batch([row[place] for row in lines.rows])
    cut = sum(bool(row.overflowing) for row in found)
    notes = [
        f"{cut} of {len(found)} texts of {lines.title} are longer than a window of {words.window} tokens and were cut "
        "off there; --data.window sets it"
    ] * bool(cut)
    return torch.tensor([row.ids for row in found], device="cpu"), notes
