"""Labelled images, nodes of a graph, rows of a table: data sets by name, batches that depend on their number only.

>>> data = load("digits")
>>> data.shape, len(data.classes), len(data.train), len(data.val), len(data.test)
((1, 8, 8), 10, 1294, 144, 359)
>>> batches = Batches(data.train, 64, seed=0, mean=data.mean, std=data.std)
>>> x, y = next(batches.epoch(0))
>>> x.shape, x.dtype, y.dtype
(torch.Size([64, 1, 8, 8]), torch.float32, torch.int64)
"""

import math
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from layerwise.core.augment import AUGMENTATIONS, crop, cutout, flip
from layerwise.core.graphs import Graph
from layerwise.core.randomness import derive_seed
from layerwise.data.batches import Batches
from layerwise.data.nodes import CORA_CLASSES, NodeSource, cora
from layerwise.data.noise import NoiseKind, noisy_labels
from layerwise.data.pictures import GROUNDS, MAX_PIXELS, ImageFormat
from layerwise.data.rows import (
    TEST_NAMES,
    FileRows,
    Rows,
    check_words,
    few,
    find_local,
    need,
    open_hub,
    open_imagefolder,
    open_parquet,
)
from layerwise.data.sources import InMemorySource, Source, StreamedSource, decoded, sample_form
from layerwise.data.tables import TableSource, column_statistics, read_table
from layerwise.errors import LayerwiseError, suggestion
from layerwise.files import shown

__all__ = [
    "AUGMENTATIONS",
    "Batches",
    "Dataset",
    "InMemorySource",
    "NodeSource",
    "Source",
    "StreamedSource",
    "TableSource",
    "crop",
    "cutout",
    "describe",
    "flip",
    "load",
    "names",
    "noisy_labels",
    "stratified_split",
]

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
DESCRIPTIONS = {
    "digits": "1,797 handwritten digits, 8x8 grey, 10 classes; comes with scikit-learn, no download",
    "mnist": "70,000 handwritten digits, 28x28 grey, 10 classes",
    "fashion_mnist": "70,000 articles of clothing, 28x28 grey, 10 classes",
    "cifar10": "60,000 photographs, 32x32 RGB, 10 classes",
    "cifar100": "60,000 photographs, 32x32 RGB, 100 (fine) classes",
    "cora": "2,708 papers that cite each other, 1,433 words, 7 classes; labels of 140 papers, public split",
    "hf:owner/name": "any image-classification data set on the Hugging Face hub",
    "imagefolder:PATH": "a folder with one folder of images per class, or with train/ and test/ of that form",
    "parquet:PATH": "one parquet file or a folder of them with train or test in the names: an image and a label column",
    "PATH.csv": "a table: a line of names, a column called label (or class, target, y), all others numbers",
}
FORMS = ("hf", "imagefolder", "parquet")  # what a name may begin with, before a colon
TEST_FRACTION = 0.2  # of the samples, where a data set brings no test split
TEST_SEED = 20_240  # of that split; a constant, so that no option moves a sample between training and test
STREAMED_SIZE = 224  # pixels
STATISTICS_SAMPLE = 2048  # images that mean and std of a streamed source are estimated from


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split three ways.

    Attributes:
        name: what it was loaded by.
        classes: names of the K classes, in the order of the labels 0 to K - 1.
        shape: (C, H, W) of an image; (columns, 1, 1) of a row of a table.
        mean, std: per channel, on the pixel scale [0, 1], of the training split only; std is 1 for a constant channel.
            Of a table, per column and on its own scale.
        train: what to learn from.
        val: what to select by: the data's own validation split where there is a test split too, or else carved from
            the training samples; None when `val_fraction` was 0.
        test: what to report on.
        notes: what was done to the data that the user did not ask for, a sentence each.
        graph: edges between the samples, with the labels of the training split; None where there are none.
        columns: names of the columns of a table; empty for anything else.
        form: what images were turned into; None for anything else.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Source
    val: Source | None
    test: Source
    notes: tuple[str, ...]
    graph: Graph | None = None
    columns: tuple[str, ...] = ()
    form: ImageFormat | None = None


