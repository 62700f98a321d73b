"""Text of the benchmark pages: tables, wrapped lines, options and means in words."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence


def options_text(words: Sequence[str]) -> str:
    """Options as `name=value` words, without the rule's name.

    >>> options_text(["--rule", "sll", "--rule.group", "2", "--augment", "flip", "crop", "--channels-last"])
    'group=2 augment=flip,crop channels-last'
    """
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            found.append((word.removeprefix("--").removeprefix("rule."), []))
        else:
            found[-1][1].append(word)
    return " ".join(f"{name}={','.join(values)}" if values else name for name, values in found if name != "rule")


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in body)]


def wrapped(text: str) -> list[str]:
    """Lines of at most 100 columns."""
    return textwrap.wrap(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)


def spread(values: Sequence[float], factor: float = 1, digits: int = 2) -> str:
    """Mean and standard deviation; empty if there are no values."""
    if not values:
        return ""
    deviation = f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * statistics.mean(values):.{digits}f}{deviation}"
