"""Interlocking backpropagation: a block learns from the loss of an auxiliary head some blocks ahead."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from layerwise.core.pieces import ReadsOut
from layerwise.core.ranges import PositiveInt
from layerwise.core.rule import ANY_TASK, BlockContext, Locality, Rule, Signal, Site, loss_at_head, loss_of
from layerwise.core.tasks import Task
from layerwise.rules.readout import Pooling, grouped, linear_outputs, read_out, readout_width


@dataclass(frozen=True)
class Interlocking(ReadsOut, Rule):
    r"""N-wise interlocking backpropagation: gradients reach back over N - 1 block boundaries.

    $$\theta_i \leftarrow \theta_i - \eta\, \frac{\partial L_{i+N-1}}{\partial \theta_i}, \qquad
      L_k = \mathrm{CE}(a_k(h_k), y), \qquad a_k \leftarrow a_k - \eta\, \frac{\partial L_k}{\partial a_k}$$

    A block follows the loss of the auxiliary head N - 1 blocks ahead and no nearer one; that head itself learns from
    its own loss on a detached input. The last N blocks follow the loss of the network's head. N = 1 is `local_ce`,
    N = 2 is pairwise, and with N the number of blocks the rule is backprop, bit for bit.

    The update is the paper's. Ours: linear auxiliary heads (the paper's are convolutional); each block runs the N - 1
    blocks ahead again, instead of keeping N graphs alive for the gradients to return through.

    >>> Interlocking(n=2).groups(blocks=3)
    [range(0, 2), range(1, 4), range(2, 4)]
    """

    n: PositiveInt = 2
    """Blocks whose graph a loss passes through: 1 is local, 2 pairwise, the number of blocks backprop."""
    pool: Pooling = "auto"
    """How a block's output becomes a vector: auto | mean | moments (and standard deviation) | grid | cls | flatten."""

    name: ClassVar[str] = "interlocking"
    locality: ClassVar[Locality] = "interlocking"
    boundary: ClassVar[str] = "detached activation; gradients back over n - 1 boundaries"
    flat_memory: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = (
        "Gomez, Key et al., arXiv 2010.04116 (2020); linear auxiliary heads, blocks ahead run again: our reading"
    )
    restrictions: ClassVar[str] = "Every block runs the n - 1 blocks ahead again: a step costs up to n forward passes."

    def groups(self, blocks: int) -> list[range]:
        """Each block with a view of the n - 1 blocks ahead; the head joins the last block."""
        return grouped(blocks, 1, join_head=True, overlap=self.n - 1)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """A linear head if a view ends here, before the network does."""
        if not self.n - 1 <= site.index < site.blocks - 1:
            return None
        return nn.Linear(readout_width(h, self.pool, site, task), task.outputs, dtype=h.dtype)

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The outputs of the block's own head."""
        return linear_outputs(auxiliary, self.pool, site, h, task)

    def signal(self, ctx: BlockContext) -> Signal:
        """The loss at the end of the view, which trains the first block; in a block's turn, the loss of its head."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        own, last = ctx.site.index == ctx.view.start, ctx.site.index == ctx.view.stop - 1
        if ctx.auxiliary is None or not (own or last):
            return Signal()
        h = ctx.h if last else ctx.h.detach()
        return loss_of(ctx.task, *read_out(ctx, ctx.auxiliary, self.pool, h))
