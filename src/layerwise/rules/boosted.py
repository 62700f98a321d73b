"""Gradient boosting, block by block: each stage is fitted to the residual of the sum of the stages before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.core.functional import newton_step, wide
from layerwise.core.pieces import PredictsBySite, TakesTurns
from layerwise.core.ranges import PositiveFraction, PositiveInt
from layerwise.core.rule import BlockContext, Locality, Rule, Signal, Site, metrics_of
from layerwise.core.tasks import MultiLabel, Regression, Task
from layerwise.errors import LayerwiseError
from layerwise.rules.readout import Pooling, grouped, pool_vectors

MOMENTUM = 0.9


class BoostingStage(nn.Module):
    """The state of the rule at the end of a stage.

    Args:
        readout: maps the pooled output to the classes; None if the network's head does so.
    """

    def __init__(self, readout: nn.Module | None):
        super().__init__()
        self.readout = readout
        self.register_buffer("running_slope", torch.zeros((), dtype=torch.float32))
        self.register_buffer("running_curvature", torch.zeros((), dtype=torch.float32))

    running_slope: Tensor
    running_curvature: Tensor

    def follow(self, slope: Tensor, curvature: Tensor) -> None:
        """Update the running means; their bias towards zero cancels in the ratio."""
        self.running_slope.lerp_(slope.to(self.running_slope.dtype), 1 - MOMENTUM)
        self.running_curvature.lerp_(curvature.to(self.running_curvature.dtype), 1 - MOMENTUM)

    def step(self) -> Tensor:
        """The step along the stage's output: 0 for a stage that has not learned, and never backwards."""
        return (self.running_slope / self.running_curvature.clamp_min(1e-12)).clamp_min(0)


def residual_of(task: Task, total: Tensor, y: Tensor) -> Tensor:
    """Negative gradient of each sample's loss on the sum of the stages, `(B, K)`; half of it for the squared error."""
    if isinstance(task, Regression):
        return task.standardised(y, total) - total
    return task.distribution(y) - (total.sigmoid() if isinstance(task, MultiLabel) else total.softmax(-1))