def load(
    name: str | os.PathLike[str] = "digits",
    *,
    val_fraction: float = 0.1,
    train_samples: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    size: int | None = None,
    in_memory_limit: int = 2 * 2**30,
    label_noise: float = 0.0,
    label_noise_kind: NoiseKind = "symmetric",
    clean_validation: bool = False,
) -> Dataset:
    """Load a data set: labelled images, the nodes of a graph, or the rows of a table.

    Args:
        name: a name or form that `names()` lists; default "digits".
        val_fraction: part of the training samples, in [0, 1), that becomes the validation split, stratified by class;
            default 0.1. A data set with a validation and a test split of its own keeps them: any fraction but 0 then
            takes the whole validation split and nothing of the training samples.
        train_samples: how many of the training samples that are left are kept, stratified by class; default all.
        seed: of both choices, default 0; not the seed of the run. The test split depends on no option.
        root: folder that holds <name>/**/*.parquet; default $LAYERWISE_DATA, then the Hugging Face hub.
        size: side in pixels that images are scaled and centre-cropped to; default: their most common size, or 224
            when they are streamed.
        in_memory_limit: bytes of decoded pixels above which images are decoded on demand; default 2 GiB.
        label_noise: share of wrong labels in the training and the validation split, see `noisy_labels`; default 0. A
            sample's label does not depend on how the splits are cut, and the test split is never touched.
        label_noise_kind: "symmetric" or "pairs".
        clean_validation: keep the true labels of the validation split; default False.

    Raises:
        LayerwiseError: an unknown name, an argument out of its range, data that cannot be found, reached or read, no
            image or label column, cells that are no numbers, labels that are negative, absent or unknown, fewer than
            two classes.

    >>> load("digits", val_fraction=0).val is None
    True
    >>> load("mnits")
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: unknown data set 'mnits'; did you mean 'mnist'? legal names: digits, mnist, \
fashion_mnist, cifar10, cifar100, cora, hf:owner/name, imagefolder:PATH, parquet:PATH, PATH.csv.
    """
    name, size = _name(name), _size(size)
    title = shown(name)  # for messages
    if not 0 <= val_fraction < 1:
        raise LayerwiseError(f"validation fraction {val_fraction} is not in [0, 1); use 0 for no validation split")
    if name == "cora":
        return _cora(root, size, label_noise)
    columns: tuple[str, ...] = ()
    test = own_val = form = None
    if name == "digits":
        classes, train, notes = _digits()
        form = ImageFormat("L", *train.shape[1:])
    elif is_table(name):
        if size is not None:
            raise LayerwiseError("the rows of a table are no images; leave --image-size out")
        train, classes, columns, found = read_table(Path(name))
        notes = list(found)
    else:
        classes, (train, own_val, test), form, notes = _sources(name, root, size, in_memory_limit)
    if test is None:
        rest, part = stratified_split(train.labels, TEST_FRACTION, TEST_SEED)
        if not len(part):
            raise LayerwiseError(
                f"{title} has no test split, and its {len(train)} samples of {len(classes)} classes are too few to "
                "take one from; give several samples of each class, or a test split."
            )
        train, test = train.subset(rest), train.subset(part)
        notes.append(
            f"{title} has no test split: {len(test)} of its {len(rest) + len(part)} samples, "
            "the same in every run, are the test split"
        )
    noisy = noisy_labels(train.labels, classes, label_noise, label_noise_kind)
    kept, val = torch.arange(len(train)), None
    if val_fraction and own_val is not None:
        val = own_val
        notes.append(
            f"{title} has its own validation split of {len(val)} samples: the validation fraction takes no training "
            "samples"
        )
        if not clean_validation:
            val = val.relabelled(noisy_labels(val.labels, classes, label_noise, label_noise_kind))
    elif own_val is not None:
        notes.append(f"the validation fraction is 0: {title}'s own validation split is not used")
    elif val_fraction:
        kept, part = stratified_split(train.labels, val_fraction, seed)
        if not len(part):
            raise LayerwiseError(
                f"validation fraction {val_fraction} of {len(train)} training samples is no sample; raise it or use 0"
            )
        val = train.subset(part)
        if not clean_validation:
            val = val.relabelled(noisy[part])
    if train_samples is not None:
        if not len(classes) <= train_samples <= len(kept):
            raise LayerwiseError(
                f"train_samples is {train_samples}; give a number from {len(classes)}, one per class, to {len(kept)}"
            )
        if train_samples < len(kept):
            kept = kept[stratified_split(train.labels[kept], train_samples / len(kept), seed)[1]]
    notes += _absent_classes(classes, {"training": train.labels[kept], "validation": val, "test": test})
    if len(kept) < len(train):
        train = train.subset(kept)
    train = train.relabelled(noisy[kept])
    mean, std, sampled = _mean_std(train)
    if sampled < len(train):
        notes.append(f"mean and std are estimated from {sampled} of {len(train)} training images")
    return Dataset(name, classes, train.shape, mean, std, train, val, test, tuple(notes), columns=columns, form=form)


