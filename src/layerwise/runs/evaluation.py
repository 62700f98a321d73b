"""Metrics of a learner over the batches of a split."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerwise import data
from layerwise.core.failures import NonFiniteAnswer
from layerwise.core.tasks import UNLABELLED, Task
from layerwise.learner import Learner


def evaluate(learner: Learner, batches: data.Batches) -> dict[str, float]:
    """Mean over all samples of the rule's scalars per block; the head's are those of the rule's prediction.

    Returns:
        `"<block>/<scalar>"` to value; `head/loss` and the task's main metric at the head always.

    Raises:
        NonFiniteAnswer: the head's loss is NaN, so its metrics are meaningless.
    """
    return mean_of([totals(learner, batches)], learner.task)


def totals(learner: Learner, batches: data.Batches) -> tuple[dict[str, float], int]:
    """Sums over samples of the rule's scalars per block, and the number of samples.

    They include the sums from which a task computes its metrics, one number each, as `"<block>#<name>#<place>"`.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for x, y in batches.epoch(0):
        metrics = learner.evaluate(x, y)
        for block, scalars in metrics.blocks.items():
            for name, value in scalars.items():
                key = f"{block}/{name}"
                sums[key] = sums.get(key, 0.0) + value.double() * len(x)
        for block, statistics in metrics.statistics.items():
            for name, values in statistics.items():
                for place, value in enumerate(values.double().flatten()):
                    key = f"{block}#{name}#{place if values.dim() else ''}"
                    sums[key] = sums.get(key, 0.0) + value
        count += len(x)
    return {key: float(value) for key, value in sums.items()}, count


def mean_of(parts: Sequence[tuple[dict[str, float], int]], task: Task | None = None) -> dict[str, float]:
    """Compute means over all samples, and the task's metrics, from the totals of parts of a data set.

    Raises:
        NonFiniteAnswer: the head's loss is NaN, so that its metrics mean nothing.
    """
    count = sum(samples for _, samples in parts)
    names = {name: None for sums, _ in parts for name in sums}  # in their order
    found = {name: sum(sums.get(name, 0.0) for sums, _ in parts) / (1 if "#" in name else count) for name in names}
    if math.isnan(found.get("head/loss", 0.0)):
        raise NonFiniteAnswer
    summed: dict[str, dict[str, list[float]]] = {}
    for name in [name for name in found if "#" in name]:
        block, statistic, place = name.split("#")
        value = found.pop(name)
        summed.setdefault(block, {}).setdefault(statistic + ("" if place else "#"), []).append(value)
    for block, statistics in summed.items():
        assert task is not None
        whole = {
            name.removesuffix("#"): torch.tensor(
                values[0] if name.endswith("#") else values, dtype=torch.float64, device="cpu"
            )
            for name, values in statistics.items()
        }
        found |= {f"{block}/{name}": float(value) for name, value in task.measures(whole).items()}
    return found


def chance(batches: data.Batches) -> float:
    """Accuracy of always answering the most frequent class, over the labelled samples."""
    labels = torch.cat([y.flatten().cpu() for _, y in batches.without_images().epoch(0)])
    counts = labels[labels != UNLABELLED].bincount()
    return float(counts.max() / counts.sum())


def correct(learner: Learner, batches: data.Batches) -> bytes:
    """Which labelled samples are classified correctly, as a `.npy` file of bool `(N,)`."""
    found = [(learner(x).argmax(-1) == y)[y != UNLABELLED].flatten().cpu() for x, y in batches.epoch(0)]
    file = io.BytesIO()
    np.save(file, torch.cat(found).numpy())
    return file.getvalue()
