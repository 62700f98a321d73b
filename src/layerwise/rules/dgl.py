"""DGL: decoupled greedy learning, with auxiliary networks that are deep but cheap."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from layerwise.core.rule import ANY_TASK, BlockContext, Signal, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.ahead import LooksAhead
from layerwise.rules.local_ce import Greedy
from layerwise.rules.patches import ReadsPatches
from layerwise.rules.readout import Pooling, convolution, labels_at, pool_vectors
from layerwise.rules.windows import Windows, head_at

Kind = Literal["mlp_sr", "cnn", "mlp"]


def _mlp(inputs: int, width: int, layers: int, classes: int) -> list[nn.Module]:
    """`layers` hidden layers with batch norm and ReLU, and a linear layer onto the classes."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    return [*modules, nn.Linear(inputs, classes)]


def _convolutions(h: Tensor, kernel: int, count: int) -> list[nn.Module]:
    """`count` convolutions that keep the size of maps or volumes, with batch norm and ReLU."""
    channels, norm = h.shape[1], nn.BatchNorm3d if h.dim() == 5 else nn.BatchNorm2d
    modules: list[nn.Module] = []
    for _ in range(count):
        modules += [convolution(h)(channels, channels, kernel, padding=kernel // 2, bias=False)]
        modules += [norm(channels), nn.ReLU()]
    return modules


def auxiliary_network(h: Tensor, outputs: int, kind: Kind, pool: Pooling, per_pixel: bool = False) -> nn.Module:
    """The auxiliary network that reads a block's output.

    Args:
        h: a sample of the output, in the standard order.
        outputs: number of outputs K, such as classes.
        kind: for maps `(B, C, H, W)`, `"mlp_sr"` (averaged to a quarter of the side, three 1x1 convolutions, averaged
            to 2x2, three hidden layers of 4 C units), `"cnn"` (two 3x3 convolutions, averaged to 2x2, linear) or
            `"mlp"` (averaged to 2x2, three hidden layers of 4 C units). Other outputs get three hidden layers of their
            own width after the pooling, for every kind.
        pool: how tokens become a vector.
        per_pixel: whether there is a label per pixel. What follows the last convolution is then a 1x1 convolution onto
            the outputs; `"mlp"` has three 1x1 convolutions before it, and `"mlp_sr"` works on a quarter of the side.
    """
    if per_pixel and h.dim() >= 4:
        return _per_pixel(h, outputs, kind).to(h.dtype)
    if h.dim() < 4:
        width = pool_vectors(h, pool, per_position=False).shape[-1]
        return nn.Sequential(*_mlp(width, width, 3, outputs)).to(h.dtype)
    pooled = nn.AdaptiveAvgPool3d if h.dim() == 5 else nn.AdaptiveAvgPool2d
    square, width = [pooled(2), nn.Flatten()], 2 ** (h.dim() - 2) * h.shape[1]
    if kind == "cnn":
        layers = [*_convolutions(h, 3, 2), *square, nn.Linear(width, outputs)]
    else:
        quarter: Any = tuple(math.ceil(side / 4) for side in h.shape[2:])
        staged = [pooled(quarter), *_convolutions(h, 1, 3)] if kind == "mlp_sr" else []
        layers = [*staged, *square, *_mlp(width, width, 3, outputs)]
    return nn.Sequential(*layers).to(h.dtype)


def _per_pixel(h: Tensor, outputs: int, kind: Kind) -> nn.Module:
    """The auxiliary network with outputs `(B, K, H, W)`."""
    pooled = nn.AdaptiveAvgPool3d if h.dim() == 5 else nn.AdaptiveAvgPool2d
    quarter: Any = tuple(math.ceil(side / 4) for side in h.shape[2:])
    before = [pooled(quarter)] if kind == "mlp_sr" else []
    layers = _convolutions(h, 3, 2) if kind == "cnn" else _convolutions(h, 1, 3)
    return nn.Sequential(*before, *layers, convolution(h)(h.shape[1], outputs, 1))


@dataclass(frozen=True)
class DGL(Windows, LooksAhead, ReadsPatches, Greedy):
    r"""Decoupled greedy learning: each block minimises the cross-entropy of its own auxiliary network.

    $$L_i = \mathrm{CE}(a_i(h_i), \; y), \qquad h_i = f_i(\mathrm{stopgrad}(h_{i-1}))$$

    $a_i$ is deeper than a linear head, so that the block need not turn its features into the answer itself. The
    default, MLP-SR, works on a quarter of the side with 1x1 convolutions and a small MLP: about 5 % of the operations
    of the networks of the paper. The last block is trained through the network's head. All blocks learn from every
    batch, as in the paper's synchronous form. The asynchronous one, with buffers between blocks, is not implemented.

    The paper's: the objective and the three auxiliary networks. Ours: blocks that are not convolutions get an MLP
    of their own width, for which tokens are averaged.

    >>> DGL(network="cnn").groups(blocks=3)
    [range(0, 1), range(1, 2), range(2, 4)]
    """

    network: Kind = "mlp_sr"
    """Auxiliary network after a convolution: mlp_sr | cnn | mlp; other blocks have an MLP."""

    name: ClassVar[str] = "dgl"
    tasks: ClassVar[tuple[str, ...]] = tuple(kind for kind in ANY_TASK if kind != "language_model")
    only: ClassVar[str] = "its auxiliary networks read one label per sample or per pixel"
    unlabelled: ClassVar[bool] = False  # the auxiliary network's batch norm sees all samples
    source: ClassVar[str] = (
        "Belilovsky, Eickenberg & Oyallon, arXiv 1901.08164 (2019); blocks that are not convolutions: our reading"
    )
    restrictions: ClassVar[str] = (
        "One label per sample, batches of two or more (batch norm). Synchronous: no buffers between the blocks."
    )

    def head(self, site: Site, h: Tensor, task: Task) -> nn.Module:
        """The auxiliary network, or two of them."""
        per_pixel = task.positions == "pixel"

        def made(site: Site, h: Tensor) -> nn.Module:
            return auxiliary_network(site.standard(h), task.outputs, self.network, self.pool, per_pixel)

        return self.heads(site, self.patched(site, h), made)

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The outputs of the auxiliary network."""
        site, h, auxiliary = self.ahead_of(site, h, auxiliary)
        return self.averaged(self._outputs(site, self.patched(site, h), head_at(auxiliary), task), len(h))

    def _outputs(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        standard = site.standard(h)
        return super().outputs_at(site, h, auxiliary, task) if standard.dim() < 4 else auxiliary(standard)

    def signal(self, ctx: BlockContext) -> Signal:
        """Cross-entropy of the auxiliary network, or of the network's head at the end."""
        if ctx.task.per_position(ctx.y) and ctx.task.positions != "pixel":
            raise LayerwiseError("dgl's auxiliary networks read one label per sample, not one per position.")
        return self.read_heads(self.looking(ctx), self._read)

    def _read(self, ctx: BlockContext) -> Signal:
        if ctx.site.is_head or ctx.auxiliary is None:
            return super().signal(ctx)
        if self.patches == 1 and ctx.site.standard(ctx.h).dim() < 4:
            return super().signal(ctx)
        cut = self.in_patches(ctx)
        outputs = self._outputs(cut.site, cut.h, ctx.auxiliary, ctx.task)
        return self.loss_of_head(ctx, outputs, labels_at(cut, ctx.task.outputs_last(outputs)))
