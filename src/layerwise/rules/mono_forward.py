"""Mono-Forward: every block has a learned projection onto the classes and is trained by its cross-entropy."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from layerwise.core.pieces import PredictsBySite
from layerwise.core.rule import BlockContext, Signal, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.local_ce import GreedyLinear
from layerwise.rules.readout import Pool, outputs_of, pool_vectors, readout_width


@dataclass(frozen=True)
class MonoForward(PredictsBySite, GreedyLinear):
    r"""Mono-Forward: the goodness of a class is a learned projection of the block's activity.

    $$a_i = f_i(\mathrm{stopgrad}(a_{i-1})), \qquad G_i = M_i \, \mathrm{pool}(a_i), \qquad
      L_i = \mathrm{CE}(G_i, y)$$

    $M_i$ (K x D, learned, no bias) and the block's own weights follow only the gradient of $L_i$. The network's head
    is the last block's projection. The class is that of the largest goodness of the last block (`predictor="last"`,
    a plain forward pass), or of the largest $\sum_i G_i$ (`predictor="sum"`).

    The equations and both predictors are the paper's; pooling a convolution's output onto a grid before $M_i$ and
    using the network's head (with its bias) as the last projection are our reading.

    >>> MonoForward(predictor="sum").groups(blocks=2)
    [range(0, 1), range(1, 3)]
    """

    pool: Pool = "grid"
    """How a block's output becomes a vector: grid (at most 4096 numbers) | flatten (the paper) | mean | moments."""
    predictor: Literal["last", "sum"] = "last"
    """Whose goodness decides: the last block's, or the sum over all blocks."""

    name: ClassVar[str] = "mono_forward"
    reads_logits: ClassVar[bool] = False
    source: ClassVar[str] = (
        "Gong, Li & Abdulla, arXiv 2501.09238 (2025); pooling, and the head as last projection: our reading"
    )
    restrictions: ClassVar[str] = "Early blocks turn greedy: each one has to classify on its own."

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The projection M of every group but the last, whose projection is the head."""
        if self.predictor == "sum" and task.kind in ("regression", "segmentation", "loss"):
            raise LayerwiseError(
                f'predictor="sum" adds up the goodness of classes, and {task.kind} has none; use "last".'
            )
        if not self._has_head(site):
            return None
        return self.own_readout(readout_width(h, self.pool, site, task), site, task, h, bias=False)

    def signal(self, ctx: BlockContext) -> Signal:
        """Cross-entropy of the block's goodness."""
        if ctx.task.per_position(ctx.y) and self.predictor == "sum" and self.pool != "none":
            raise LayerwiseError('predictor="sum" with a label per position needs pool="none"; give it, or use "last".')
        return super().signal(ctx)

    def predicts_by_site(self) -> bool:
        """Whether the sum over all blocks decides."""
        return self.predictor == "sum"

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Add the block's goodness to the sum, which is the answer at the head."""
        if self.predictor == "last":
            return h, None
        total = 0.0 if message is None else message
        if site.is_head:
            return total + h, None
        if auxiliary is not None:
            total = total + outputs_of(auxiliary, pool_vectors(h, self.pool, False, site), site).whole()
        return h, total
