"""Which classes a linear probe confuses, block by block: what a network tells apart, and where."""

from collections.abc import Mapping, Sequence

from layerwise.report import figures
from layerwise.report.sections import Origin, Section

MOST_BLOCKS = 4
"""Number of blocks that a figure shows: the first, the last, and others at equal distances between them."""
Counts = Sequence[Sequence[int]]


def confusions(found: Mapping[str, Sequence[Mapping[str, Counts]]], origin: Origin) -> Section:
    """A figure per rule: the mistakes of the probes on its blocks, side by side.

    Args:
        found: rule to the counts of each seed's blocks.
        origin: the command and machine.
    """
    section = Section(
        "What is taken for what",
        "Mistakes of a linear probe on the frozen output of each block, over all seeds: true class in rows, the class "
        "that it is taken for in columns, as a share of the true class. Where colours fade from left to right, later "
        "blocks tell apart what earlier ones do not.",
        folded=True,
    )
    for rule, seeds in found.items():
        shares = {block: mistakes(counts) for block, counts in summed(seeds).items()}
        if not shares:
            continue
        shown = {list(shares)[i]: shares[list(shares)[i]] for i in spaced(len(shares), MOST_BLOCKS)}
        worst = "; ".join(f"{block}: {in_words(own)}" for block, own in shown.items())
        section.draw(
            f"confusion_{rule}",
            rule,
            f"Mistakes of the probes on the blocks of {rule}, the most frequent one of each. {worst}.",
            lambda axes, shown=shown: figures.side_by_side(axes, shown, (0.0, 0.2), ".1%"),
            2.6,
            f"The most frequent mistake of each block. {worst}.",
            origin,
        )
    return section


def summed(seeds: Sequence[Mapping[str, Counts]]) -> dict[str, Counts]:
    """Counts over all seeds, of the blocks and classes that the first one has.

    >>> summed([{"block1": [[1, 2], [3, 4]]}, {"block1": [[1, 0], [0, 1]]}])
    {'block1': [[2, 2], [3, 5]]}
    """
    found: dict[str, Counts] = {}
    for block, first in seeds[0].items() if seeds else ():
        same = [own[block] for own in seeds if len(own.get(block, ())) == len(first)]
        found[block] = [[sum(parts) for parts in zip(*rows, strict=True)] for rows in zip(*same, strict=True)]
    return found


def mistakes(counts: Counts) -> list[list[float | None]]:
    """Shares of the true class; None if the class is right, or has no sample.

    >>> mistakes([[3, 1], [0, 0]])
    [[None, 0.25], [None, None]]
    """
    return [
        [None if i == j or not sum(row) else count / sum(row) for j, count in enumerate(row)]
        for i, row in enumerate(counts)
    ]


def in_words(shares: Sequence[Sequence[float | None]]) -> str:
    """The most frequent mistake.

    >>> in_words([[None, 0.25], [0.5, None]])
    '1 for 0, 50 %'
    """
    share, i, j = max((share or 0.0, i, j) for i, row in enumerate(shares) for j, share in enumerate(row))
    return f"{i} for {j}, {100 * share:.0f} %" if share else "none"


def spaced(count: int, most: int) -> list[int]:
    """At most `most` numbers of `range(count)`, equally spaced, including the first and the last.

    >>> spaced(3, 4), spaced(13, 4)
    ([0, 1, 2], [0, 4, 8, 12])
    """
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def classes_agree(confusion: Mapping[str, Counts]) -> bool:
    """Whether the counts of all blocks are over the same number of classes.

    >>> classes_agree({"a": [[1, 2], [3, 4]]}), classes_agree({"a": [[1, 2], [3, 4, 5]]})
    (True, False)
    """
    return len({size for counts in confusion.values() for size in (len(counts), *map(len, counts))}) == 1
