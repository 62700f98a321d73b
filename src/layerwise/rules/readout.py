"""What the rules with a loss per block share: groups of blocks, and a vector out of a block's output."""

from typing import Literal

from torch import Tensor

from layerwise.core.functional import pool_features

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


def pool_vectors(h: Tensor, pool: Pool, per_position: bool) -> Tensor:
    """One vector per prediction out of a block's output.

    `"auto"` averages over space or tokens. Where labels are given per position, `"auto"` and `"grid"` keep them all.

    Args:
        h: `(B, D)`, `(B, C, H, W)` or `(B, T, D)`.
        pool: one of `Pool`.
        per_position: whether there is a label for every position.
    """
    if per_position and pool == "grid":
        pool = "none"
    elif pool == "auto":
        pool = "none" if per_position else "mean"
    return pool_features(h, pool)
