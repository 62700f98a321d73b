"""The rules of a comparison in a sentence each, for readers who meet them in the report for the first time."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

from layerwise import rules
from layerwise.core.rule import LOCALITIES

ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Explained:
    """A rule in words."""

    name: str
    about: str
    """What it does: the first line of its docstring."""
    locality: str
    means: str
    """What the locality means."""
    memory: str
    source: list[tuple[str, str]]
    """Parts of the source: text, and the address of the paper or nothing."""


def base(label: str) -> str:
    """Name of a rule, without its options.

    >>> base("sll:overlap=1"), base("backprop+ms_norm")
    ('sll', 'backprop')
    """
    return re.split("[:+]", label, maxsplit=1)[0]


def explained(labels: Iterable[str]) -> list[Explained]:
    """Explain each rule of layerwise or of a package of yours, once. A rule in a file is not read: that would run it.

    >>> [(rule.name, rule.locality) for rule in explained(["sll", "sll:overlap=1", "mine.py:Mine"])]
    [('sll', 'local')]
    """
    known = set(rules.names())
    return [_explained(name) for name in dict.fromkeys(map(base, labels)) if name in known]


def _explained(name: str) -> Explained:
    rule = rules.get(name)
    about = (inspect.getdoc(rule) or "").partition("\n")[0]
    memory = "constant in the number of blocks" if rule.flat_memory else "grow with the number of blocks"
    return Explained(name, about, rule.locality, LOCALITIES[rule.locality], memory, linked(rule.source))


def linked(source: str) -> list[tuple[str, str]]:
    """Split a source where it names a paper on arXiv.

    >>> linked("MeZO, arXiv 2305.17333 (2023)")
    [('MeZO, ', ''), ('arXiv 2305.17333', 'https://arxiv.org/abs/2305.17333'), (' (2023)', '')]
    """
    found, end = [], 0
    for paper in ARXIV.finditer(source):
        found += [(source[end : paper.start()], ""), (paper[0], f"https://arxiv.org/abs/{paper[1]}")]
        end = paper.end()
    return [(text, address) for text, address in [*found, (source[end:], "")] if text]
