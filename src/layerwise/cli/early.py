"""Refuses misspelt names before torch is imported, which takes seconds; with the same sentences as later checks."""

import itertools
from collections.abc import Iterable, Sequence

from layerwise.cli import catalogue
from layerwise.errors import unknown
from layerwise.parsing import take_option

KINDS = {
    "rule": ("rule", catalogue.rules),
    "model": ("model", catalogue.models),
    "data": ("data set", catalogue.data),
    "recipe": ("recipe", catalogue.recipes),
}
"""Maps an option to the kind of thing that it names, and to all names."""
OPEN = (".", ":", "/", "\\")
"""Characters of paths and of names with a form. Whether such a thing exists is checked when it is opened.

A rule or a model from elsewhere has the form `FILE.py:NAME`, `hf:...` or `timm:...`.
"""


def check_options(words: Sequence[str], *options: str) -> None:
    """Raise LayerwiseError if the value of one of these options is an unknown name.

    >>> check_options(["--rule", "sll", "--data", "imagefolder:pictures"], "rule", "data")
    """
    for option in options:
        name = take_option(list(words), option)
        check_names(option, [] if name is None else [name])


def check_names(option: str, names: Iterable[str]) -> None:
    """Raise LayerwiseError if an option names something unknown."""
    what, known = KINDS[option]
    found = {"rule": catalogue.class_of_rule, "model": catalogue.class_of_model}.get(option)
    for name in names:
        marks = OPEN if option in ("data", "recipe") else (":", ".py")
        if any(mark in name for mark in marks) or (found is not None and found(name) is not None):
            continue
        if name not in known():
            raise unknown(what, name, list(known()))


def values(words: Sequence[str], option: str) -> list[str]:
    """Words after `--option` in a command, up to the next option.

    >>> values(["--rule", "sll", "backprop", "--seeds", "2"], "rule")
    ['sll', 'backprop']
    """
    flag = f"--{option}"
    after = words[words.index(flag) + 1 :] if flag in words else []
    return list(itertools.takewhile(lambda word: not word.startswith("-"), after))
