"""Labels of undecoded images: the classes of a training split, and the positions of all labels among them."""

import torch
from torch import Tensor

from layerwise.data.naming import check_words, few
from layerwise.data.rows import FileRows, Rows
from layerwise.data.sources import Source
from layerwise.errors import LayerwiseError


def class_names(train: Rows, title: str) -> tuple[str, ...]:
    """The classes of a training split, in the order of their labels: those that it records, or its distinct labels.

    Raises:
        LayerwiseError: a label that is absent or negative, words as well as numbers, fewer than two classes.
    """
    classes = train.names
    if classes is None:
        values = set(_checked(train, "train"))
        if len({isinstance(value, str) for value in values}) > 1:
            raise LayerwiseError(f"the labels of {title} are words and whole numbers; write them alike")
        classes = check_words(tuple(map(str, sorted(values))), title)
    if len(classes) < 2:
        raise LayerwiseError(f"{title} holds only the class {''.join(classes)!r}; give data with two or more classes")
    return classes


def _checked(rows: Rows, split: str) -> list:
    """The stored labels of a split, checked: none is missing or negative."""
    if not len(rows):
        raise LayerwiseError(f"the {split} split holds no rows; give data with samples")
    for row, value in enumerate(rows.values):
        if value is None:
            raise LayerwiseError(f"{rows.where(row)} has no label; label it or take it out")
        if isinstance(value, int) and value < 0:
            raise LayerwiseError(
                f"{rows.where(row)} has the negative label {value}; count classes from 0, and take rows without a "
                "label out"
            )
    return rows.values


def labels_of_split(
    rows: Rows, split: str, classes: tuple[str, ...], listed: tuple[str, ...] | None, title: str
) -> Tensor:
    """The labels as int64 (N,) positions in `classes`.

    Args:
        rows: the split.
        split: its name.
        classes: names of the classes of the training split.
        listed: the class list that the training split records, if any.
        title: what to call the data set.

    Raises:
        LayerwiseError: a label that is absent, negative or none of the classes; another class list than that of the
            training split.
    """
    values = _checked(rows, split)
    if rows.names != listed:
        # A folder of images lists only the classes that it has; a recorded list holds all classes, in their order.
        if not isinstance(rows, FileRows) or not set(rows.names or ()) <= set(listed or ()):
            raise LayerwiseError(
                f"the classes of {title} differ between train ({few(listed)}) and {split} ({few(rows.names)}); "
                "give both the same class list"
            )
        place = {label: classes.index(word) for label, word in enumerate(rows.names or ())}
        return torch.tensor([place[value] for value in values], dtype=torch.int64, device="cpu")
    if rows.names is None:
        place = {word: label for label, word in enumerate(classes)}
        labels = [place.get(str(value), len(classes)) for value in values]
    else:
        labels = values
    for row, label in enumerate(labels):
        if label >= len(classes):
            raise LayerwiseError(
                f"{rows.where(row)} has the label {values[row]!r}, which is none of the {len(classes)} classes "
                f"({few(classes)}) of the training split; correct it or take it out"
            )
    return torch.tensor(labels, dtype=torch.int64, device="cpu")


def absent_classes(classes: tuple[str, ...], splits: dict[str, Source | Tensor | None]) -> list[str]:
    """A note on each split in which a class has no sample."""
    notes = []
    for split, part in splits.items():
        if part is not None:
            labels = part if isinstance(part, Tensor) else part.labels
            counts = torch.bincount(labels, minlength=len(classes)).tolist()
            absent = [name for name, count in zip(classes, counts, strict=True) if not count]
            if absent:
                notes.append(
                    f"{len(absent)} of {len(classes)} classes have no sample in the {split} split: {few(absent)}"
                )
    return notes
