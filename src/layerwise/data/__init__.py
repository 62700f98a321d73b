"""Labelled images, nodes of a graph, rows of a table, windows of text: data sets by name.

What is in a batch depends on its number only.

Files:

    by name
        catalogue.py     the names
        loading.py       a data set, split three ways
        splitting.py     splits with each class in the same proportion
        statistics.py    mean and standard deviation
        noise.py         wrong labels on purpose
        naming.py        usual names of columns, splits and classes
        machine.py       packages, cache and folders of this machine
    batches
        batches.py       order and augmentation
        mixing.py        mixup and CutMix
        sources.py       samples in memory, or decoded on demand
    images
        images.py        splits, labels and pixels of images by name
        folders.py       folders of images
        masks.py         folders with a mask per image
        hub.py           the Hugging Face hub
        parquet.py       Parquet files
        columns.py       which column holds what
        rows.py          undecoded images with labels
        labels.py        classes of a training split
        pictures.py      decodes one picture
        scenes.py        scenes of several digits
    tables and graphs
        tables.py        tables of numbers, from CSV
        lines.py         a CSV file as it is
        encoding.py      columns of words, and missing values
        numbers.py       numbers as labels
        nodes.py         nodes of a graph
    text
        text.py          splits, documents and windows of a text
        tokenizer.py     from text to tokens
        tokens.py        tokens mapped from a file
        sentences.py     a label per sentence

>>> data = load("digits")
>>> data.shape, len(data.classes), len(data.train), len(data.val), len(data.test)
((1, 8, 8), 10, 1294, 144, 359)
>>> batches = Batches(data.train, 64, seed=0, mean=data.mean, std=data.std)
>>> x, y = next(batches.epoch(0))
>>> x.shape, x.dtype, y.dtype
(torch.Size([64, 1, 8, 8]), torch.float32, torch.int64)
"""

from layerwise.core.augment import AUGMENTATIONS, crop, cutout, flip
from layerwise.data.batches import Batches
from layerwise.data.catalogue import describe, names
from layerwise.data.encoding import Handling
from layerwise.data.loading import Dataset, load
from layerwise.data.mixing import Mix, Mixing
from layerwise.data.nodes import NodeSource
from layerwise.data.noise import noisy_labels
from layerwise.data.sentences import Words
from layerwise.data.sources import InMemorySource, Source, StreamedSource
from layerwise.data.splitting import stratified_split
from layerwise.data.tables import TableSource
from layerwise.data.text import TextOptions
from layerwise.data.tokenizer import Tokenizer
from layerwise.data.tokens import TokenSource

__all__ = [
    "AUGMENTATIONS",
    "Batches",
    "Dataset",
    "Handling",
    "InMemorySource",
    "Mix",
    "Mixing",
    "NodeSource",
    "Source",
    "StreamedSource",
    "TableSource",
    "TextOptions",
    "TokenSource",
    "Tokenizer",
    "Words",
    "crop",
    "cutout",
    "describe",
    "flip",
    "load",
    "names",
    "noisy_labels",
    "stratified_split",
]
