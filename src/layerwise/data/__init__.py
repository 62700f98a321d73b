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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from layerwise.core.augment import AUGMENTATIONS, crop, cutout, flip
from layerwise.core.graphs import Graph
from layerwise.core.randomness import derive_seed
from layerwise.data.batches import Batches
from layerwise.data.nodes import CORA_CLASSES, NodeSource, cora
from layerwise.data.noise import NoiseKind, noisy_labels
from layerwise.data.rows import (
    TEST_NAMES,
    Rows,
    find_local,
    need,
    open_hub,
    open_imagefolder,
    open_parquet,
)
from layerwise.data.sources import InMemorySource, Source, StreamedSource, decoded, sample_form
from layerwise.data.tables import TableSource, column_statistics, read_table
from layerwise.errors import LayerwiseError, suggestion

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
        val: what to select by, carved from the training samples; None when `val_fraction` was 0.
        test: what to report on.
        notes: what was done to the data that the user did not ask for, a sentence each.
        graph: edges between the samples, with the labels of the training split; None where there are none.
        columns: names of the columns of a table; empty for anything else.
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


def load(
    name: str = "digits",
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
            default 0.1.
        train_samples: how many of the training samples behind that split are kept, stratified by class; default all.
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
    if not 0 <= val_fraction < 1:
        raise LayerwiseError(f"validation fraction {val_fraction} is not in [0, 1); use 0 for no validation split")
    if size is not None and size < 1:
        raise LayerwiseError(f"image size {size} is not positive; give a number of pixels")
    if name == "cora":
        return _cora(root, size, label_noise)
    columns: tuple[str, ...] = ()
    if name == "digits":
        classes, train, test, notes = _digits()
    elif name.endswith(".csv") and ":" not in name:
        if size is not None:
            raise LayerwiseError("the rows of a table are no images; leave --image-size out")
        train, classes, columns = read_table(Path(name))
        test, notes = None, []
    else:
        classes, train, test, notes = _sources(name, root, size, in_memory_limit)
    if test is None:
        rest, part = stratified_split(train.labels, TEST_FRACTION, TEST_SEED)
        train, test = train.subset(rest), train.subset(part)
        notes.append(
            f"{name} has no test split: {len(test)} of its {len(rest) + len(part)} samples, "
            "the same in every run, are the test split"
        )
    noisy = noisy_labels(train.labels, classes, label_noise, label_noise_kind)
    kept, val = torch.arange(len(train)), None
    if val_fraction:
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
    if len(kept) < len(train):
        train = train.subset(kept)
    train = train.relabelled(noisy[kept])
    mean, std, sampled = _mean_std(train)
    if sampled < len(train):
        notes.append(f"mean and std are estimated from {sampled} of {len(train)} training images")
    return Dataset(name, classes, train.shape, mean, std, train, val, test, tuple(notes), columns=columns)


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
    if name.endswith(".csv") and ":" not in name:
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


def _digits() -> tuple[tuple[str, ...], Source, None, list[str]]:
    found = need("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)  # stored as 0 to 16
    labels = torch.from_numpy(found.target).to(torch.int64)
    return tuple(str(name) for name in found.target_names), InMemorySource(pixels[:, None], labels), None, []


def _cora(root: str | Path | None, size: int | None, label_noise: float) -> Dataset:
    if size is not None or label_noise:
        raise LayerwiseError("the nodes of cora are no images and have no label noise; leave both options out")
    train, val, test, graph = cora(root)
    notes = ("the nodes are one batch and cora has its own validation split: batch size and val_fraction do nothing",)
    return Dataset("cora", CORA_CLASSES, train.shape, (0.0,), (1.0,), train, val, test, notes, graph)


def _sources(
    name: str, root: str | Path | None, size: int | None, limit: int
) -> tuple[tuple[str, ...], Source, Source | None, list[str]]:
    splits = _open(name, root, limit)
    if "train" not in splits:
        raise LayerwiseError(f"{name} has no training split, only {', '.join(splits)}; give one named train")
    train, notes = splits["train"], []
    held_out = next((split for split in TEST_NAMES if split in splits), None)
    if held_out not in (None, "test"):
        notes.append(f"{name} has no test split: its split {held_out!r} is used as the test split")
    test = splits[held_out] if held_out else None
    classes = train.names or tuple(map(str, sorted(set(_checked(train, "train")))))
    if len(classes) < 2:
        raise LayerwiseError(f"{name} holds the one class {''.join(classes)!r}; give data with two or more classes")
    train_labels = _labels(train, "train", classes)
    test_labels = train_labels
    if test is not None:
        if test.names != train.names:
            raise LayerwiseError(
                f"the classes of {name} differ between train ({_few(train.names)}) and {held_out} "
                f"({_few(test.names)}); give both the same class list"
            )
        test_labels = _labels(test, str(held_out), classes)

    form, decoded_bytes = sample_form(train, size)
    if decoded_bytes > limit:
        if size is None:
            form = form._replace(height=STREAMED_SIZE, width=STREAMED_SIZE)
        notes.append(f"images are streamed: decoded on demand, scaled and centre-cropped to {form.height} pixels")
        streamed_test = None if test is None else StreamedSource(test, test_labels, form)
        return classes, StreamedSource(train, train_labels, form), streamed_test, notes
    sources = []
    for split, rows, labels in (("train", train, train_labels), (held_out, test, test_labels)):
        if rows is None:
            sources.append(None)
            continue
        images, resized, converted = decoded(rows, form)
        sources.append(InMemorySource(images, labels))
        if resized and size is None:
            notes.append(f"{resized} of {len(rows)} {split} images were resized to {form.width}x{form.height}")
        if converted:
            colour = "grey" if form.mode == "L" else "RGB"
            notes.append(f"{converted} of {len(rows)} {split} images were converted to {colour}")
    return classes, sources[0], sources[1], notes


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
            raise LayerwiseError(f"{rows.where(row)} has the negative label {value}; count classes from 0")
    return rows.values


def _labels(rows: Rows, split: str, classes: tuple[str, ...]) -> Tensor:
    """The labels as int64 (N,) positions in `classes`."""
    values = _checked(rows, split)
    if rows.names is None:
        place = {name: label for label, name in enumerate(classes)}
        labels = [place.get(str(value), len(classes)) for value in values]
    else:
        labels = values
    for row, label in enumerate(labels):
        if label >= len(classes):
            raise LayerwiseError(
                f"{rows.where(row)} has the label {values[row]!r}, which is none of the {len(classes)} classes "
                f"({_few(classes)}) of the training split; correct it or take it out"
            )
    return torch.tensor(labels, dtype=torch.int64)


def _few(names: tuple[str, ...] | None) -> str:
    if names is None:
        return "no names"
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _mean_std(source: Source) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and std per channel on the scale [0, 1], and the number of images they come from; of a table as it is."""
    if isinstance(source, TableSource):
        return *column_statistics(source.images), len(source)
    step = 1 if isinstance(source, InMemorySource) else max(1, len(source) // STATISTICS_SAMPLE)
    indices = torch.arange(0, len(source), step)
    # Summed as integers: exact, so the same bits whatever the chunks and the number of threads.
    total = squares = torch.zeros(source.shape[0], dtype=torch.int64)
    for images, _ in source.batches(indices.split(256)):
        pixels = images.to(torch.int32)
        total = total + pixels.sum((0, 2, 3))
        squares = squares + pixels.square().sum((0, 2, 3))
    count = len(indices) * source.shape[1] * source.shape[2]
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 255.0)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist()), len(indices)
