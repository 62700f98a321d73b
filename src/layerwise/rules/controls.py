"""Controls: the cost of locality (deep supervision) and the gain from training blocks at all (last layer)."""

from dataclasses import dataclass
from typing import ClassVar

from layerwise.core.rule import ANY_TASK, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.rules.local_ce import GreedyLinear


@dataclass(frozen=True)
class DeepSupervision(GreedyLinear):
    r"""The losses of `local_ce`, summed, with no detach: one backward pass through the whole network.

    $\min_\theta \sum_i \mathrm{CE}(W_i\,\mathrm{pool}(h_i) + b_i, y)$ with gradients through all blocks. The
    difference in accuracy to `local_ce` is what gradient isolation costs.
    """

    name: ClassVar[str] = "deep_supervision"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "activations forward; gradients backward through every block"
    flat_memory: ClassVar[bool] = False
    source: ClassVar[str] = "Lee et al., Deeply-Supervised Nets, AISTATS (2015); equal weights: our reading"
    restrictions: ClassVar[str] = "A control: it needs at least the memory of backprop."

    def groups(self, blocks: int) -> list[range]:
        """One group: every block and the head."""
        return [range(blocks + 1)]


@dataclass(frozen=True)
class LastLayer(Rule):
    """Only the head learns; every block keeps its initial weights.

    The floor of any comparison: a rule that does not beat it has trained nothing but the last layer.
    """

    name: ClassVar[str] = "last_layer"
    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation"
    flat_memory: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = "the random-feature baseline"
    restrictions: ClassVar[str] = "A control: the blocks do not learn."

    def trains(self, site: Site) -> bool:
        """Only the head."""
        return site.is_head

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss at the head."""
        return loss_at_head(ctx) if ctx.site.is_head else Signal()
