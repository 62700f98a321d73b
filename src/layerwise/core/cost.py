"""Measures the cost of a network's blocks, and divides them evenly."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from layerwise.core.blocks import Partition
from layerwise.core.keeping import put_back
from layerwise.core.modes import evaluation_mode


def balanced_ends(cost: Sequence[float], parts: int) -> list[int]:
    """Ends of `parts` contiguous, non-empty ranges whose largest summed cost is as small as can be.

    >>> balanced_ends([1, 1, 4, 1, 1], 3)
    [2, 3, 5]
    """
    total = [0, *torch.tensor(cost, device="cpu").cumsum(0).tolist()]
    # best[k][i]: the smallest possible maximum when the first i are joined to k.
    best = {(0, 0): (0, 0)}
    for k in range(1, parts + 1):
        for i in range(k, len(cost) + 1):
            best[k, i] = min(
                (max(best[k - 1, j][0], total[i] - total[j]), j) for j in range(k - 1, i) if (k - 1, j) in best
            )
    ends, i = [], len(cost)
    for k in range(parts, 0, -1):
        ends.append(i)
        i = best[k, i][1]
    return ends[::-1]


def operations(parts: Partition, example: Any) -> list[int]:
    """Floating-point operations of the forward pass of each block and the head; exact, the same on every machine."""
    costs, h = [], example
    with evaluation_mode(parts), put_back(parts.model), torch.no_grad(), parts.passing(example):
        for block in [*parts.blocks, parts.head]:
            with FlopCounterMode(display=False) as counter:
                h = block(h)
            costs.append(counter.get_total_flops())
    return costs
