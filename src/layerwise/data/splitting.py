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
    chosen = _drawn(labels, _quotas(counts, fraction, [max(0, count - 1) for count in counts]), seed)
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def stratified_sample(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose samples, each class in the same proportion, and at least one of each class.

    Args:
        labels: int64 (N,), at least 0.
        count: how many, from the number of different labels to N.
        seed: of the choice within each class.

    Returns:
        int64 (count,), indices in ascending order.

    >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 1])
    >>> labels[stratified_sample(labels, 3, seed=0)]
    tensor([0, 0, 1])
    """
    labels = torch.as_tensor(labels, device="cpu")
    counts = torch.bincount(labels).tolist()
    quotas = _quotas(counts, count / len(labels), counts)
    for label in (label for label, of_class in enumerate(counts) if of_class and not quotas[label]):
        quotas[quotas.index(max(quotas))] -= 1
        quotas[label] = 1
    return _drawn(labels, quotas, seed).nonzero().flatten()


def _quotas(counts: list[int], fraction: float, most: list[int]) -> list[int]:
    """How many samples of each class make up a fraction of all, of class k `most[k]` at most."""
    wanted = [fraction * count for count in counts]
    quotas = [math.floor(want) for want in wanted]
    missing = round(fraction * sum(counts)) - sum(quotas)
    # Largest remainders first, so that no class is more than one sample off its share.
    for label in sorted(range(len(counts)), key=lambda label: quotas[label] - wanted[label])[: max(0, missing)]:
        quotas[label] = min(quotas[label] + 1, most[label])
    return quotas


def _drawn(labels: Tensor, quotas: list[int], seed: int) -> Tensor:
    """Which samples are drawn, so many of each class: bool (N,)."""
    generator = Generator().manual_seed(derive_seed(seed, "split"))
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label, take in enumerate(quotas):
        members = (labels == label).nonzero().flatten()
        chosen[members[torch.randperm(len(members), generator=generator, device="cpu")[:take]]] = True
    return chosen
