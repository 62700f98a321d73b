"""Periodically guided local learning: local losses, and backpropagation through the network in every P-th step."""

from dataclasses import dataclass
from typing import ClassVar

from layerwise.core.pieces import JoinsGroups
from layerwise.core.ranges import NonNegativeInt, PositiveInt
from layerwise.core.rule import BlockContext, Locality, Signal, loss_at_head
from layerwise.errors import LayerwiseError
from layerwise.rules.dgl import DGL


@dataclass(frozen=True)
class PeriodicGuidance(JoinsGroups, DGL):
    r"""Periodically guided local learning: most updates are local, the others follow the global loss.

    $$\theta \leftarrow \theta - \eta \sum_k \frac{\partial L_k}{\partial \theta} \;\text{ in steps with }\;
      t \bmod P < P - G, \qquad
      \theta \leftarrow \theta - \eta\, \frac{\partial\, \mathrm{CE}(f(x), y)}{\partial \theta} \;\text{ otherwise}$$

    with the losses $L_k$ of `dgl`, each of which reaches only its own block. The auxiliary networks rest in the guided
    steps. A parameter has one optimizer state, whichever loss moves it. With G = 0 the rule is `dgl`, with G = P it is
    backprop, bit for bit. Prediction is a plain forward pass.

    The paper states that local learning is interrupted periodically by updates from the global loss. Period, length,
    their unit (updates) and the order (local first) are our reading: we had no access to the paper's full text.

    >>> rule = PeriodicGuidance(period=3)
    >>> [len(rule.groups_at(update, blocks=4)) for update in range(6)]
    [4, 4, 1, 4, 4, 1]
    """

    period: PositiveInt = 10
    """Updates P from one guided phase to the next."""
    guided: NonNegativeInt = 1
    """Updates G at the end of every period that follow the global loss."""

    name: ClassVar[str] = "periodic_guidance"
    locality: ClassVar[Locality] = "interlocking"
    boundary: ClassVar[str] = "detached activation; in guided steps activations, and gradients back through every block"
    flat_memory: ClassVar[bool] = False
    source: ClassVar[str] = (
        "Bhatti & Moon, arXiv 2208.00821 (2022); period, length and order of the phases, optimizer state: our reading"
    )
    restrictions: ClassVar[str] = (
        "Needs the memory of backprop in guided steps. One label per sample, batches of two or more (batch norm)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guided > self.period:
            raise LayerwiseError(f"guided is {self.guided}; it must be at most the period, {self.period}.")

    def groups_at(self, update: int, blocks: int) -> list[range]:
        """The groups of `dgl`; at the end of a period, all of them joined."""
        if update % self.period < self.period - self.guided:
            return self.groups(blocks)
        return [range(blocks + 1)]

    def signal(self, ctx: BlockContext) -> Signal:
        """The block's own loss; if all blocks are one graph, only the head's."""
        if ctx.view == range(ctx.site.blocks + 1):
            return loss_at_head(ctx) if ctx.site.is_head else Signal()
        return super().signal(ctx)
