"""LoPT: fine-tuning whose lower modules reconstruct their input, and whose last one learns the task."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.functional import wide
from layerwise.core.layout import to_standard
from layerwise.core.ranges import NonNegativeFloat, PositiveFraction, PositiveInt
from layerwise.core.rule import ANY_TASK, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Task
from layerwise.rules.readout import in_modules


class Reconstruction(nn.Module):
    """Maps a module's output back to its input, through a narrow layer: norm, linear, GELU, linear.

    Args:
        given: width of the module's output.
        wanted: width of its input, which is reconstructed.
        bottleneck: width of the narrow layer, as a share of `given`.
    """

    def __init__(self, given: int, wanted: int, bottleneck: float):
        super().__init__()
        narrow = max(1, round(given * bottleneck))
        self.layers = nn.Sequential(nn.LayerNorm(given), nn.Linear(given, narrow), nn.GELU(), nn.Linear(narrow, wanted))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, gain=0.1)
                nn.init.zeros_(layer.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """`(..., wanted)` from `(..., given)`."""
        return self.layers(vectors)


def as_vectors(h: Tensor) -> Tensor:
    """An output in the standard order with its channels last: `(B, D)`, `(B, T, D)`, `(B, H, W, C)`."""
    return h.movedim(1, -1) if h.dim() >= 4 else h


def brought_to(target: Tensor, like: Tensor) -> Tensor:
    """A target with the positions of `like`, both in the standard order: averaged over the cells of maps, or over all.

    >>> import torch
    >>> brought_to(torch.ones(2, 3, 8, 8), torch.ones(2, 5, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    >>> brought_to(torch.ones(2, 3, 8, 8), torch.ones(2, 5)).shape
    torch.Size([2, 3])
    """
    if target.dim() == like.dim() == 4:
        return F.adaptive_avg_pool2d(target, like.shape[2:])  # pyright: ignore[reportArgumentType]
    if target.dim() == like.dim() == 5:
        return F.adaptive_avg_pool3d(target, like.shape[2:])  # pyright: ignore[reportArgumentType]
    if target.dim() == like.dim() and target.shape[1:-1] == like.shape[1:-1]:
        return target
    return target.flatten(2).mean(2) if target.dim() >= 4 else target.mean(1) if target.dim() == 3 else target


def averaged(h: Tensor) -> Tensor:
    """Vectors `(B, ..., D)` averaged over their positions."""
    return h.flatten(1, -2).mean(1) if h.dim() > 2 else h


@dataclass(frozen=True)
class Halves(Rule):
    """Base of `lopt` and `freeze_lower`: contiguous modules, of which the last learns the task with the head."""

    modules: PositiveInt = 2
    """Nearly equal parts of the network, the first ones longer; the last one learns the task."""

    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation"
    flat_memory: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK

    def groups(self, blocks: int) -> list[range]:
        """The modules; the head joins the last."""
        return in_modules(blocks, self.modules)

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss at the head."""
        return loss_at_head(ctx) if ctx.site.is_head else Signal()


@dataclass(frozen=True)
class LoPT(Halves):
    r"""LoPT: the lower modules reconstruct their own input, the last one learns the task.

    With module m of M, its input $h_{m-1}$ and its output $h_m = f_m(\mathrm{stopgrad}(h_{m-1}))$:

    $$L_m = \frac{\lambda}{M - 1} \, \mathrm{mean}\big(\mathrm{dec}_m(h_m) - \mathrm{stopgrad}(h_{m-1})\big)^2, \quad
      m < M, \qquad L_M = \mathrm{loss}(f_{out}(h_M), y)$$

    $\mathrm{dec}_m$ is a norm, a linear layer to `bottleneck` of the width, GELU, and a linear layer back. The loss
    keeps a pretrained module near what it was, and only the last one learns the task. For the first module, whose
    input may be tokens, $h_0$ is the output of its first block: cut after the embedding, which then is a block of its
    own, for the paper's target. It gets a gradient only through $h_1$.

    The objective, the decoder, its start, and the weight are those of the paper's code, which makes one backward pass
    of the sum. Ours: each module has its own pass; a target whose positions differ from the output's is averaged.

    >>> LoPT().groups(blocks=5)
    [range(0, 3), range(3, 6)]
    """

    bottleneck: PositiveFraction = 0.25
    """Width of the decoder's inner layer, as a share of the module's output."""
    weight: NonNegativeFloat = 10.0
    """Weight lambda of the mean of the reconstructions; 0 leaves the lower modules as they are."""

    name: ClassVar[str] = "lopt"
    reads_logits: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = False
    """Reconstructions use every sample, so they would be weighted differently from the task's loss."""
    source: ClassVar[str] = (
        "Shi et al., arXiv 2605.04913 (2026) and its code; separate backward passes, other shapes: our reading"
    )
    restrictions: ClassVar[str] = (
        "For fine-tuning: the lower modules learn nothing of the task. A module holds the activations of its blocks. "
        "Every sample needs a label."
    )

    def _ends(self, site: Site) -> range | None:
        """The module that ends at a site, if it reconstructs."""
        *lower, _ = self.groups(site.blocks)
        return next((module for module in lower if module.stop == site.index + 1), None)

    def trains(self, site: Site) -> bool:
        """All, unless the weight of the reconstructions is 0."""
        return self.weight > 0 or site.index in self.groups(site.blocks)[-1]

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The decoder of every module but the last."""
        module = self._ends(site)
        if module is None or self.weight == 0:
            return None
        shape = site.standard_shape(self._source(module))
        wanted = shape[0] if len(shape) >= 3 else shape[len(shape) - 1]
        given = as_vectors(site.standard(h)).shape[-1]
        return Reconstruction(given, wanted, self.bottleneck).to(h.dtype)

    def signal(self, ctx: BlockContext) -> Signal:
        """The module's reconstruction, if it ends here, or the task's loss at the head."""
        site, module = ctx.site, next(m for m in self.groups(ctx.site.blocks) if ctx.site.index in m)
        if site.is_head:
            return loss_at_head(ctx)
        target: Any = ctx.message
        if site.index == module.start and module.stop <= site.blocks and self.weight > 0:
            target = ctx.h.detach() if site.index == 0 else ctx.h_in
        if not isinstance(ctx.auxiliary, Reconstruction):
            return Signal(message=target if site.index + 1 < module.stop else None)
        layout = site.layout(self._source(module))
        target = target if layout is None else to_standard(target, layout)
        h = site.standard(ctx.h)
        target, found = as_vectors(brought_to(target, h)), as_vectors(h)
        if target.dim() != found.dim() or target.shape[:-1] != found.shape[:-1]:
            target, found = averaged(target), averaged(found)
        # Not F.mse_loss, whose scalar keeps the storage of all differences alive with the metrics.
        distance = (wide(ctx.auxiliary(found)) - wide(target)).square().mean()
        share = self.weight / (len(self.groups(site.blocks)) - 1)
        return Signal(loss=share * distance, metrics={"reconstruction": distance})

    def _source(self, module: range) -> int:
        """The site whose output a module reconstructs."""
        return max(module.start - 1, 0)


@dataclass(frozen=True)
class FreezeLower(Halves):
    """A control: all modules but the last are frozen; backpropagation through the last.

    What fine-tuning by any rule for the lower layers has to beat: it costs them nothing but a forward pass.

    >>> FreezeLower().groups(blocks=6)
    [range(0, 3), range(3, 7)]
    """

    name: ClassVar[str] = "freeze_lower"
    source: ClassVar[str] = "the usual baseline of fine-tuning: only the upper layers are trained"
    restrictions: ClassVar[str] = "A control: for a pretrained network, whose lower modules do not learn."

    def trains(self, site: Site) -> bool:
        """The last module and the head."""
        return site.index in self.groups(site.blocks)[-1]
