"""Successive Gradient Reconciliation: losses of neighbouring blocks whose gradients agree between the two."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.core.blocks import Block
from layerwise.core.functional import wide
from layerwise.core.ranges import NonNegativeFloat
from layerwise.core.rule import BlockContext, Signal
from layerwise.rules.local_ce import GreedyLinear


@dataclass(frozen=True)
class GradientReconciliation(GreedyLinear):
    r"""Successive Gradient Reconciliation: local losses whose gradients agree at the boundary between two blocks.

    With the local cross-entropy $\ell_k$ of block k (as in `local_ce`) and its input $x_{k-1}$:

    $$L_k = \ell_k + \lambda \; \mathbb{E}_{\text{samples}} \Big\| \frac{\partial \ell_k}{\partial x_{k-1}} -
      \mathrm{stopgrad}\Big(\frac{\partial \ell_{k-1}}{\partial x_{k-1}}\Big) \Big\|^2$$

    The gradients are those of the sample's own loss. The first is differentiated again, through block k only; the
    second is sent along with the activation. No gradient leaves a block.

    The paper states that the gradient on a block's input is drawn towards that of the block before on its output,
    within gradient isolation. Its weight, the scale of the distance, the cosine and the last block, which
    learns through the network's head, are our reading: we had no access to the paper's full text.

    >>> GradientReconciliation(distance="cosine").groups(blocks=2)
    [range(0, 1), range(1, 3)]
    """

    weight: NonNegativeFloat = 0.1
    """Weight lambda of the reconciliation."""
    distance: Literal["squared", "cosine"] = "squared"
    """Squared distance of the two gradients, or one minus their cosine, which ignores the size of the losses."""

    name: ClassVar[str] = "gradient_reconciliation"
    unlabelled: ClassVar[bool] = False  # gradients are compared per sample
    reads_input: ClassVar[bool] = True
    boundary: ClassVar[str] = "detached activation and the gradient of the block's own loss on it"
    source: ClassVar[str] = "Yang et al., arXiv 2406.05222 (2024); weight, scale and distance: our reading"
    restrictions: ClassVar[str] = (
        "Blocks are differentiated twice, which costs about one more backward pass; torch.compile cannot do it."
    )

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block so that it can be differentiated twice, on its input too."""
        if not torch.is_grad_enabled():
            return block(h)
        if h.is_floating_point() and h.is_leaf:
            h.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
            return block(h)

    def signal(self, ctx: BlockContext) -> Signal:
        """The local loss and the disagreement; passes on the gradient of that loss on the block's output."""
        wanted, x = ctx.message or (None, None)
        if ctx.site.index == ctx.view.start:
            x = ctx.h_in
        signal = super().signal(ctx)
        if not ctx.learns or signal.loss is None:  # a frozen group has no graph
            return replace(signal, message=(wanted, x))
        loss, samples = signal.loss, len(ctx.h)
        signal.metrics["loss"] = loss
        if wanted is not None and x is not None:
            (own,) = torch.autograd.grad(loss, x, create_graph=True)
            own, wanted = samples * wide(own).flatten(1), wide(wanted).flatten(1)
            if self.distance == "squared":
                disagreement = (own - wanted).square().sum(1).mean()
            else:
                disagreement = 1 - F.cosine_similarity(own, wanted, dim=1).mean()
            signal.loss = loss + self.weight * disagreement
            signal.metrics["disagreement"] = disagreement
        if not ctx.site.is_head:
            (sent,) = torch.autograd.grad(loss, ctx.h, retain_graph=True)
            signal.message = (samples * sent, None)
        return signal