def is_table(name: str) -> bool:
    """Whether a name is the path of a table: it ends in .csv, in any case, and does not begin with another form.

    >>> is_table("C:/data/12:30.CSV"), is_table("parquet:a.csv")
    (True, False)
    """
    return name.lower().endswith(".csv") and name.partition(":")[0] not in FORMS


def _name(name: str | os.PathLike[str]) -> str:
    try:
        name = os.fspath(name)
    except TypeError:
        name = repr(name)
    return name if isinstance(name, str) else os.fsdecode(name)


def _size(size: Any) -> int | None:
    if size is None:
        return None
    try:
        number = operator.index(size)
    except TypeError:
        raise LayerwiseError(f"image size {size!r} is no whole number; give a number of pixels") from None
    if number < 1:
        raise LayerwiseError(f"image size {number} is not positive; give a number of pixels")
    if number**2 > MAX_PIXELS:
        raise LayerwiseError(f"image size {number} is more than {math.isqrt(MAX_PIXELS)} pixels; give a smaller one")
    return number


def _absent_classes(classes: tuple[str, ...], splits: dict[str, Source | Tensor | None]) -> list[str]:
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


def names() -> list[str]:
    """The names and forms of names that `load` takes.

    >>> names()[:3]
    ['digits', 'mnist', 'fashion_mnist']
    """
    return list(DESCRIPTIONS)


