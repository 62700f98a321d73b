"""Labelled images by name: their splits found, their labels checked, their pixels decoded or streamed."""

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.ranges import DataTask
from layerwise.data.catalogue import HUB, names
from layerwise.data.folders import open_imagefolder
from layerwise.data.hub import open_hub
from layerwise.data.labels import class_names, labels_of_split
from layerwise.data.machine import find_local
from layerwise.data.masks import classes_of, decoded_masks, open_masks
from layerwise.data.naming import TEST_NAMES, few
from layerwise.data.numbers import checked_numbers
from layerwise.data.parquet import open_parquet
from layerwise.data.pictures import GROUNDS, MAX_PIXELS, ImageFormat
from layerwise.data.rows import Rows
from layerwise.data.sources import InMemorySource, Source, StreamedSource, decoded, notes_on_colours, sample_form
from layerwise.errors import LayerwiseError, unknown
from layerwise.files import shown

STREAMED_SIZE = 224  # pixels


class Sources(NamedTuple):
    """The splits of a data set."""

    train: Source
    val: Source | None
    test: Source | None


def load_images(
    name: str,
    root: str | Path | None,
    size: int | None,
    limit: int,
    task: DataTask = "classification",
    targets: Sequence[str] = (),
) -> tuple[tuple[str, ...], Sources, ImageFormat, list[str]]:
    """The splits of labelled images, decoded or to be streamed.

    Args:
        name: the data set's name or form.
        root: folder of local data sets.
        size: side in pixels that images are scaled and cropped to; default their most common size.
        limit: bytes of decoded pixels above which images are streamed.
        task: what the labels are.
        targets: names of the columns of labels.

    Returns:
        Classes, splits, the format of all images, and notes.

    Raises:
        LayerwiseError: an unknown name, or data that cannot be read or used.
    """
    opened, title, masks = _open(name, root, limit, task, targets), shown(name), {}
    if "train" not in opened:
        raise LayerwiseError(f"{title} has no training split, only {', '.join(opened)}; give one named train")
    if task == "segmentation":
        masks = {split: rows for split, (_, rows) in opened.items()}
        opened = {split: rows for split, (rows, _) in opened.items()}
    train = opened.pop("train")
    notes = list(train.notes)
    classes = class_names(train, title) if task == "classification" else _targets(train, targets)

    def labels_in(rows: Rows, split: str) -> Tensor:
        if task == "classification":
            return labels_of_split(rows, split, classes, train.names, title)
        if task == "segmentation":  # read below, when the format is known
            return torch.zeros(len(rows), dtype=torch.int64, device="cpu")
        return checked_numbers(torch.tensor(rows.values, dtype=torch.float64, device="cpu"), task, classes)

    splits = {"train": (train, labels_in(train, "train"))}
    # If there is a test split, "eval" is a validation split, and is taken last.
    order = sorted(TEST_NAMES, key=lambda split: split == "eval" and "test" in opened)
    for split in (split for split in order if split in opened):
        rows = opened.pop(split)
        notes += rows.notes
        if rows.withheld:
            notes.append(f"the labels of the {split} split of {title} are withheld, so it is left out")
        elif "val" in splits:
            notes.append(f"the split {split!r} of {title} is a second validation split and is left out")
        else:
            use = "val" if split != "test" and "test" in splits else "test"
            splits[use] = (rows, labels_in(rows, split))
            masks |= {use: masks[split]} if split in masks else {}
            if split != use and use == "test":
                notes.append(f"{title} has no test split: its split {split!r} is used as the test split")
    if opened:
        notes.append(f"splits of {title} that are left out: {few(list(opened))}")

    form, decoded_bytes = sample_form(train, size)
    streamed = decoded_bytes > limit
    if streamed:
        if size is None:
            form = form._replace(height=STREAMED_SIZE, width=STREAMED_SIZE)
        notes.append(f"images are streamed: decoded on demand, scaled and centre-cropped to {form.height} pixels")
    if task == "segmentation":
        found = [decoded_masks(masks[split], form) for split in splits]
        classes, found, more = classes_of(found, title)
        notes += more
        splits = {split: (rows, labels) for (split, (rows, _)), labels in zip(splits.items(), found, strict=True)}
    sources: dict[str, Source] = {}
    for split, (rows, labels) in splits.items():
        notes += notes_on_colours(rows, f"{split} images")
        if streamed:
            sources[split] = StreamedSource(rows, labels, form)
            continue
        images, done = decoded(rows, form)
        sources[split] = InMemorySource(images, labels)
        words = {
            "resized": f"were resized to {form.width}x{form.height}",
            "converted": f"were converted to {'RGB' if form.mode == 'RGB' else 'grey'}",
            "laid": f"are transparent in places and were given a {GROUNDS[form.ground]} background",
            "frames": "are files of several frames, of which the first is used",
        }
        if size is not None:
            words.pop("resized")
        notes += [f"{done[what]} of {len(rows)} {split} images {words[what]}" for what in words if done.get(what)]
    return classes, Sources(sources["train"], sources.get("val"), sources.get("test")), form, notes


def _targets(rows: Rows, targets: Sequence[str]) -> tuple[str, ...]:
    """Names of the numbers of each row."""
    if targets:
        return tuple(targets)
    count = len(rows.values[0]) if rows.values and isinstance(rows.values[0], tuple) else 1
    return ("target",) if count == 1 else tuple(f"target{i}" for i in range(count))


def _open(name: str, root: str | Path | None, limit: int, task: DataTask, targets: Sequence[str]) -> dict[str, Any]:
    form, _, rest = name.partition(":")
    if name in HUB:
        folder = find_local(name, root)
        if folder is not None:
            return open_parquet(folder, limit)
        return open_hub(HUB[name], f", or set LAYERWISE_DATA to a folder that holds {name}/*.parquet")
    if form == "hf" and rest:
        return open_hub(rest, task=task, targets=targets)
    if form == "imagefolder" and rest:
        return open_masks(Path(rest)) if task == "segmentation" else open_imagefolder(Path(rest))
    if form == "parquet" and rest:
        return open_parquet(Path(rest), limit, task, targets)
    raise unknown("data set", name, names())


def check_size(size: Any) -> int | None:
    """Check an image size from the user, a number of pixels; None if not given."""
    if size is None:
        return None
    try:
        number = operator.index(size)
    except TypeError:
        raise LayerwiseError(f"image size {size!r} is not a whole number; give a number of pixels") from None
    if number < 1:
        raise LayerwiseError(f"image size {number} is not positive; give a number of pixels")
    if number**2 > MAX_PIXELS:
        raise LayerwiseError(f"image size {number} is more than {math.isqrt(MAX_PIXELS)} pixels; give a smaller one")
    return number
