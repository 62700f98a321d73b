"""Counter-Current Learning: blocks learn to agree with a second network that runs from the labels to the input."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.functional import wide
from layerwise.core.ranges import NonNegativeFloat, PositiveFloat
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError


class Feedback(nn.Module):
    """A layer of the feedback network: from the shape of a later block's output to that of an earlier one's.

    Between maps it is nearest up-sampling and a 3x3 convolution. Between vectors, or equally many tokens, it is a
    linear layer on the last dimension. Otherwise it is a linear layer on the flattened sample. ELU follows.

    Args:
        later: shape of one sample of the later output in the standard order, `(K,)` for the labels.
        earlier: shape of one sample of the earlier output, likewise.
    """

    def __init__(self, later: tuple[int, ...], earlier: tuple[int, ...]):
        super().__init__()
        self.shape = earlier
        if len(later) == len(earlier) >= 3:
            convolve = nn.Conv3d if len(later) == 4 else nn.Conv2d
            self.layer = nn.Sequential(
                nn.Upsample(earlier[1:]), convolve(later[0], earlier[0], 3, padding=1, bias=False)
            )
        elif later[:-1] == earlier[:-1]:
            self.layer = nn.Linear(later[-1], earlier[-1], bias=False)
        else:
            self.layer = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(later), math.prod(earlier), bias=False))

    def forward(self, b: Tensor) -> Tensor:
        """Feedback activations `(K, *earlier)` from `(K, *later)`."""
        return F.elu(self.layer(b)).view(-1, *self.shape)


@dataclass(frozen=True)
class CounterCurrent(Rule):
    r"""Counter-Current Learning: forward and feedback activations of one level are made to agree, pair by pair.

    A feedback network with weights of its own starts from the one-hot vectors of all K classes:

    $$b_L = g_L(I_K), \qquad b_{l} = g_{l}(\mathrm{stopgrad}(b_{l+1})), \qquad a_l = f_l(\mathrm{stopgrad}(a_{l-1}))$$

    $$L_l = \frac{256\, s}{D_l} \, \mathrm{mean}\big(A_l B_l^\top - e_y\big)^2$$

    with the rows $A_l$ (a sample each) and $B_l$ (a class each) of $a_l, b_l$, and $s$ = `scale`. Maps have

    $$L_l = \mathrm{mean}(\hat A \hat B^\top - e_y)^2 + \tfrac12\, \mathrm{mean}(\hat A \hat A^\top - I)^2
          + \tfrac12\, \mathrm{mean}(\hat B \hat B^\top - I)^2$$

    on rows of unit length, against collapse; tokens have only the first term. The loss of a level trains only $f_l$ and
    the $g_l$ that made $b_l$: activations cross upwards and downwards, errors do not. The head minimises
    its cross-entropy on the detached last activation. Prediction is a plain forward pass.

    The objective and the two losses are those of the paper's code. Ours: the feedback is computed again for each block,
    from the labels down, so that no level has to be kept; tokens; no level for the input itself (its feedback layer
    feeds nothing); no mask of confident samples; the network's own activations and biases.

    >>> CounterCurrent().groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    scale: PositiveFloat = 0.5
    """Factor s of the loss after fully connected layers."""
    decorrelation: NonNegativeFloat = 0.5
    """Weight of the two decorrelation terms after convolutions."""

    name: ClassVar[str] = "counter_current"
    locality: ClassVar[Locality] = "broadcast"
    boundary: ClassVar[str] = "detached activation upwards; detached feedback activations of the K classes downwards"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    only: ClassVar[str] = "its feedback begins with a class per sample"
    source: ClassVar[str] = (
        "Kao & Hariharan, arXiv 2409.19841 (2024); feedback computed again for each block, tokens, activations: our "
        "reading"
    )
    restrictions: ClassVar[str] = (
        "One label per sample. The feedback costs L (L + 1) / 2 layers on K rows per step for L blocks."
    )

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The feedback layer that ends at this block's output."""
        if site.is_head:
            return None
        later = (task.classes,) if site.index == site.blocks - 1 else site.standard_shape(site.index + 1)
        return Feedback(later, tuple(site.standard(h).shape[1:])).to(h.dtype)

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message is the feedback network."""
        if ctx.y.dim() > 1:
            raise LayerwiseError(
                "counter_current compares samples with classes: one label per sample, not per position."
            )
        return ctx.x, dict(ctx.auxiliary)

    def feedback(self, network: Mapping[int, nn.Module], level: int, classes: int) -> Tensor:
        """Feedback activations `(K, ...)` of a level; only the layer that ends there keeps a graph."""
        like = next(network[level].parameters())
        b = torch.eye(classes, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            for index in range(max(network), level, -1):
                b = network[index](b)
        return network[level](b)

    def signal(self, ctx: BlockContext) -> Signal:
        """Agreement of the block's activations with the feedback of the samples' classes."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        b = self.feedback(ctx.message, ctx.site.index, ctx.task.classes)
        h = ctx.site.standard(ctx.h)
        rows, classes = wide(h).flatten(1), wide(b).flatten(1)
        own = F.one_hot(ctx.y, ctx.task.classes).float()
        if h.dim() == 2:
            scores = rows @ classes.T
            loss = 256 * self.scale / rows.shape[1] * (scores - own).square().mean()
        else:
            rows, classes = F.normalize(rows, dim=1), F.normalize(classes, dim=1)
            scores = rows @ classes.T
            loss = (scores - own).square().mean()
            for same in (rows, classes) if h.dim() >= 4 else ():
                identity = torch.eye(len(same), dtype=same.dtype, device=same.device)
                loss = loss + self.decorrelation * (same @ same.T - identity).square().mean()
        accuracy = ctx.task.correct(scores, ctx.y) / ctx.y.numel()
        return Signal(loss=loss, message=ctx.message, metrics={"accuracy": accuracy})
