"""Trials of learning rate and weight decay: a fixed list around a rule's own values, the same for every rule."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layerwise.core.tasks import ACCURACY, Metric
from layerwise.runs.options import TrainOptions

SPAN = 10.0
"""Rates and decays lie between 1/10 and 10 times the given ones."""
DECAY = 0.01
"""Centre of the weight decays if the rule has none."""


def trial_options(options: TrainOptions, count: int) -> list[TrainOptions]:
    r"""The first `count` trials: the given rate and decay, then points that fill the square around them evenly.

    Trial k > 0 has $\mathrm{lr}\cdot 10^{2u_k - 1}$ and $\mathrm{wd}\cdot 10^{2v_k - 1}$, where $(u_k, v_k)$ is point k
    of the Halton sequence (bases 2 and 3; Halton, Numerische Mathematik 2, 1960). Trials are a prefix of one list, so
    that a larger count keeps the first ones.

    >>> [round(trial.lr, 6) for trial in trial_options(TrainOptions(lr=0.01), 4)]
    [0.01, 0.01, 0.003162, 0.03162]
    """
    decay = options.weight_decay or DECAY
    trials = [options]
    for k in range(1, count):
        rate, other = (SPAN ** (2 * halton(k, base) - 1) for base in (2, 3))
        trials.append(replace(options, lr=_rounded(options.lr * rate), weight_decay=_rounded(decay * other)))
    return trials[:count]


def halton(k: int, base: int) -> float:
    """The digits of k in this base, mirrored at the point: in (0, 1) for k > 0.

    >>> [halton(k, 2) for k in (1, 2, 3)]
    [0.5, 0.25, 0.75]
    """
    value, weight = 0.0, 1.0
    while k:
        weight /= base
        k, digit = divmod(k, base)
        value += digit * weight
    return value


def _rounded(value: float) -> float:
    """Round to four digits, which fit on a command line."""
    return float(f"{value:.4g}")


def choose(results: Sequence[dict[str, Any] | None], metric: Metric = ACCURACY) -> int | None:
    """Number of the trial with the best validation accuracy, then the lowest loss, then the first; None if all failed.

    Args:
        results: of the trials, None for one that failed.
        metric: the metric to use instead of the accuracy.

    >>> choose([None, {"val_accuracy": 0.9, "val_loss": 0.3}, {"val_accuracy": 0.9, "val_loss": 0.2}])
    2
    """
    key = f"val_{metric.name}"
    found = [(i, result) for i, result in enumerate(results) if result is not None]
    done = [(metric.better_first(result[key]), result["val_loss"]) for _, result in found]
    last = [tuple(math.inf if math.isnan(value) else value for value in values) for values in done]
    return min(zip(last, (i for i, _ in found), strict=True))[1] if found else None
