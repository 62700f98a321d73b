"""Real numbers as labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.functional import wide
from layerwise.core.posteriors import LARGEST_LOG_VARIANCE, Gaussian
from layerwise.core.ranges import Range
from layerwise.core.tasks.base import Positions, Task
from layerwise.errors import LayerwiseError, suggestion

Criterion = Literal["mse", "l1", "huber", "gaussian"]
LOG_VARIANCES = {"mse": -math.log(2), "l1": 0.0, "huber": 0.0}
"""Log variance of the Gaussian whose negative log-likelihood is the loss, up to a constant; our choice for `l1`."""


@dataclass(frozen=True, init=False)
class Regression(Task):
    r"""D real numbers per prediction: targets `(B,)` or `(B, D)`.

    The network predicts standardised targets $t = (y - \mathrm{mean}) / \mathrm{std}$, which are y itself by default.
    The loss is the mean over samples and targets of

    - `mse`: $(o - t)^2$; `l1`: $|o - t|$;
    - `huber`: $\frac12 (o - t)^2$ up to $|o - t| = \delta$, $\delta\,(|o - t| - \delta / 2)$ above;
    - `gaussian`: $\frac12 \big(s + (o - t)^2 e^{-s} + \ln 2 \pi\big)$, where the network gives 2 D numbers: the D means
      o, then the D log variances s.

    Metrics are in the units of y: `rmse` (the main one), `mae`, and `r2`, the share of the targets' variance that is
    explained, averaged over the targets; it is 0 for a target that is constant.

    With `positions="token"` targets are `(B, T)` or `(B, T, D)`, with `"pixel"` `(B, H, W)` or `(B, D, H, W)`; the
    readout of a block of a lower resolution is compared with the mean over each of its cells.

    Args:
        loss: `"mse"`, `"l1"`, `"huber"` or `"gaussian"`.
        delta: where the Huber loss turns from squares to absolute values.
        mean: what is subtracted from targets, one number or one per target.
        std: what they are then divided by, likewise.
        positions: where there are targets: `"sample"`, `"token"` or `"pixel"`.
        outputs: width of the network's output; the learner reads it off the network.

    >>> task, o, y = Regression().with_outputs(1), torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])
    >>> task.loss(o, y)
    tensor(2.)
    >>> {name: round(float(value), 3) for name, value in task.metrics(o, y).items()}
    {'rmse': 1.414, 'mae': 1.0, 'r2': 0.111}
    """

    criterion: Criterion
    """Name of the loss."""
    delta: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    positions: Positions
    outputs: int

    kind: ClassVar[str] = "regression"
    main: ClassVar[str] = "rmse"

    def __init__(
        self,
        loss: Criterion = "mse",
        delta: float = 1.0,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        positions: Positions = "sample",
        outputs: int = 0,
    ):
        for name, value, legal in (("loss", loss, Criterion), ("positions", positions, Positions)):
            if value not in get_args(legal):
                raise LayerwiseError(f"{name} is {value!r}; {suggestion(str(value), list(get_args(legal)))}.")
        means, stds = (tuple(v) if isinstance(v, Sequence) else (v,) for v in (mean, std))
        ranges = [("delta", delta, Range(above=0)), *(("mean", v, Range()) for v in means)]
        for name, value, legal in [*ranges, *(("std", v, Range(above=0)) for v in stds)]:
            if value not in legal:
                raise LayerwiseError(f"{name} is {value!r}; give {legal.words}.")
        values = (loss, float(delta), means, stds, positions, outputs)
        for name, value in zip(("criterion", "delta", "mean", "std", "positions", "outputs"), values, strict=True):
            object.__setattr__(self, name, value)
        for name, given in (("mean", means), ("std", stds)):
            if outputs and len(given) not in (1, self.targets):
                raise LayerwiseError(
                    f"{name} has {len(given)} numbers and the network predicts {self.targets}; give one per target."
                )

    @property
    def targets(self) -> int:
        """Number D of targets."""
        return self.outputs // 2 if self.criterion == "gaussian" else self.outputs

    def with_outputs(self, outputs: int) -> Self:
        """The same task with this number of outputs."""
        if self.criterion == "gaussian" and outputs % 2:
            raise LayerwiseError(
                f"the network has {outputs} output{'s' * (outputs != 1)}, and the gaussian loss needs two per target, "
                "a mean and a log variance; give the last layer twice as many outputs as there are targets."
            )
        return type(self)(self.criterion, self.delta, self.mean, self.std, self.positions, outputs)

    def check(self, y: Tensor, unlabelled: bool = False) -> None:
        """Raise LayerwiseError unless `y` holds D finite numbers per prediction."""
        if y.is_complex() or y.dtype == torch.bool:
            raise LayerwiseError(f"the labels are {str(y.dtype).removeprefix('torch.')}; give real numbers.")
        if self.positions == "sample" and self.targets and y.shape[1:] not in ((), (self.targets,)):
            raise self._unlike(y, (len(y), self.targets))
        if y.dim() == 1 and self.targets > 1:
            raise self._unlike(y, (len(y), self.targets))
        if y.device.type == "cpu" and y.is_floating_point() and not bool(torch.isfinite(y).all()):
            raise LayerwiseError("some targets are not finite (NaN or infinity); leave these samples out.")

    def _unlike(self, y: Tensor, wanted: tuple[int, ...]) -> LayerwiseError:
        two = " (a mean and a log variance each)" if self.criterion == "gaussian" else ""
        return LayerwiseError(
            f"the labels have shape {tuple(y.shape)} and the network predicts {self.targets} number"
            f"{'s' * (self.targets != 1)}{two}; give targets of shape {wanted}, or change the last layer."
        )

    def at(self, y: Tensor, resolution: tuple[int, ...]) -> Tensor:
        """Targets at a block's resolution: the mean over each of its cells."""
        if self.positions != "pixel" or tuple(y.shape[y.dim() - len(resolution) :]) == resolution:
            return y
        maps = y if y.dim() == len(resolution) + 2 else y[:, None]
        pool = F.adaptive_avg_pool3d if len(resolution) == 3 else F.adaptive_avg_pool2d
        return pool(wide(maps), resolution)  # pyright: ignore[reportArgumentType]

    def standardised(self, y: Tensor, z: Tensor) -> Tensor:
        """Standardised targets `(..., D)`, in float32 or wider as the outputs, for outputs `(..., D or 2 D)`."""
        y = wide(y)  # float32 would lose most of a small spread around a large mean
        if y.dim() < z.dim():
            y = y.unsqueeze(1 if self.positions == "pixel" else -1)
        y = self.outputs_last(y)
        wanted = (*z.shape[:-1], self.targets)
        if tuple(y.shape) != wanted:
            raise self._unlike(y, wanted)
        y = (y - y.new_tensor(self.mean)) / y.new_tensor(self.std)
        return y.to(wide(z[:0]).dtype)

    def posterior(self, z: Tensor) -> Gaussian:
        """A Gaussian for every target, from outputs `(..., D or 2 D)`."""
        z = wide(z)
        if self.criterion != "gaussian":
            return Gaussian(z, torch.full_like(z, LOG_VARIANCES[self.criterion]), fixed=True)
        mean, log_variance = z.chunk(2, -1)
        return Gaussian(mean, log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE))

    def surprise(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of every target, `(..., D)`."""
        p, t = self.posterior(z), self.standardised(y, z)
        distance = p.mean - t
        if self.criterion == "l1":
            return distance.abs()
        if self.criterion == "huber":
            return F.huber_loss(p.mean, t, reduction="none", delta=self.delta)
        if self.criterion == "mse":
            return distance.square()
        return 0.5 * (p.log_variance + distance.square() * (-p.log_variance).exp() + math.log(2 * math.pi))

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean over samples and targets: a scalar."""
        return self.surprise(self.outputs_last(outputs), y).mean()

    def counted(self, y: Tensor, some_unlabelled: bool) -> float | Tensor:
        """Number of targets."""
        return float(y.numel())

    def decode(self, outputs: Tensor) -> Tensor:
        """Predicted means in the units of the targets."""
        mean = self.posterior(self.outputs_last(outputs)).mean
        return self.as_outputs(mean * mean.new_tensor(self.std) + mean.new_tensor(self.mean))

    def statistics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, per target: of errors, and of targets relative to `mean`, in the targets' units."""
        z = self.outputs_last(outputs)
        exact = torch.float32 if z.device.type == "mps" else torch.float64
        t = self.standardised(y, z).flatten(0, -2).to(exact)
        std = t.new_tensor(self.std)
        error, t = (self.posterior(z).mean.flatten(0, -2).to(exact) - t) * std, t * std
        sums = {"squares": error.square(), "absolute": error.abs(), "sum": t, "sum_of_squares": t.square()}
        found = {name: values.sum(0) for name, values in sums.items()}
        return found | {"count": torch.full((), len(t), dtype=exact, device=t.device)}

    def measures(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Root mean squared error, mean absolute error, explained share of the variance."""
        count = statistics["count"]
        spread = (statistics["sum_of_squares"] - statistics["sum"].square() / count).clamp_min(0)
        explained = 1 - statistics["squares"] / spread.clamp_min(torch.finfo(spread.dtype).tiny)
        return {
            "rmse": (statistics["squares"] / count).mean().sqrt().float(),
            "mae": (statistics["absolute"] / count).mean().float(),
            "r2": torch.where(spread > 0, explained, 0.0).mean().float(),
        }
