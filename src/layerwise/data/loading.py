"""A data set by name, split three ways."""

import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerwise.core.graphs import Graph
from layerwise.core.randomness import derive_seed
from layerwise.core.ranges import DataTask
from layerwise.data.catalogue import check_task, is_table, plain_name
from layerwise.data.encoding import Encoding, Handling
from layerwise.data.images import check_size, load_images
from layerwise.data.labels import absent_classes
from layerwise.data.machine import need, sklearn_digits
from layerwise.data.nodes import CORA_CLASSES, cora
from layerwise.data.noise import NoiseKind, noisy_labels
from layerwise.data.numbers import target_statistics
from layerwise.data.pictures import ImageFormat
from layerwise.data.scenes import digit_scenes
from layerwise.data.sentences import Words, load_sentences
from layerwise.data.sources import InMemorySource, Source
from layerwise.data.splitting import stratified_sample, stratified_split
from layerwise.data.statistics import mean_and_std
from layerwise.data.tables import TableSource, read_table
from layerwise.data.text import TextOptions, load_text
from layerwise.data.tokenizer import Tokenizer
from layerwise.errors import LayerwiseError
from layerwise.files import shown

TEST_FRACTION = 0.2  # share of the samples, if a data set has no test split
TEST_SEED = 20_240  # seed of that split; a constant, so that no option moves a sample between training and test


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split three ways.

    Attributes:
        name: the name by which it was loaded.
        classes: names of the K classes, in the order of the labels 0 to K - 1; of the targets, if labels are
            numbers, or if several can hold.
        shape: (C, H, W) of an image; (columns, 1, 1) of a row of a table; (1, 1, T) of a window of text.
        mean, std: per channel, on the pixel scale [0, 1], of the training split only; std is 1 for a constant channel.
            Of a table, per column and on its own scale.
        train: what to learn from.
        val: what to select by: the data's own validation split if there is a test split too, otherwise taken from
            the training samples; None when `val_fraction` was 0.
        test: what to report on.
        notes: what was done to the data that the user did not ask for, a sentence each.
        graph: edges between the samples, with the labels of the training split; None if there are none.
        columns: names of the columns of a table; empty for anything else.
        form: the format to which images were converted; None for anything else.
        target_mean, target_std: of numbers to be predicted, one per target, of the training split; empty for anything
            else.
        tokenizer: of a text; its tokens are the classes. None for anything else.
        contents: what distinguishes a text from another one.
        encoding: of a table with words or gaps: what each of its columns became, see `Encoding.rows`.
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
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    tokenizer: Tokenizer | None = None
    contents: tuple[str, ...] = ()
    encoding: tuple[str, ...] = ()


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
    task: DataTask = "classification",
    targets: Sequence[str] = (),
    text: TextOptions | None = None,
    tokenizer: Tokenizer | None = None,
    words: Words | None = None,
    handling: Handling | None = None,
) -> Dataset:
    """Load a data set: labelled images, the nodes of a graph, the rows of a table, sentences, or windows of text.

    Args:
        name: a name or form that `names()` lists; default "digits".
        val_fraction: part of the training samples, in [0, 1), that becomes the validation split, stratified by class;
            default 0.1. A data set with a validation and a test split of its own keeps them: any fraction but 0 then
            takes the whole validation split and nothing of the training samples.
        train_samples: how many of the remaining training samples are kept, stratified by class; default all.
        seed: of both choices, default 0; not the seed of the run. The test split depends on no option.
        root: folder that holds <name>/**/*.parquet; default $LAYERWISE_DATA, then the Hugging Face hub.
        size: side in pixels that images are scaled and centre-cropped to; default: their most common size, or 224
            when they are streamed.
        in_memory_limit: bytes of decoded pixels above which images are decoded on demand; default 2 GiB.
        label_noise: share of wrong labels in the training and the validation split, see `noisy_labels`; default 0. A
            sample's label does not depend on how the splits are cut, and the test split is never touched.
        label_noise_kind: "symmetric" or "pairs".
        clean_validation: keep the true labels of the validation split; default False.
        task: what the labels are: "classification", "regression" (float32 (N, D)), "multilabel" (float32 (N, K)) or
            "segmentation" (uint8 (N, H, W)), or "language_model" (the tokens of a text, (N, T)). Only classes are split
            by strata and have label noise.
        targets: names of the columns of labels of a table; default the one with a usual name.
        text: how a text becomes windows of tokens.
        tokenizer: of a text; default the one that `text` asks for.
        words: how a column of text becomes tokens; if not given, a CSV file is a table of numbers.
        handling: what is done with words and gaps in a table's columns; both are refused if not given.

    Raises:
        LayerwiseError: an unknown name, an argument out of its range, data that cannot be found, reached or read, no
            image or label column, cells that are not numbers, labels that are negative, absent or unknown, fewer than
            two classes.

    >>> load("digits", val_fraction=0).val is None
    True
    >>> load("mnits")
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: unknown data set 'mnits'; did you mean 'mnist'? legal names: digits, mnist, \
fashion_mnist, cifar10, cifar100, cora, diabetes, digit_scenes, tinyshakespeare, text:PATH, hf:owner/name, \
imagefolder:PATH, parquet:PATH, PATH.csv.
    """
    name, size = plain_name(name), check_size(size)
    title = shown(name)  # for messages
    if not isinstance(val_fraction, numbers.Real) or not 0 <= val_fraction < 1:
        raise LayerwiseError(f"validation fraction {val_fraction} is not in [0, 1); use 0 for no validation split")
    check_task(name, task)
    if targets and (task == "language_model" or not (is_table(name) or name.partition(":")[0] in ("parquet", "hf"))):
        raise LayerwiseError(f"{title} has no columns to choose from; leave --data.label-column out")
    if handling not in (None, Handling()) and (words is not None or not is_table(name)):
        raise LayerwiseError(
            f"{title} is not a table of numbers and words; leave --data.categories and --data.gaps out"
        )
    if label_noise and task != "classification":
        raise LayerwiseError("label noise replaces classes by wrong ones; leave it out under this task")
    if name == "cora":
        return _cora(root, size, label_noise)
    if task == "language_model":
        return _text(name, text, val_fraction, train_samples, seed, root, size, tokenizer)
    columns: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()
    test = own_val = form = cells = None
    encoding: tuple[str, ...] = ()
    where: Callable[[int], str] = "row {}".format
    if name == "digits":
        classes, train, notes = _digits()
        form = ImageFormat("L", *train.shape[1:])
    elif name == "diabetes":
        train, columns = _diabetes()
        classes, notes = ("progression",), []
    elif name == "digit_scenes":
        train, test = digit_scenes(task, TEST_FRACTION, TEST_SEED)
        digits = tuple(map(str, range(10)))
        classes, notes = (("ground", *digits) if task == "segmentation" else digits), []
        form = ImageFormat("L", *train.shape[1:])
    elif is_table(name):
        if size is not None:
            raise LayerwiseError("the rows of a table are not images; leave --image-size out")
        if words is None:
            train, classes, columns, found, cells, where = read_table(Path(name), task, targets, handling)
            notes = list(found)
        else:
            sentences = load_sentences(Path(name), words, targets[0] if targets else None, val_fraction)
            splits, classes, contents, notes = sentences
            train, own_val, test = splits["train"], splits.get("val"), splits.get("test")
    else:
        classes, (train, own_val, test), form, notes = load_images(name, root, size, in_memory_limit, task, targets)
    if test is None:
        rest, part = stratified_split(_strata(train.labels, task), TEST_FRACTION, TEST_SEED)
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
    plain = task != "classification"
    noisy = train.labels if plain else noisy_labels(train.labels, classes, label_noise, label_noise_kind)
    kept, val = torch.arange(len(train), device="cpu"), None
    if val_fraction and own_val is not None:
        val = own_val
        notes.append(
            f"{title} has its own validation split of {len(val)} samples: the validation fraction takes no training "
            "samples"
        )
        if not (clean_validation or plain):
            val = val.relabelled(noisy_labels(val.labels, classes, label_noise, label_noise_kind))
    elif own_val is not None:
        notes.append(f"the validation fraction is 0: {title}'s own validation split is not used")
    elif val_fraction:
        kept, part = stratified_split(_strata(train.labels, task), val_fraction, seed)
        if not len(part):
            raise LayerwiseError(
                f"validation fraction {val_fraction} of {len(train)} training samples is no sample; raise it or use 0"
            )
        val = train.subset(part)
        if not clean_validation:
            val = val.relabelled(noisy[part])
    if train_samples is not None:
        least = 1 if plain else len(classes)
        if not isinstance(train_samples, numbers.Integral) or not least <= train_samples <= len(kept):
            per_class = "" if plain else ", one per class,"
            raise LayerwiseError(
                f"train_samples is {train_samples}; give a number from {least}{per_class} to {len(kept)}"
            )
        if train_samples < len(kept):
            strata = _strata(train.labels[kept], task)
            kept = kept[stratified_sample(strata, train_samples, seed)]
    if not plain:
        notes += absent_classes(classes, {"training": train.labels[kept], "validation": val, "test": test})
    if len(kept) < len(train):
        train = train.subset(kept)
    train = train.relabelled(noisy[kept])
    if cells is not None:  # only the training rows decide how columns are encoded
        learned = Encoding.fitted(columns, cells[_places(train)], handling or Handling())
        columns, encoding = learned.names, learned.rows
        train, val, test = (
            None if part is None else _encoded(learned, cells, part, where) for part in (train, val, test)
        )
        assert train is not None
        assert test is not None
    mean, std, sampled = mean_and_std(train) if words is None else ((0.0,), (1.0,), len(train))
    if sampled < len(train):
        notes.append(f"mean and std are estimated from {sampled} of {len(train)} training images")
    means, stds = target_statistics(train.labels) if task == "regression" else ((), ())
    parts = (train, val, test, tuple(notes), None, columns, form, means, stds)
    return Dataset(name, classes, train.shape, mean, std, *parts, contents=contents, encoding=encoding)


