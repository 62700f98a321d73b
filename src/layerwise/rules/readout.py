"""What the rules with a loss per block share: groups of blocks, and a vector out of a block's output."""

from typing import Literal

from torch import Tensor, nn

from layerwise.core.functional import pool_features
from layerwise.core.rule import Site

Pool = Literal["auto", "mean", "moments", "grid", "cls", "flatten", "none"]


def grouped(blocks: int, size: int, join_head: bool, overlap: int = 0) -> list[range]:
    """Ranges of `size` neighbouring blocks, each with a view of the `overlap` blocks after it.

    The head joins the last block, or stands alone.

    >>> grouped(blocks=3, size=2, join_head=False)
    [range(0, 2), range(2, 3), range(3, 4)]
    >>> grouped(blocks=3, size=1, join_head=True, overlap=1)
    [range(0, 2), range(1, 4), range(2, 4)]
    """
    stops = [(start, min(start + size + overlap, blocks)) for start in range(0, blocks, size)]
    if join_head:
        return [range(start, blocks + 1 if stop == blocks else stop) for start, stop in stops]
    return [range(start, stop) for start, stop in stops] + [range(blocks, blocks + 1)]


def convolution(h: Tensor) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution that reads maps `(B, C, H, W)`, or volumes `(B, C, D, H, W)`."""
    return nn.Conv3d if h.dim() == 5 else nn.Conv2d


def pool_vectors(h: Tensor, pool: Pool, per_position: bool, site: Site | None = None) -> Tensor:
    """One vector per prediction out of a block's output.

    `"auto"` averages over space or tokens. Where labels are given per position, `"auto"` and `"grid"` keep them all.

    Args:
        h: the output of `site`; without one, in the standard order of `layerwise.core.layout`.
        pool: one of `Pool`.
        per_position: whether there is a label for every position.
        site: where the output comes from.

    Raises:
        LayerwiseError: the site does not know which dimension holds the channels.
    """
    # Everything in one vector needs no layout, but has the same order whatever the layout, where it is known.
    if site is not None and (pool != "flatten" or site.layouts[site.index : site.index + 1] != (None,)):
        h = site.standard(h)
    if per_position and pool == "grid":
        pool = "none"
    elif pool == "auto":
        pool = "none" if per_position else "mean"
    return pool_features(h, pool)
