"""Usual names of columns, splits, classes and missing labels."""

import re
import unicodedata
from collections.abc import Sequence

from layerwise.errors import LayerwiseError

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "fine_label", "labels", "class", "target", "y")
TEST_NAMES = ("test", "eval", "validation", "valid", "val", "dev")  # the first one that exists is the test split
SPLITS = {name: name for name in ("train", *TEST_NAMES)} | {
    **dict.fromkeys(("training", "trn", "trainval"), "train"),
    **dict.fromkeys(("testing", "tst", "holdout", "heldout"), "test"),
    **{"evaluation": "eval", "devel": "dev", "development": "dev"},
}  # usual names of splits
AFFIXES = ("set", "dataset", "data", "images", "image", "imgs", "img", "split", "folder", "dir")
NAMED_SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?:{'|'.join(AFFIXES)}|[ab])?")
MISSING = (
    "",
    "nan",
    "+nan",
    "-nan",
    "null",
    "<na>",
    "#na",
    "#n/a",
    "n/a",
    "nat",
)  # what programs write for a missing label


def is_missing(word: str) -> bool:
    """Whether a label means that it is missing.

    >>> is_missing(" NaN "), is_missing("nanny")
    (True, False)
    """
    return word.strip().lower() in MISSING


def split_of(name: str, anywhere: bool = False) -> str | None:
    """The split in a name: "train" or one of `TEST_NAMES`; None if it has none, or several.

    Args:
        name: of a folder, a file or a split, in small or capital letters.
        anywhere: whether the word may be anywhere in the name; if not, only words such as "set" may follow it.

    >>> split_of("Training"), split_of("seg_test"), split_of("val_set"), split_of("train_station")
    ('train', 'test', 'val', None)
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    if not anywhere:
        while len(words) > 1 and (words[-1] in AFFIXES or len(words[-1]) == 1):
            words.pop()
        words = words[-1:]
    words += [] if words else re.findall(r"[a-z]+", name.lower())[-1:]
    found = {SPLITS[match[1]] for word in words if (match := NAMED_SPLIT.fullmatch(word))}
    return found.pop() if len(found) == 1 else None


def check_words(names: Sequence[str], title: str) -> tuple[str, ...]:
    """Check the names of classes.

    Raises:
        LayerwiseError: a name twice, or two that are the same text in two Unicode spellings.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name)
        other = seen.get(key)
        seen[key] = name
        if other == name:
            raise LayerwiseError(f"{title} lists the class {name!r} twice; give each class a name of its own.")
        if other is not None:
            raise LayerwiseError(
                f"{title} spells the class {name!r} in two ways, as {other!a} and {name!a}; use one of them."
            )
    return tuple(names)


def few(names: Sequence[str] | None) -> str:
    """The first ten of some names."""
    if names is None:
        return "no names"
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def pick(what: str, candidates: Sequence[str], usual: Sequence[str], columns: Sequence[str], title: str) -> str:
    """The column to use: the first of the usual names among the candidates, or the only candidate."""
    for name in usual:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several {what} columns ({few(candidates)})" if candidates else f"no {what} column"
    raise LayerwiseError(f"{title} has {problem} among its columns {few(columns)}; name the one to use {usual[0]!r}")
