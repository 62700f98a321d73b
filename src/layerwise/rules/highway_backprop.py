"""Highway backpropagation: gradients run down the residual path at once, and through the blocks step by step."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from layerwise.core.pullback import Pullback
from layerwise.core.ranges import Fraction, NonNegativeInt
from layerwise.core.rule import ANY_TASK, BatchContext, BlockContext, Locality, Rule, Signal, loss_at_head
from layerwise.rules.settling import WHOLE_BATCH, through_head


@dataclass(frozen=True)
class HighwayBackprop(Rule):
    r"""Highway-BP: the gradient reaches all blocks at once along the skips, and k blocks deep through their branches.

    The Jacobian of block i is split, $J_i = K_i + (J_i - K_i)$, into that of its skip, which is cheap, and the rest.
    With the gradient $g$ of the loss on the head's input, all blocks do at the same time, k times,

    $$v_i = (J_{i+1} - K_{i+1})^\top w_{i+1}, \qquad w_L = g, \qquad w_i \leftarrow K_{i+1}^\top w_i' + v_i$$

    where $w_i'$ is the new $w_{i+1}$: a cumulative sum of the $v_i$ along the skips. The start is $v = 0$. Block i then
    learns from the cotangent $w_i$ on its output, and the head from the loss.

    $K_i = (1 - \gamma)\, \mathrm{diag}(h_i \neq 0)$ where a block keeps the shape, and $K_i = J_i$ where it does not.
    The mask is that of a ReLU after the sum; it is one elsewhere. With k = 0 every block gets the head's gradient: a
    broadcast. After k steps the first k + 1 blocks from the top have their exact gradient, whatever $K_i$ is, so that
    with k = L - 1 and more the rule is backprop.

    The iteration and the split by gamma are the paper's. Ours: blocks that change the shape pass the gradient through
    whole, whereas the paper keeps all states in the widest shape; the mask; blocks run again when they learn.

    >>> HighwayBackprop(k=0).groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    k: NonNegativeInt = 4
    """Steps through the blocks: 0 uses only the skips, the number of blocks is backprop."""
    gamma: Fraction = 0.2
    """Share of the skip that counts to the branch: 0 all to the skip (ResNets), 0.2 for transformers with the norm
    first, 1 for blocks without a skip."""

    name: ClassVar[str] = "highway_backprop"
    locality: ClassVar[Locality] = "equilibrium"
    boundary: ClassVar[str] = "detached activation; cotangents back along the skips, and k times over a boundary"
    flat_memory: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = True
    runs_once: ClassVar[bool] = False
    whole_batch: ClassVar[str] = WHOLE_BATCH
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = (
        "Fagnou et al., arXiv 2501.17086 (2025); blocks that change the shape, mask of a ReLU: our reading"
    )
    restrictions: ClassVar[str] = (
        "Activations of all blocks are kept for the steps, and every block runs twice: on one device it is slower "
        "than backprop."
    )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message is the cotangents on the outputs of all blocks."""
        if not ctx.training:
            return ctx.x, None
        h, last = ctx.x, len(ctx.network.blocks)
        backs: list[Pullback | None] = []  # of blocks 1 to L - 1; None where it is not needed, to free its graph
        skips: list[Tensor | None] = []  # K of the same, as a factor; None if it is the whole Jacobian
        for index in range(last):
            if index == 0:
                h = ctx.run(index, h, None)
                continue
            out, back = ctx.linearize(index, h, None)
            keeps_shape = out.shape == h.shape
            skips.append((1 - self.gamma) * (out != 0).to(out.dtype) if keeps_shape else None)
            backs.append(None if keeps_shape and self.k == 0 else back)
            h = out
        _, top = through_head(ctx, h)
        branch: list[Tensor | None] = [None] * len(backs)
        w = _along_skips(top, branch, skips, backs)
        for _ in range(min(self.k, len(backs))):
            branch = [
                None if skip is None or back is None else back(above) - skip * above
                for skip, back, above in zip(skips, backs, w[1:], strict=True)
            ]
            w = _along_skips(top, branch, skips, backs)
        return ctx.x, w

    def signal(self, ctx: BlockContext) -> Signal:
        """The cotangent of the block's output."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        if ctx.message is None:
            return Signal()
        return Signal(cotangent=ctx.message[ctx.site.index].to(ctx.h.dtype), message=ctx.message)


def _along_skips(
    top: Tensor, branch: list[Tensor | None], skips: list[Tensor | None], backs: list[Pullback | None]
) -> list[Tensor]:
    """The cotangents on the outputs of all blocks, from the last one's down; the branches add theirs."""
    w = [top]
    for own, skip, back in zip(reversed(branch), reversed(skips), reversed(backs), strict=True):
        below = skip * w[-1] if skip is not None else back(w[-1]) if back is not None else w[-1]
        w.append(below if own is None else below + own)
    return w[::-1]