def _encoded(learned: Encoding, cells: np.ndarray, part: Source, where: Callable[[int], str]) -> TableSource:
    """The rows of a split as numbers."""
    rows = _places(part)
    return TableSource(learned.numbers(cells[rows], lambda row: where(int(rows[row]))), part.labels)


def _places(part: Source) -> np.ndarray:
    """The rows of a table in a split."""
    assert isinstance(part, TableSource)
    return part.images.flatten().long().numpy()


def _text(
    name: str,
    text: TextOptions | None,
    val_fraction: float,
    train_samples: int | None,
    seed: int,
    root: str | Path | None,
    size: int | None,
    tokenizer: Tokenizer | None,
) -> Dataset:
    if size is not None:
        raise LayerwiseError("the windows of a text are not images; leave --image-size out")
    found = load_text(name, text or TextOptions(), val_fraction, root, tokenizer)
    train, known = found.train, found.tokenizer
    if train_samples is not None:
        if not isinstance(train_samples, numbers.Integral) or not 1 <= train_samples <= len(train):
            raise LayerwiseError(f"train_samples is {train_samples}; give a number of windows from 1 to {len(train)}")
        order = torch.randperm(
            len(train), generator=torch.Generator().manual_seed(derive_seed(seed, "windows")), device="cpu"
        )
        train = train.subset(order[:train_samples].sort().values)
    parts = (train, found.val, found.test, tuple(found.notes))
    return Dataset(name, known.names, train.shape, (0.0,), (1.0,), *parts, tokenizer=known, contents=found.contents)


def _strata(labels: Tensor, task: DataTask) -> Tensor:
    """The classes by which samples are split in proportion; a single one if labels are not classes."""
    return labels if task == "classification" else torch.zeros(len(labels), dtype=torch.int64, device="cpu")


def _diabetes() -> tuple[Source, tuple[str, ...]]:
    found = need("sklearn.datasets").load_diabetes(scaled=False)
    values = torch.from_numpy(found.data).double()[:, :, None, None]
    return TableSource(values, torch.from_numpy(found.target).float()[:, None]), tuple(found.feature_names)


def _digits() -> tuple[tuple[str, ...], Source, list[str]]:
    pixels, labels = sklearn_digits()
    return tuple("0123456789"), InMemorySource(pixels[:, None], labels), []


def _cora(root: str | Path | None, size: int | None, label_noise: float) -> Dataset:
    if size is not None or label_noise:
        raise LayerwiseError("the nodes of cora are not images and have no label noise; leave both options out")
    train, val, test, graph = cora(root)
    notes = ("the nodes are one batch and cora has its own validation split: batch size and val_fraction do nothing",)
    return Dataset("cora", CORA_CLASSES, train.shape, (0.0,), (1.0,), train, val, test, notes, graph)
