"""Zeroth-order training: two forward passes and no backward pass."""

from dataclasses import dataclass
from typing import ClassVar

from layerwise.core.pieces import PerturbsWeights
from layerwise.core.ranges import PositiveFloat, PositiveInt
from layerwise.core.rule import Locality
from layerwise.rules.backprop import Backprop


@dataclass(frozen=True)
class ZerothOrder(PerturbsWeights, Backprop):
    r"""MeZO: the gradient along a random direction, out of two forward passes with perturbed weights.

    $$\hat g = \frac1K \sum_{k=1}^K \frac{L(\theta + \epsilon z_k) - L(\theta - \epsilon z_k)}{2\epsilon}\, z_k,
      \qquad z_k \sim N(0, I)$$

    Its expectation is the gradient up to $O(\epsilon^2)$, its variance grows with the number of parameters. z is drawn
    from a seed each time it is needed, and weights are perturbed in place, so that a step takes the memory of
    inference. Any optimizer can follow; the paper's is plain gradient descent.

    >>> ZerothOrder(directions=4).perturbations()
    (0.001, 4)
    """

    eps: PositiveFloat = 1e-3
    """Scale of the perturbation."""
    directions: PositiveInt = 1
    """Directions K whose estimates are averaged; each takes two forward passes."""

    name: ClassVar[str] = "zeroth_order"
    locality: ClassVar[Locality] = "global"
    whole_batch: ClassVar[str] = "compares two passes of the whole batch"
    boundary: ClassVar[str] = "activations forward; one number per direction goes back"
    flat_memory: ClassVar[bool] = True
    runs_once: ClassVar[bool] = False
    source: ClassVar[str] = "Malladi et al., MeZO, arXiv 2305.17333 (2023)"
    restrictions: ClassVar[str] = (
        "Meant for fine-tuning: it takes one or two orders of magnitude more steps than backprop. Weights come back "
        "from a perturbation up to rounding. Refused: clip, accumulate, nonfinite='skip', fp16, replicas."
    )

    def perturbations(self) -> tuple[float, int]:
        """Scale and number of directions."""
        return self.eps, self.directions
