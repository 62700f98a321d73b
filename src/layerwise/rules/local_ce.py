"""Local cross-entropy: every block has its own learned linear head."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from layerwise.core.chunked import LinearOutputs
from layerwise.core.pieces import ReadsOut
from layerwise.core.ranges import PositiveInt
from layerwise.core.rule import (
    ANY_TASK,
    BlockContext,
    Locality,
    Rule,
    Signal,
    Site,
    leaves_logits,
    loss_at_head,
    loss_of,
)
from layerwise.core.tasks import Task
from layerwise.rules.ahead import LooksAhead
from layerwise.rules.patches import ReadsPatches
from layerwise.rules.readout import HasReadout, Pooling, grouped, linear_outputs, read_out, readout_width
from layerwise.rules.windows import Windows, head_at


@dataclass(frozen=True)
class Greedy(ReadsOut, Rule):
    """Base of rules whose blocks minimise the loss of their own readout; the last one learns through the head."""

    pool: Pooling = "auto"
    """How a block's output becomes a vector: auto | mean | moments (and standard deviation) | grid | cls | flatten
    | none."""
    group: PositiveInt = 1
    """Neighbouring blocks that share one loss, one graph and one backward pass."""

    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation"
    flat_memory: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each; the head belongs to the last group."""
        return grouped(blocks, self.group, join_head=True)

    def _has_head(self, site: Site) -> bool:
        return (site.index + 1) % self.group == 0 and site.index < site.blocks - 1

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The outputs of the block's own head."""
        return linear_outputs(auxiliary, self.pool, site, h, task)

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss on the block's own head, or on the network's at the end."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        if ctx.auxiliary is None:
            return Signal()
        outputs, y = read_out(ctx, ctx.auxiliary, self.pool)
        if isinstance(outputs, LinearOutputs) and not leaves_logits(self):
            outputs = outputs.whole()
        return loss_of(ctx.task, outputs, y)


@dataclass(frozen=True)
class GreedyLinear(HasReadout, Greedy):
    """Base of rules whose blocks minimise the loss of their own linear head."""

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """A linear head from the pooled output to the task's outputs, for every group but the last."""
        return self.linear_head(site, h, task) if self._has_head(site) else None

    def linear_head(self, site: Site, h: Tensor, task: Task) -> nn.Module:
        """A linear head from the pooled output `h` of a site to the task's outputs."""
        return self.own_readout(readout_width(h, self.pool, site, task), site, task, h)


@dataclass(frozen=True)
class LocalCE(Windows, LooksAhead, ReadsPatches, GreedyLinear):
    r"""Greedy local learning: each block minimises the cross-entropy of its own learned linear head.

    $$L_i = \mathrm{CE}(W_i \, \mathrm{pool}(h_i) + b_i, \; y), \qquad
      h_i = f_i(\mathrm{stopgrad}(h_{i-1}))$$

    The last block needs no head of its own: it is trained together with the network's head. With one block
    this is backpropagation, bit for bit. It is the control of every rule with a local loss: comparing
    with it shows what an alignment term or a fixed projection contributes.

    >>> LocalCE(group=2).groups(blocks=5)
    [range(0, 2), range(2, 4), range(4, 6)]
    """

    name: ClassVar[str] = "local_ce"
    source: ClassVar[str] = (
        "Belilovsky, Eickenberg & Oyallon, arXiv 1812.11446 (2018), with the simplest head; last block "
        "joined with the head: our reading"
    )
    restrictions: ClassVar[str] = "Early layers turn greedy: each one has to classify on its own."

    reads_logits: ClassVar[bool] = False

    def head(self, site: Site, h: Tensor, task: Task) -> nn.Module:
        """A linear head from the pooled output to the task's outputs, or two of them."""
        return self.heads(site, self.patched(site, h), lambda site, h: self.linear_head(site, h, task))

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The outputs of the block's own head."""
        site, h, auxiliary = self.ahead_of(site, h, auxiliary)
        return self.averaged(super().outputs_at(site, self.patched(site, h), head_at(auxiliary), task), len(h))

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss on the block's own head, or on the network's at the end."""
        return self.read_heads(self.looking(ctx), self._read)

    def _read(self, ctx: BlockContext) -> Signal:
        if self.patches == 1 or ctx.site.is_head or ctx.auxiliary is None:
            return super().signal(ctx)
        return self.loss_of_head(ctx, *read_out(self.in_patches(ctx), ctx.auxiliary, self.pool))
