r"""What a block's outputs say of the label: a distribution whose divergences have closed forms.

Three families, one per kind of task. All tensors are in float32 or wider, outputs last.

- `Categorical`: one of K classes; a number per prediction, `(...)`.
- `Gaussian`: D numbers, each with its own mean and variance; a number per target, `(..., D)`.
- `Bernoullis`: K labels that each hold or not; a number per label, `(..., K)`.

Gaussians and Bernoullis factorise: the Bhattacharyya coefficient of the joint distributions is the product of those of
the factors, so that distances add up. They are given per factor, and a rule averages them, as it does the loss.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core import functional

LARGEST_LOG_VARIANCE = 12.0
"""Bound of a log variance in both directions, so that no variance is zero."""


@dataclass(frozen=True)
class Categorical:
    """One of K classes: log-probabilities `(..., K)`."""

    log_p: Tensor

    @property
    def passed(self) -> Tensor:
        """What crosses to the next block: the log-probabilities."""
        return self.log_p

    @property
    def features(self) -> Tensor:
        """What a belief head reads: the probabilities."""
        return self.log_p.exp()

    def log_bc(self, other: "Categorical") -> Tensor:
        """Logarithm of the Bhattacharyya coefficient, `(...)`."""
        return functional.log_bhattacharyya(self.log_p, other.log_p)

    def kl(self, other: "Categorical") -> Tensor:
        """Kullback-Leibler divergence of this distribution from the other, `(...)`, in nats."""
        return functional.kl_divergence(self.log_p, other.log_p)

    def entropy(self) -> Tensor:
        """Entropy `(...)` in nats."""
        return -(self.log_p.exp() * self.log_p).sum(-1)


@dataclass(frozen=True)
class Gaussian:
    r"""D independent Gaussians: means and log variances, `(..., D)` each.

    $$-\log BC = \frac{(\mu_1 - \mu_2)^2}{4 (\sigma_1^2 + \sigma_2^2)}
      + \frac12 \log \frac{\sigma_1^2 + \sigma_2^2}{2 \sigma_1 \sigma_2}, \qquad
      KL = \frac12 \Big( \log \frac{\sigma_2^2}{\sigma_1^2}
      + \frac{\sigma_1^2 + (\mu_1 - \mu_2)^2}{\sigma_2^2} - 1 \Big)$$

    >>> near, far = (Gaussian(torch.tensor([m]), torch.zeros(1)) for m in (0.0, 2.0))
    >>> round(float(-near.log_bc(far)), 4), round(float(near.kl(far)), 4)  # 4 / 8 and 4 / 2
    (0.5, 2.0)
    """

    mean: Tensor
    log_variance: Tensor
    fixed: bool = False
    """Whether the variance is no output: it is 1."""

    @property
    def passed(self) -> Tensor:
        """What crosses to the next block: means, and log variances where they are outputs; `(..., D or 2 D)`."""
        return self.mean if self.fixed else torch.cat([self.mean, self.log_variance], -1)

    @property
    def features(self) -> Tensor:
        """What a belief head reads: the same."""
        return self.passed

    def log_bc(self, other: "Gaussian") -> Tensor:
        """Logarithm of the Bhattacharyya coefficient of every factor, `(..., D)`."""
        log_sum = torch.logaddexp(self.log_variance, other.log_variance)
        spread = log_sum - math.log(2) - 0.5 * (self.log_variance + other.log_variance)
        return -0.25 * (self.mean - other.mean).square() * (-log_sum).exp() - 0.5 * spread

    def kl(self, other: "Gaussian") -> Tensor:
        """Kullback-Leibler divergence of every factor from the other's, `(..., D)`, in nats."""
        difference = self.log_variance - other.log_variance
        distance = (self.mean - other.mean).square() * (-other.log_variance).exp()
        return 0.5 * (difference.exp() + distance - 1 - difference)

    def entropy(self) -> Tensor:
        """Entropy of every factor, `(..., D)`, in nats."""
        return 0.5 * (math.log(2 * math.pi * math.e) + self.log_variance)


@dataclass(frozen=True)
class Bernoullis:
    r"""K labels that hold or not, independently: their logits `(..., K)`.

    $BC = \sqrt{p q} + \sqrt{(1 - p)(1 - q)}$ for every label.

    >>> half, sure = Bernoullis(torch.zeros(1)), Bernoullis(torch.tensor([40.0]))
    >>> round(float(half.log_bc(sure).exp() ** 2), 4), round(float(sure.kl(half)), 4)  # 1 / 2 and ln 2
    (0.5, 0.6931)
    """

    logits: Tensor

    @property
    def passed(self) -> Tensor:
        """What crosses to the next block: the logits."""
        return self.logits

    @property
    def features(self) -> Tensor:
        """What a belief head reads: the probabilities."""
        return self.logits.sigmoid()

    def _logs(self) -> tuple[Tensor, Tensor]:
        return F.logsigmoid(self.logits), F.logsigmoid(-self.logits)

    def log_bc(self, other: "Bernoullis") -> Tensor:
        """Logarithm of the Bhattacharyya coefficient of every label, `(..., K)`."""
        (on, off), (other_on, other_off) = self._logs(), other._logs()
        return torch.logaddexp(0.5 * (on + other_on), 0.5 * (off + other_off))

    def kl(self, other: "Bernoullis") -> Tensor:
        """Kullback-Leibler divergence of every label from the other's, `(..., K)`, in nats."""
        (on, off), (other_on, other_off) = self._logs(), other._logs()
        return on.exp() * (on - other_on) + off.exp() * (off - other_off)

    def entropy(self) -> Tensor:
        """Entropy of every label, `(..., K)`, in nats."""
        on, off = self._logs()
        return -(on.exp() * on + off.exp() * off)


Posterior = Categorical | Gaussian | Bernoullis


def divergence(name: str, p: Posterior, q: Posterior) -> Tensor:
    """A divergence of two posteriors of one family: `neg_log_bc`, `one_minus_bc`, `hellinger` or `kl`.

    Returns:
        `(...)` for a categorical, `(..., factors)` otherwise, in nats where it is a logarithm.
    """
    if name == "kl":
        return p.kl(q)  # pyright: ignore[reportArgumentType]
    log_bc = p.log_bc(q)  # pyright: ignore[reportArgumentType]
    if name == "neg_log_bc":
        return -log_bc
    one_minus_bc = 1.0 - log_bc.exp()
    # The square root has no derivative where the two agree; below 1e-7 the gradient is set to zero.
    return one_minus_bc.clamp_min(1e-7).sqrt() if name == "hellinger" else one_minus_bc
