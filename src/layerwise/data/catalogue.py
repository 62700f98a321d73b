"""The names and forms of names that a data set is loaded by."""

import os

from layerwise.errors import unknown

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
    raise unknown("data set", name, names())


def is_table(name: str) -> bool:
    """Whether a name is the path of a table: it ends in .csv, in any case, and does not begin with another form.

    >>> is_table("C:/data/12:30.CSV"), is_table("parquet:a.csv")
    (True, False)
    """
    return name.lower().endswith(".csv") and name.partition(":")[0] not in FORMS


def plain_name(name: str | os.PathLike[str]) -> str:
    """A name or path as text, whatever a user gave; what is none will be unknown."""
    try:
        name = os.fspath(name)
    except TypeError:
        name = repr(name)
    return name if isinstance(name, str) else os.fsdecode(name)
