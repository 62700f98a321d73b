"""Scalable Forward-Forward: the goodness of a class is the activity of its own auxiliary channel."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.functional import normalise, wide
from layerwise.core.pieces import PredictsBySite
from layerwise.core.ranges import NonNegativeFloat, PositiveInt
from layerwise.core.rule import BlockContext, Locality, Rule, Signal, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.readout import convolution


def channel_norm(h: Tensor) -> Tensor:
    """Zero mean and unit variance over the channels, at every place of `(B, C, H, W)`, `(B, T, D)` or `(B, D)`."""
    return normalise(h.movedim(1, -1), "layer").movedim(-1, 1) if h.dim() >= 4 else normalise(h, "layer")


class ChannelGoodness(nn.Module):
    """One auxiliary channel per class, and how active each is.

    Args:
        h: a sample of the block's output, in the standard order.
        classes: number of classes K.
        kernel: side of the convolution after a convolutional block; other outputs get a linear layer.
    """

    def __init__(self, h: Tensor, classes: int, kernel: int):
        super().__init__()
        if h.dim() >= 4:
            self.channels: nn.Module = convolution(h)(h.shape[1], classes, kernel, padding=kernel // 2)
        else:
            self.channels = nn.Linear(h.shape[-1], classes)
        self.to(h.dtype)

    def forward(self, h: Tensor) -> Tensor:
        """Mean square of every class's channel over the places of the normalised `h`: `(B, K)`, in float32."""
        a = wide(self.channels(channel_norm(h))).square()
        return a.flatten(2).mean(2) if a.dim() >= 4 else a.mean(1) if a.dim() == 3 else a


@dataclass(frozen=True)
class ScalableFF(PredictsBySite, Rule):
    r"""Scalable Forward-Forward: one pass, the true class's channel positive and all others negative.

    With an auxiliary convolution of K channels, $A_i = \mathrm{conv}_i(\mathrm{LN}(h_i))$:

    $$g_{ic} = \mathrm{mean}_{\text{places}} A_{ic}^2, \qquad
      L_i = \log\Big(1 + \sum_{c \ne y} e^{g_{ic} - g_{iy} + m}\Big), \qquad
      h_i = f_i(\mathrm{stopgrad}(\mathrm{LN}(h_{i-1})))$$

    The channels are for the loss only and are not passed on. A block may be a single convolution, or a residual block
    with ordinary backpropagation inside (the hybrid form): that is a matter of where the model is cut. The prediction
    is the class of the largest goodness, averaged over the blocks or of the last one; the network's head is not used.

    The goodness of auxiliary channels, the normalisation between blocks, and both predictors are the author's. The
    form of the loss, which is only named "log-sum-exp margin" there, is our reading; with m = 0 it is the cross-entropy
    on g. So is the treatment of outputs that are not maps: tokens are places, and a vector is
    one place.

    >>> ScalableFF(margin=0.5).groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    margin: NonNegativeFloat = 0.0
    """Margin m by which the true class's goodness should exceed the others."""
    kernel: PositiveInt = 1
    """Side of the auxiliary convolution, an odd number: 1, or a bit larger, such as 5."""
    predictor: Literal["mean", "last"] = "mean"
    """Whose goodness decides: the mean over all blocks, or the last block's."""

    name: ClassVar[str] = "scalable_ff"
    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation, normalised over its channels"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    only: ClassVar[str] = "its channels are shared out among classes"
    source: ClassVar[str] = "Krutsylo, arXiv 2501.03176 (2025); form of the margin loss: our reading"
    restrictions: ClassVar[str] = "One label per sample. The network's head is not used; its output means nothing."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise LayerwiseError(f"kernel is {self.kernel}; it must be odd, so that the convolution has a centre.")

    def trains(self, site: Site) -> bool:
        """All blocks; the head is not used."""
        return not site.is_head

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The channels of every block."""
        return None if site.is_head else ChannelGoodness(site.standard(h), task.classes, self.kernel)

    def signal(self, ctx: BlockContext) -> Signal:
        """The margin loss of the block's goodness; passes on that of all blocks so far, for the metrics."""
        if ctx.y.dim() > 1:
            raise LayerwiseError("scalable_ff has one goodness per class and sample, not one per position.")
        if ctx.site.is_head:
            votes = ctx.message / ctx.site.blocks if self.predictor == "mean" else ctx.message
            accuracy = ctx.task.correct(votes, ctx.y) / ctx.y.numel()
            return Signal(metrics={"loss": self.margin_loss(votes, ctx.y, ctx.task), "accuracy": accuracy})
        assert ctx.auxiliary is not None
        h = ctx.site.standard(ctx.h)
        g = ctx.auxiliary(h)
        carried = ctx.message + g if self.predictor == "mean" and ctx.message is not None else g
        accuracy = ctx.task.correct(g, ctx.y) / ctx.y.numel()
        loss = self.margin_loss(g, ctx.y, ctx.task)
        return Signal(loss, message=carried, output=ctx.site.restored(channel_norm(h)), metrics={"accuracy": accuracy})

    def margin_loss(self, g: Tensor, y: Tensor, task: Task) -> Tensor:
        """Mean of log(1 + sum over the other classes of exp(g_c - g_y + m)), for `g` `(B, K)`."""
        return task.loss(g - self.margin * F.one_hot(y, task.classes), y)

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Goodness of every class, averaged over the blocks or of the last one: `(B, K)`."""
        if site.is_head:
            return message, None
        assert auxiliary is not None
        h = site.standard(h)
        g = auxiliary(h)
        if self.predictor == "mean":
            g = g / site.blocks if message is None else message + g / site.blocks
        return site.restored(channel_norm(h)), g
