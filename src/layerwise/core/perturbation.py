"""A random direction in the space of the weights, drawn anew from a seed whenever it is needed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.core.randomness import derive_seed


class Perturbation:
    r"""Moves parameters along $z \sim N(0, I)$, in place; no noise is kept but that of one parameter at a time.

    Args:
        parameters: what is moved.
        seed: decides z.

    >>> weight = torch.zeros(3)
    >>> direction = Perturbation([weight], seed=0)
    >>> direction.to(0.5)
    >>> torch.equal(weight, 0.5 * direction.of(0))
    True
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int):
        self.parameters, self.seed = parameters, seed
        self.offset = 0.0
        """Where the parameters are: this many times z away from their own values."""

    def of(self, place: int) -> Tensor:
        """The part of z that belongs to a parameter."""
        own = self.parameters[place]
        draw = torch.Generator(own.device)
        draw.manual_seed(derive_seed(self.seed, "perturbation", place))
        return torch.randn(own.shape, generator=draw, dtype=own.dtype, device=own.device)

    @torch.no_grad()
    def to(self, offset: float) -> None:
        """Move the parameters to their own values plus `offset` times z, up to rounding."""
        if offset != self.offset:
            for place, parameter in enumerate(self.parameters):
                parameter.add_(self.of(place), alpha=offset - self.offset)
            self.offset = offset
