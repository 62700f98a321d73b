"""Wrong labels on purpose: label noise as a property of a data set."""

import numbers
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from layerwise.core.randomness import derive_seed
from layerwise.errors import LayerwiseError

NoiseKind = Literal["symmetric", "pairs"]
NOISE_SEED = 20_241  # a constant, so that every rule and every seed gets the same wrong labels
PAIRS = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}


def noisy_labels(labels: Tensor, classes: Sequence[str], rate: float, kind: NoiseKind = "symmetric") -> Tensor:
    """Labels of which a share is wrong; the same ones in every run.

    Args:
        labels: int64 `(N,)`.
        classes: names of the K classes.
        rate: share of wrong labels, in [0, 1). Exactly that share, rounded: of all samples (`symmetric`), of each
            class that has a partner (`pairs`).
        kind: `symmetric` replaces the label by one of the K - 1 other classes, drawn uniformly. `pairs` confuses
            classes of CIFAR-10 that look alike: truck to automobile, bird to airplane, deer to horse, cat and dog.

    Returns:
        int64 `(N,)`.

    Raises:
        LayerwiseError: a rate outside [0, 1), an unknown kind, or `pairs` for other classes than CIFAR-10's.

    Source of the pairs: Patrini et al., arXiv 1609.03683 (2017).

    >>> clean = torch.arange(10).repeat(10)
    >>> int((noisy_labels(clean, list("abcdefghij"), 0.4) != clean).sum())
    40
    """
    labels = torch.as_tensor(labels, device="cpu")
    if not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
        raise LayerwiseError(f"label noise {rate} is not in [0, 1); it is the share of wrong labels, 0 for none")
    if kind not in get_args(NoiseKind):
        raise LayerwiseError(f"unknown label noise {kind!r}; choose symmetric or pairs.")
    names = [name.lower() for name in classes]
    if kind == "pairs" and not {*PAIRS, *PAIRS.values()} <= {*names}:
        raise LayerwiseError(
            "label noise in pairs is defined for the classes of cifar10; use --label-noise-kind symmetric for this data"
        )
    draw = Generator().manual_seed(derive_seed(NOISE_SEED, kind))
    # A fixed order of all samples: those wrong at a lower rate are among those wrong at a higher one.
    order = torch.randperm(len(labels), generator=draw, device="cpu")
    shift = torch.randint(1, len(names), labels.shape, generator=draw, device="cpu")
    noisy = labels.clone()
    if kind == "symmetric":
        wrong = order[: round(rate * len(labels))]
        noisy[wrong] = (labels[wrong] + shift[wrong]) % len(names)
        return noisy
    for name, other in PAIRS.items():
        members = order[labels[order] == names.index(name)]
        noisy[members[: round(rate * len(members))]] = names.index(other)
    return noisy
