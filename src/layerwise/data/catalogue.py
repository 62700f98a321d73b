"""The names of data sets, and the forms of names."""

import os

from layerwise.errors import LayerwiseError, unknown

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
    "diabetes": "442 patients, 10 numbers each, and how far diabetes went a year later: --task regression",
    "digit_scenes": "5,000 scenes of 1 to 3 of the digits, 20x20 grey: --task multilabel (which ones) or segmentation",
    "tinyshakespeare": "1.1 million characters of Shakespeare, for gpt: LAYERWISE_DATA holds tinyshakespeare/input.txt",
    "text:PATH": "a file of text, or a folder with train.txt, and with validation.txt and test.txt if wanted: for gpt",
    "hf:owner/name": "any image-classification data set on the Hugging Face hub, or one of text: --task language_model",
    "imagefolder:PATH": "a folder with one folder of images per class, or with train/ and test/ of that form; "
    "with images/ and masks/ in place of classes for --task segmentation",
    "parquet:PATH": "one parquet file or a folder of them with train or test in the names: an image and a label column",
    "PATH.csv": "a table: a line of names, a column called label (or class, target, y) or those of "
    "--data.label-column, all others numbers; words and gaps with --data.categories and --data.gaps",
}
TEXTS = ("tinyshakespeare", "text")
"""Names, and forms of names, of texts."""
SERVES = {
    **dict.fromkeys(("digits", "cora", *HUB), ("classification",)),
    "diabetes": ("regression",),
    "digit_scenes": ("multilabel", "segmentation"),
    "imagefolder": ("classification", "segmentation"),
    **dict.fromkeys(("parquet", "csv"), ("classification", "regression", "multilabel")),
    "hf": ("classification", "regression", "multilabel", "language_model"),
    **dict.fromkeys(TEXTS, ("language_model",)),
}
"""Names, and forms of names, to the tasks that their labels are for."""
FORMS = ("hf", "imagefolder", "parquet", "text")  # what a name may begin with, before a colon


def names() -> list[str]:
    """The names and forms of names that `load` takes.

    >>> names()[:3]
    ['digits', 'mnist', 'fashion_mnist']
    """
    return list(DESCRIPTIONS)


def describe(name: str) -> str:
    """Describe a data set in one line, given its name or any name of its form.

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


def is_text(name: str) -> bool:
    """Whether a name is that of a text, whose tokens are predicted one after the other.

    >>> is_text("text:book.txt"), is_text("digits")
    (True, False)
    """
    return name.partition(":")[0] in TEXTS


def check_task(name: str, task: str) -> None:
    """Raise LayerwiseError if the labels of a data set are not for the task.

    >>> check_task("digits", "regression")
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: the labels of digits are not for the task regression; use --task classification.
    """
    serves = SERVES.get("csv" if is_table(name) else name if name in SERVES else name.partition(":")[0])
    if serves is None:
        raise unknown("data set", name, names())
    if task not in serves:
        raise LayerwiseError(f"the labels of {name} are not for the task {task}; use --task {' or '.join(serves)}.")


def plain_name(name: str | os.PathLike[str]) -> str:
    """A name or path as text; any other object becomes a text that names no data set."""
    try:
        name = os.fspath(name)
    except TypeError:
        name = repr(name)
    return name if isinstance(name, str) else os.fsdecode(name)