def describe(name: str) -> str:
    """One line on a data set, given its name or any name of its form.

    Raises:
        LayerwiseError: an unknown name.

    >>> describe("cifar10")
    '60,000 photographs, 32x32 RGB, 10 classes'
    """
    if is_table(name):
        return DESCRIPTIONS["PATH.csv"]
    prefix = name.partition(":")[0] + ":"
    for known, text in DESCRIPTIONS.items():
        if name == known or known.startswith(prefix):
            return text
    raise _unknown(name)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples in two, each class in the same proportion.

    Args:
        labels: int64 (N,), at least 0.
        fraction: in [0, 1), the size of the second part. It holds `fraction` of each class, rounded down or up such
            that the total fits, and never the whole of a class.
        seed: of the choice within each class.

    Returns:
        Two int64 tensors of indices in ascending order that together hold 0 to N - 1.

    >>> rest, part = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
    >>> len(rest), part.shape, sorted((part // 4).tolist())
    (6, torch.Size([2]), [0, 1])
    """
    labels = torch.as_tensor(labels)
    counts = torch.bincount(labels).tolist()
    wanted = [fraction * count for count in counts]
    quota = [math.floor(want) for want in wanted]
    missing = round(fraction * len(labels)) - sum(quota)
    # Largest remainders first, so that no class is more than one sample off its share.
    for label in sorted(range(len(counts)), key=lambda label: quota[label] - wanted[label])[: max(0, missing)]:
        quota[label] = min(quota[label] + 1, max(0, counts[label] - 1))
    generator = Generator().manual_seed(derive_seed(seed, "split"))
    part = [torch.empty(0, dtype=torch.int64)]
    for label, take in enumerate(quota):
        members = (labels == label).nonzero().flatten()
        part.append(members[torch.randperm(len(members), generator=generator)[:take]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(part)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _digits() -> tuple[tuple[str, ...], Source, list[str]]:
    found = need("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)  # stored as 0 to 16
    labels = torch.from_numpy(found.target).to(torch.int64)
    return tuple(str(name) for name in found.target_names), InMemorySource(pixels[:, None], labels), []


def _cora(root: str | Path | None, size: int | None, label_noise: float) -> Dataset:
    if size is not None or label_noise:
        raise LayerwiseError("the nodes of cora are no images and have no label noise; leave both options out")
    train, val, test, graph = cora(root)
    notes = ("the nodes are one batch and cora has its own validation split: batch size and val_fraction do nothing",)
    return Dataset("cora", CORA_CLASSES, train.shape, (0.0,), (1.0,), train, val, test, notes, graph)


class Sources(NamedTuple):
    """The splits that a data set brings."""

    train: Source
    val: Source | None
    test: Source | None


def _sources(
    name: str, root: str | Path | None, size: int | None, limit: int
) -> tuple[tuple[str, ...], Sources, ImageFormat, list[str]]:
    opened, title = _open(name, root, limit), shown(name)
    if "train" not in opened:
        raise LayerwiseError(f"{title} has no training split, only {', '.join(opened)}; give one named train")
    train = opened.pop("train")
    notes = list(train.notes)
    classes = train.names
    if classes is None:
        values = set(_checked(train, "train"))
        if len({isinstance(value, str) for value in values}) > 1:
            raise LayerwiseError(f"the labels of {title} are words and whole numbers; write them alike")
        classes = check_words(tuple(map(str, sorted(values))), title)
    if len(classes) < 2:
        raise LayerwiseError(f"{title} holds the one class {''.join(classes)!r}; give data with two or more classes")
    splits = {"train": (train, _labels(train, "train", classes))}
    # Where there is a test split, "eval" is one for validation, and the last to be taken.
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
            splits[use] = (rows, _labels(rows, split, classes, train.names, title))
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
    sources: dict[str, Source] = {}
    for split, (rows, labels) in splits.items():
        if streamed:
            sources[split] = StreamedSource(rows, labels, form)
            continue
        images, done = decoded(rows, form)
        sources[split] = InMemorySource(images, labels)
        words = {
            "resized": f"were resized to {form.width}x{form.height}",
            "converted": f"were converted to {'RGB' if form.mode == 'RGB' else 'grey'}",
            "laid": f"are transparent in places and were laid on a {GROUNDS[form.ground]} ground",
            "frames": "are files of several frames, of which the first is used",
        }
        if size is not None:
            words.pop("resized")
        notes += [f"{done[what]} of {len(rows)} {split} images {words[what]}" for what in words if done.get(what)]
    return classes, Sources(sources["train"], sources.get("val"), sources.get("test")), form, notes


def _open(name: str, root: str | Path | None, limit: int) -> dict[str, Rows]:
    form, _, rest = name.partition(":")
    if name in HUB:
        folder = find_local(name, root)
        if folder is not None:
            return open_parquet(folder, limit)
        return open_hub(HUB[name], f", or set LAYERWISE_DATA to a folder that holds {name}/*.parquet")
    if form == "hf" and rest:
        return open_hub(rest)
    if form == "imagefolder" and rest:
        return open_imagefolder(Path(rest))
    if form == "parquet" and rest:
        return open_parquet(Path(rest), limit)
    raise _unknown(name)


def _unknown(name: str) -> LayerwiseError:
    return LayerwiseError(f"unknown data set {name!r}; {suggestion(name, list(DESCRIPTIONS))}.")


def _checked(rows: Rows, split: str) -> list:
    """The stored labels of a split, all there and none negative."""
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


def _labels(
    rows: Rows, split: str, classes: tuple[str, ...], listed: tuple[str, ...] | None = None, title: str = ""
) -> Tensor:
    """The labels as int64 (N,) positions in `classes`.

    Args:
        rows: the split.
        split: its name.
        classes: names of the classes of the training split.
        listed: of a further split, the class list that the training split notes, if any.
        title: of a further split, what to call the data set.
    """
    values = _checked(rows, split)
    if title and rows.names != listed:
        # A folder of images lists the classes that it has; a noted list is one of all classes, in their order.
        if not isinstance(rows, FileRows) or not set(rows.names or ()) <= set(listed or ()):
            raise LayerwiseError(
                f"the classes of {title} differ between train ({few(listed)}) and {split} ({few(rows.names)}); "
                "give both the same class list"
            )
        place = {label: classes.index(word) for label, word in enumerate(rows.names or ())}
        return torch.tensor([place[value] for value in values], dtype=torch.int64)
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
    return torch.tensor(labels, dtype=torch.int64)


def _mean_std(source: Source) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and std per channel on the scale [0, 1], and the number of images they come from; of a table as it is."""
    if isinstance(source, TableSource):
        return *column_statistics(source.images), len(source)
    step = 1 if isinstance(source, InMemorySource) else max(1, len(source) // STATISTICS_SAMPLE)
    indices = torch.arange(0, len(source), step)
    # Summed as integers: exact, so the same bits whatever the chunks and the number of threads.
    total = squares = torch.zeros(source.shape[0], dtype=torch.int64)
    fine = torch.zeros(2, source.shape[0], dtype=torch.float64)
    for images, _ in source.batches(indices.split(256)):
        if images.dtype != torch.uint8:  # summed image by image, in one order whatever the chunks
            for image in images.double().numpy():
                fine += torch.from_numpy(np.stack([image.sum((1, 2)), np.square(image).sum((1, 2))]))
            continue
        pixels = images.to(torch.int32)
        total = total + pixels.sum((0, 2, 3))
        squares = squares + pixels.square().sum((0, 2, 3))
    total, squares = total + fine[0], squares + fine[1]
    count = len(indices) * source.shape[1] * source.shape[2]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 255.0)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist()), len(indices)
