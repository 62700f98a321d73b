"""Splits with each class in the same proportion."""

import math

import torch
from torch import Generator, Tensor

from layerwise.core.randomness import derive_seed


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples in two, each class in the same proportion.

    Args:
        labels: int64 (N,), at least 0.
        fraction: in [0, 1), the size of the second part. It holds `fraction` of each class, rounded down or up so
            that the total fits, and never a whole class.
        seed: of the choice within each class.

    Returns:
        Two int64 tensors of indices in ascending order that together hold 0 to N - 1.

    >>> rest, part = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
    >>> len(rest), part.shape, sorted((part // 4).tolist())
    (6, torch.Size([2]), [0, 1])
    """
    labels = torch.as_tensor(labels, device="cpu")
    counts = torch.bincount(labels).tolist()
    wanted = [fraction * count for count in counts]
    quota = [math.floor(want) for want in wanted]
    missing = round(fraction * len(labels)) - sum(quota)
    # Largest remainders first, so that no class is more than one sample off its share.
    for label in sorted(range(len(counts)), key=lambda label: quota[label] - wanted[label])[: max(0, missing)]:
        quota[label] = min(quota[label] + 1, max(0, counts[label] - 1))
    generator = Generator().manual_seed(derive_seed(seed, "split"))
    part = [torch.empty(0, dtype=torch.int64, device="cpu")]
    for label, take in enumerate(quota):
        members = (labels == label).nonzero().flatten()
        part.append(members[torch.randperm(len(members), generator=generator, device="cpu")[:take]])
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    chosen[torch.cat(part)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