def slope_and_curvature(task: Task, f: Tensor, total: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    r"""Slope and curvature of the loss along f, means over the batch, whose quotient is Newton's step.

    The curvature is that of the cross-entropy, $\sum_k p_k (1 - p_k) f_k^2$ for several labels, $\sum_k f_k^2$ for
    the squared error.
    """
    if isinstance(task, Regression):
        return (f * residual).sum(-1).mean(), f.square().sum(-1).mean()
    if isinstance(task, MultiLabel):
        p = total.sigmoid()
        return (f * residual).sum(-1).mean(), (p * (1 - p) * f.square()).sum(-1).mean()
    return newton_step(f, total, residual)


@dataclass(frozen=True)
class Boosted(TakesTurns, PredictsBySite, Rule):
    r"""Sequential training with gradient boosting: stage after stage, each fitted to the residual of those before it.

    A stage is a block (or `group` blocks) with a linear readout $f_t = W_t\, \mathrm{pool}(h_t) + b_t$; the last one is
    read by the network's head. $F_t$ is the sum of the first t stages, $F_0 = 0$. While stage t learns,

    $$r = -\frac{\partial\, \mathrm{CE}(F, y)}{\partial F}\Big|_{F_{t-1}} = y - \mathrm{softmax}(F_{t-1}), \qquad
      L_t = \lVert f_t - r \rVert^2, \qquad h_t = b_t(\mathrm{stopgrad}(h_{t-1}))$$

    for `updates` updates; all other stages rest, and the last one learns to the end. The step along its output is
    Newton's for the cross-entropy,

    $$F_t = F_{t-1} + \eta\, \rho_t f_t, \qquad
      \rho_t = \max\Big(0, \frac{\langle f_t \cdot r \rangle}{\langle \mathrm{Var}_p(f_t) \rangle}\Big), \qquad
      p = \mathrm{softmax}(F_{t-1})$$

    where $\langle\cdot\rangle$ are running means over the batches of the stage's own turn, and $\mathrm{Var}_p$ the
    variance over classes. $\rho_t = 0$ for a stage that has not had its turn. The prediction is the class of the
    largest $F_T$.

    The paper's: residual, squared loss, Newton's step, shrinkage, frozen stages. Its stages are shallow networks on the
    input; in its authors' later form each is a further layer on frozen ones. Ours: minibatches instead of L-BFGS
    on a subsample, one step length with the exact curvature, running means of it.

    `Regression("mse")` has the residual $t - F$ of standardised targets and the curvature $\langle f_t^2 \rangle$, as
    in the paper; `MultiLabel` (ours) has $y - \sigma(F)$ and $\langle p (1 - p) f_t^2 \rangle$, summed over labels.

    >>> rule = Boosted(updates=5)
    >>> sites = [Site(i, blocks=3, name="") for i in range(3)]
    >>> [[rule.learns_at(update, site) for site in sites] for update in (4, 5, 100)]
    [[True, False, False], [False, True, False], [False, False, True]]
    """

    updates: PositiveInt = 200
    """Updates of every stage but the last, which learns until training ends."""
    shrinkage: PositiveFraction = 1.0
    """Factor eta of every stage's step, in (0, 1]."""
    pool: Pooling = "auto"
    """How a block's output becomes a vector: auto | mean | moments (and standard deviation) | grid | cls | flatten."""
    group: PositiveInt = 1
    """Neighbouring blocks that make one stage."""

    name: ClassVar[str] = "boosted"
    locality: ClassVar[Locality] = "local"
    whole_batch: ClassVar[str] = "takes the mean of its stages from the whole batch"
    boundary: ClassVar[str] = "detached activation and the sum of the stages (K numbers per sample)"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels", "regression", "multilabel")
    only: ClassVar[str] = "its stages follow residuals per sample, of classes, squares or several labels"
    predicts_at_head: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Emami & Martinez-Munoz, arXiv 1909.12098 (2019), and arXiv 2302.11327 (2023) for stages that are layers; "
        "minibatches, step length: our reading"
    )
    restrictions: ClassVar[str] = (
        "One label per sample. Stages learn one after the other: set updates to the updates of the run divided by the "
        "number of stages, or the last ones have no turn. The plain network's output means nothing."
    )

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each; the head belongs to the last stage."""
        return grouped(blocks, self.group, join_head=True)

    def learns_at(self, update: int, site: Site) -> bool:
        """One stage at a time."""
        stages = len(self.groups(site.blocks))
        return site.index // self.group == min(update // self.updates, stages - 1)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """Readout and step of a stage, at its last site."""
        if isinstance(task, Regression) and task.criterion != "mse":
            raise LayerwiseError(f"boosted follows the residual of squares, not that of {task.criterion}; use mse.")
        if site.is_head:
            return BoostingStage(None)
        if (site.index + 1) % self.group or site.index == site.blocks - 1:
            return None
        width = pool_vectors(h, self.pool, False, site).shape[-1]
        return BoostingStage(nn.Linear(width, task.outputs, dtype=h.dtype))

    def _output(self, stage: BoostingStage, h: Tensor, site: Site) -> Tensor:
        """The stage's f `(B, K)`."""
        return wide(h if stage.readout is None else stage.readout(pool_vectors(h, self.pool, False, site)))

    def signal(self, ctx: BlockContext) -> Signal:
        """Squared distance of the stage's output from the residual; passes on the sum, which includes this stage."""
        if ctx.task.per_position(ctx.y):
            raise LayerwiseError("boosted sums stages for one label per sample, not one per position.")
        stage = ctx.auxiliary
        if not isinstance(stage, BoostingStage):
            return Signal(message=ctx.message)
        f = self._output(stage, ctx.h, ctx.site)
        total = torch.zeros_like(f) if ctx.message is None else ctx.message
        residual = residual_of(ctx.task, total, ctx.y)
        if ctx.learns:
            stage.follow(*slope_and_curvature(ctx.task, f.detach(), total, residual))
        message = total + self.shrinkage * stage.step() * f.detach()
        metrics, statistics = metrics_of(ctx.task, message, ctx.y)
        metrics = {"loss": ctx.task.loss(message, ctx.y), **metrics}
        loss = (f - residual).square().sum(-1).mean()
        return Signal(loss=loss, message=message, metrics=metrics, statistics=statistics)

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Add the stage's step to the sum, which is the answer at the head."""
        if isinstance(auxiliary, BoostingStage):
            step = self.shrinkage * auxiliary.step() * self._output(auxiliary, h, site)
            message = step if message is None else message + step
        return (message if site.is_head else h), message
