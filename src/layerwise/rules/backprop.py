"""Backpropagation through the whole network: the baseline."""

from dataclasses import dataclass
from typing import ClassVar

from layerwise.core.rule import ANY_TASK, BlockContext, Locality, Rule, Signal, loss_at_head


@dataclass(frozen=True)
class Backprop(Rule):
    r"""Backpropagation: one cross-entropy at the head, one backward pass through all blocks.

    $\min_\theta \; \mathrm{CE}\big(W_{out} f_L(\dots f_1(x)), y\big)$. All blocks and the head form one group
    of the engine, so the code path is that of every other rule.

    >>> Backprop().groups(blocks=3)
    [range(0, 4)]
    """

    name: ClassVar[str] = "backprop"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "activations forward; gradients backward through every block"
    flat_memory: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = "Rumelhart, Hinton & Williams, Nature 323 (1986)"
    restrictions: ClassVar[str] = "Activations of all blocks are kept until the backward pass."

    def groups(self, blocks: int) -> list[range]:
        """One group: every block and the head."""
        return [range(blocks + 1)]

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss at the head; the blocks have no loss of their own."""
        return loss_at_head(ctx) if ctx.site.is_head else Signal()
