"""Random directions in the space of the weights, and the gradient that losses along them estimate."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerwise.core.randomness import derive_seed


class Perturbation:
    r"""Moves parameters along $z \sim N(0, I)$, in place; the noise of one parameter at a time is in memory.

    Args:
        parameters: the tensors to move.
        seed: decides z.

    >>> weight = torch.zeros(3)
    >>> direction = Perturbation([weight], seed=0)
    >>> direction.to(0.5)
    >>> torch.equal(weight, 0.5 * direction.of(0))
    True
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int):
        self.parameters, self.seed = parameters, seed
        self.offsets = [0.0] * len(parameters)
        """Where each parameter is: this many times z away from its own values."""

    def of(self, place: int) -> Tensor:
        """The part of z that belongs to a parameter."""
        own = self.parameters[place]
        draw = torch.Generator(own.device)
        draw.manual_seed(derive_seed(self.seed, "perturbation", place))
        return torch.randn(own.shape, generator=draw, dtype=own.dtype, device=own.device)

    @torch.no_grad()
    def to(self, offset: float) -> None:
        """Move the parameters to their own values plus `offset` times z, up to rounding."""
        for place, parameter in enumerate(self.parameters):
            if offset != self.offsets[place]:  # an interrupt may come between two of them
                parameter.add_(self.of(place), alpha=offset - self.offsets[place])
                self.offsets[place] = offset


class Estimate:
    r"""The gradient as forward passes with perturbed weights estimate it, without bias: with K directions $z_k$,

    $$\frac{1}{K} \sum_k \frac{L(w + \epsilon z_k) - L(w - \epsilon z_k)}{2 \epsilon} z_k.$$

    Args:
        parameters: the weights w; they are moved and then restored.
        seeds: one per direction.

    >>> weight = torch.zeros(2)
    >>> estimate = Estimate([weight], seeds=range(4000))
    >>> total = estimate.measure(1e-3, lambda: weight @ torch.tensor([3.0, -1.0]))
    >>> estimate.gradient(0).round()
    tensor([ 3., -1.])
    """

    def __init__(self, parameters: Sequence[Tensor], seeds: Sequence[int]):
        self.directions = [Perturbation(parameters, seed) for seed in seeds]
        self.slopes: list[Tensor] = []

    def measure(self, eps: float, loss: Callable[[], Tensor]) -> Tensor:
        """Measure the slope along every direction; returns the sum of the slopes, which is finite if all are.

        Args:
            eps: scale of the perturbation.
            loss: a forward pass; the weights are restored even if it fails.
        """
        for direction in self.directions:
            losses = []
            for offset in (eps, -eps):
                try:
                    direction.to(offset)
                    losses.append(loss())
                except BaseException:
                    direction.to(0.0)
                    raise
            direction.to(0.0)
            self.slopes.append((losses[0] - losses[1]) / (2 * eps * len(self.directions)))
        return torch.stack(self.slopes).sum()

    def gradient(self, place: int) -> Tensor:
        """The estimated gradient of one parameter."""
        total, *others = (
            direction.of(place).mul_(slope) for direction, slope in zip(self.directions, self.slopes, strict=True)
        )
        for share in others:
            total.add_(share)
        return total
