"""Layer Collaboration: forward-forward whose blocks know the other blocks' goodness of the sample."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise.core.functional import goodness, unit_length
from layerwise.core.ranges import NonNegativeInt
from layerwise.core.rule import BatchContext, BlockContext, Locality, Signal
from layerwise.rules.forward_forward import ForwardForward


@dataclass(frozen=True)
class LayerCollaboration(ForwardForward):
    r"""Layer Collaboration: the goodness of the other blocks is added inside the logistic.

    $$p_i(x) = \sigma\big(g_i(x) + \gamma_i(x) - \theta\big), \qquad
      L_i = -\log p_i(x^{+}) - \log(1 - p_i(x^{-}))$$

    with $\gamma_i = \mathrm{stopgrad} \sum_{t < i} g_t$ (`gamma="earlier"`), which comes along with the sample, or
    $\gamma_i = \mathrm{stopgrad} \sum_{t \ne i} g_t$ (`gamma="all"`), which takes a forward pass before the update.
    gamma is that of the same sample, positive or negative. It has no gradient, so it only weighs samples: a block stops
    pushing when the others have decided. Labels, negatives and predictors are those of `forward_forward`.

    The equations and both forms of gamma are the paper's. Ours: theta is that of one block times the number of blocks
    in the sum (with less, late blocks fall silent); for `gamma="all"`, the sum is of the blocks before this step's
    updates, without the block's own goodness in this step; by default every block counts in a prediction.

    >>> LayerCollaboration(gamma="all").locality
    'broadcast'
    """

    gamma: Literal["earlier", "all"] = "earlier"
    """Whose goodness is added to a block's own: that of the blocks before it, or of all others."""
    skip: NonNegativeInt = 0
    """Blocks at the input that no predictor reads (the last block always counts)."""

    name: ClassVar[str] = "layer_collaboration"
    locality: ClassVar[Locality] = "local"
    whole_batch: ClassVar[str] = "makes negative samples out of the batch"
    boundary: ClassVar[str] = (
        "detached activation of unit length and goodness (one number per sample), for a positive and a negative sample"
    )
    source: ClassVar[str] = (
        "Lorberbom, Gat, Adi, Schwing & Hazan, arXiv 2305.12393 (2024); threshold, further options: our reading"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma == "all":  # what the class declares holds for the earlier blocks
            object.__setattr__(self, "locality", "broadcast")
            object.__setattr__(self, "runs_once", False)
            object.__setattr__(
                self, "boundary", f"{self.boundary}; that of later blocks comes from a first forward pass"
            )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The samples; with `gamma="all"` also the summed goodness of all blocks, from a first pass."""
        x, message = super().begin(ctx)
        message["gamma"] = torch.zeros_like(message["votes"])
        if self.gamma == "all":
            h = x
            for index in range(len(ctx.network.blocks)):
                h = ctx.run(index, h, message)
                message["gamma"] += goodness(h[: 2 * len(ctx.y)], self.goodness)
                h = unit_length(h)
        return x, message

    def theta(self, ctx: BlockContext) -> float:
        """Threshold of the summed goodness: one block's for every block in the sum."""
        return super().theta(ctx) * (ctx.site.index + 1 if self.gamma == "earlier" else ctx.site.blocks)

    def others(self, ctx: BlockContext, g: Tensor) -> Tensor:
        """The other blocks' goodness `(2 B,)`, without gradient."""
        return ctx.message["gamma"] if self.gamma == "earlier" else ctx.message["gamma"] - g.detach()

    def signal(self, ctx: BlockContext) -> Signal:
        """That of forward-forward; passes on the summed goodness of this block and those before it."""
        signal = super().signal(ctx)
        if self.gamma == "earlier" and not ctx.site.is_head:
            own = goodness(ctx.h[: 2 * len(ctx.y)], self.goodness)
            signal.message["gamma"] = ctx.message["gamma"] + own
        return signal
