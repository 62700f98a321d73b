"""Decoupled neural interfaces: a module per boundary predicts the gradient there, and learns from the next block's."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.layout import to_standard
from layerwise.core.ranges import NonNegativeInt, PositiveInt
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Classification, Task


class Synthesizer(nn.Module):
    """Predicts the gradient of a sample's loss on the activation at a boundary, in the standard order.

    Linear layers on vectors and tokens, 3x3 convolutions on maps; the label adds a learned vector before the first
    ReLU. The last layer starts at zero, so predictions start at zero. The layers work in units of the running
    root mean square of the gradients seen, which are far smaller than activations.

    Args:
        shape: of one sample's activation, `(C,)`, `(L, C)`, `(C, H, W)` or `(C, D, H, W)`.
        labels: number of classes; 0 if the label is not used.
        hidden: channels of the hidden layers.
        layers: number of them; 0 is one linear map, and a vector per class.
    """

    def __init__(self, shape: tuple[int, ...], labels: int, hidden: int, layers: int):
        super().__init__()
        self.maps = len(shape) > 2
        width = shape[0] if self.maps else shape[-1]
        sizes = [width, *[hidden] * layers, width]
        self.layers = nn.ModuleList(self._layer(len(shape), a, b) for a, b in pairwise(sizes))
        last = self.layers[-1]
        for tensor in last.parameters():
            nn.init.zeros_(tensor)
        self.of_class = nn.Parameter(torch.zeros(labels, sizes[1])) if labels else None
        self.register_buffer("running_square", torch.zeros(()))
        self.running_square: Tensor

    @staticmethod
    def _layer(dimensions: int, inputs: int, outputs: int) -> nn.Module:
        if dimensions < 3:
            return nn.Linear(inputs, outputs)
        convolution = nn.Conv2d if dimensions == 3 else nn.Conv3d
        return convolution(inputs, outputs, 3, padding=1)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """The gradient `(B, ...)`, of the shape of `h`, for labels `(B,)`, `(B, K)` or `(B, L)`."""
        first, *others = self.layers
        out = first(h)
        if self.of_class is not None:
            out = out + self._of_labels(y, out)
        for layer in others:
            out = layer(F.relu(out))
        return self.running_square.sqrt() * out

    def miss(self, h: Tensor, y: Tensor, true: Tensor) -> Tensor:
        """Mean squared error of the prediction, in units of the running mean square of `true`, which is updated."""
        with torch.no_grad():
            now, before = true.float().square().mean(), self.running_square
            self.running_square.copy_(torch.where(before == 0, now, 0.9 * before + 0.1 * now))
        return (self(h, y).float() - true.float()).square().mean() / self.running_square.clamp_min(1e-30)

    def _of_labels(self, y: Tensor, out: Tensor) -> Tensor:
        assert self.of_class is not None
        vectors = y.to(self.of_class) @ self.of_class if y.is_floating_point() else self.of_class[y.clamp_min(0)]
        if vectors.dim() == 3 and vectors.shape[:2] != out.shape[:2]:
            vectors = vectors.mean(1)  # labels of tokens that the activation does not have one by one
        if vectors.dim() == 2 and out.dim() > 2:
            places = (1,) * (out.dim() - 2)
            vectors = vectors.view(len(vectors), -1, *places) if self.maps else vectors.unsqueeze(1)
        return vectors


@dataclass(frozen=True)
class SyntheticGradient(Rule):
    r"""Decoupled neural interfaces: block i learns from a predicted gradient, as soon as it has run.

    A module $M_i$ at the boundary after block i predicts the gradient of the loss there from the activation and the
    label; block i uses the prediction as its cotangent. Block i + 1, which learns in the same way, gives the target of
    $M_i$:

    $$\hat g_i = M_i(h_i, y), \qquad
      g_i = \Big(\frac{\partial h_{i+1}}{\partial h_i}\Big)^\top \hat g_{i+1}, \qquad
      \min_{M_i} \mathbb{E}_{\text{samples}} \lVert M_i(h_i, y) - g_i \rVert^2$$

    At the last boundary $g_L$ is the true gradient of the head's loss. Gradients are those of one sample's loss. With
    modules that predict $g_i$ without error the rule is backprop.

    Modules, targets and the zero at the start are the paper's. Ours: the sizes of the modules, a label as a learned
    vector in the first layer, the same module for tokens.

    >>> SyntheticGradient().groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    hidden: PositiveInt = 256
    """Units, or channels, of a module's hidden layers."""
    layers: NonNegativeInt = 1
    """Hidden layers of a module; with 0 it is linear."""
    labels: bool = True
    """Whether the modules see the label (the conditioned form, cDNI)."""

    name: ClassVar[str] = "synthetic_gradient"
    locality: ClassVar[Locality] = "interlocking"
    boundary: ClassVar[str] = "detached activation; the next block's gradient on it, to the module that predicts it"
    flat_memory: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels", "language_model")
    only: ClassVar[str] = "its modules look at classes"
    source: ClassVar[str] = "Jaderberg et al., arXiv 1608.05343 (2017); sizes of the modules, tokens: our reading"
    restrictions: ClassVar[str] = (
        "Modules have to learn faster than the network: give them ten times its rate (`--lr-multipliers readouts "
        "10`), and the network batch norm. Gradients on large activations are hard to predict: expect a loss of "
        "accuracy with convolutions. Compiled blocks run backward twice."
    )

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The module of the boundary before this site, which the site's own gradient trains."""
        if site.index == 0:
            return None
        shape = site.standard_shape(site.index - 1)
        return Synthesizer(shape, task.classes if self.labels else 0, self.hidden, self.layers).to(h.dtype)

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message is the modules."""
        return ctx.x, dict(ctx.auxiliary)

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block so that it can be differentiated on its input."""
        if torch.is_grad_enabled() and message is not None and h.is_floating_point() and h.is_leaf:
            h.requires_grad_()
        return block(h)

    def signal(self, ctx: BlockContext) -> Signal:
        """The predicted cotangent of the block, and what trains the prediction before it."""
        index, samples = ctx.site.index, len(ctx.h)
        signal = loss_at_head(ctx) if ctx.site.is_head else Signal(message=ctx.message)
        if not ctx.training:
            return signal
        assert isinstance(ctx.task, Classification)
        y = ctx.y if ctx.y.is_floating_point() else ctx.task.aligned(ctx.y)
        if not ctx.site.is_head:
            with torch.no_grad():
                predicted = ctx.message[index + 1](ctx.site.standard(ctx.h), y)
            signal.cotangent = ctx.site.restored(predicted).to(ctx.h.dtype) / samples
        if ctx.auxiliary is None or not ctx.learns:
            return signal
        out = signal.loss if signal.loss is not None else ctx.h
        (true,) = torch.autograd.grad(out, ctx.h_in, signal.cotangent, retain_graph=True)
        layout = ctx.site.layout(index - 1)
        h, true = (t if layout is None else to_standard(t, layout) for t in (ctx.h_in.detach(), samples * true))
        assert isinstance(ctx.auxiliary, Synthesizer)
        miss = ctx.auxiliary.miss(h, y, true)
        metrics = {**signal.metrics, "unexplained": miss.detach()}
        return replace(signal, loss=miss if signal.loss is None else signal.loss + miss, metrics=metrics)
