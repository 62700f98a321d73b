"""Figures of a learner over the batches of a split."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerwise import data
from layerwise.core.tasks import UNLABELLED
from layerwise.learner import Learner


def evaluate(learner: Learner, batches: data.Batches) -> dict[str, float]:
    """Mean over all samples of the rule's scalars per block; the head's are those of the rule's prediction.

    Returns:
        `"<block>/<scalar>"` to value; `head/accuracy` and `head/loss` always.
    """
    return mean_of([totals(learner, batches)])


def totals(learner: Learner, batches: data.Batches) -> tuple[dict[str, float], int]:
    """Sums over samples of the rule's scalars per block, and the number of samples."""
    sums: dict[str, Tensor] = {}
    count = 0
    for x, y in batches.epoch(0):
        metrics = learner.evaluate(x, y)
        for block, scalars in metrics.blocks.items():
            for name, value in scalars.items():
                key = f"{block}/{name}"
                sums[key] = sums.get(key, 0.0) + value.double() * len(x)
        count += len(x)
    return {key: float(value) for key, value in sums.items()}, count


def mean_of(parts: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Means over all samples, out of the totals of parts of a data set."""
    count = sum(samples for _, samples in parts)
    names = {name: None for sums, _ in parts for name in sums}  # in their order
    return {name: sum(sums.get(name, 0.0) for sums, _ in parts) / count for name in names}


def correct(learner: Learner, batches: data.Batches) -> bytes:
    """Which labelled samples are classified correctly, as a `.npy` file of bool `(N,)`."""
    found = [(learner(x).argmax(-1) == y)[y != UNLABELLED].flatten().cpu() for x, y in batches.epoch(0)]
    file = io.BytesIO()
    np.save(file, torch.cat(found).numpy())
    return file.getvalue()
