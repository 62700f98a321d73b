"""Readouts of patches: a head reads the patches of a map one by one, and its outputs are averaged."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.core.chunked import LinearOutputs
from layerwise.core.ranges import PositiveInt
from layerwise.core.rule import BlockContext, Rule, Signal, Site, loss_of, metrics_of
from layerwise.errors import LayerwiseError


@dataclass(frozen=True, kw_only=True)
class ReadsPatches(Rule):
    r"""A rule whose heads may read a map patch by patch.

    With n x n patches $p$ of a block's output, all read by one head a,

    $$L = \frac{1}{n^2} \sum_p L(a(h_p), y), \qquad z = \frac{1}{n^2} \sum_p a(h_p)$$

    where z is what the head predicts. Patches have equal sizes: if a side is not a multiple of n, they overlap.
    """

    patches: PositiveInt = 1
    """Patches n per side of a map, each of which a block's head reads by itself; 1 for the whole map."""

    def patched(self, site: Site, h: Tensor) -> Tensor:
        """The patches of a site's output, one after the other along the batch; the output itself if it is not cut.

        Raises:
            LayerwiseError: the output is not a map.
        """
        return h if self.patches == 1 else site.restored(patches_of(site.standard(h), self.patches, site.name))

    def averaged(self, outputs: Tensor, samples: int) -> Tensor:
        """The mean of outputs over the patches of each sample."""
        return outputs if self.patches == 1 else outputs.unflatten(0, (-1, samples)).mean(0)

    def in_patches(self, ctx: BlockContext) -> BlockContext:
        """The context of the patches, each with the label of its sample.

        Raises:
            LayerwiseError: the output is not a map, or labels are given per position.
        """
        if self.patches == 1:
            return ctx
        if ctx.task.positions != "sample":
            raise LayerwiseError(
                f"patches={self.patches} reads one label per sample, and {ctx.task.kind} has one per "
                f"{ctx.task.positions}; leave patches out."
            )
        h = self.patched(ctx.site, ctx.h)
        return replace(ctx, h=h, y=torch.cat([ctx.y] * (len(h) // len(ctx.h))))

    def loss_of_head(self, ctx: BlockContext, outputs: Tensor | LinearOutputs, y: Tensor) -> Signal:
        """The signal of a head on patches: the loss over all of them, the metrics of their mean.

        Args:
            ctx: of the whole output.
            outputs: of the head, for each patch.
            y: the labels of the patches.
        """
        if self.patches == 1 or isinstance(outputs, LinearOutputs):
            return loss_of(ctx.task, outputs, y)
        loss = ctx.task.loss(outputs, y)
        metrics, statistics = metrics_of(ctx.task, self.averaged(outputs, len(ctx.y)), ctx.y)
        return Signal(loss=loss, metrics={"loss": loss, **metrics}, statistics=statistics)


def patches_of(h: Tensor, count: int, name: str = "") -> Tensor:
    """The patches of maps `(B, C, H, W)`, `(n n B, C, h, w)`, or of volumes; those of one sample lie B apart.

    Raises:
        LayerwiseError: these are not maps, or a side is shorter than the number of patches.

    >>> patches_of(torch.arange(16).view(1, 1, 4, 4), 2)[1].tolist()
    [[[2, 3], [6, 7]]]
    """
    if h.dim() < 4 or min(h.shape[2:]) < count:
        raise LayerwiseError(
            f"patches={count} cuts maps (B, C, H, W), and block {name!r} gives an output of shape (B, "
            f"{', '.join(map(str, h.shape[1:]))}); leave patches out, or cut the model where the maps are larger."
        )
    parts = [h]
    for dimension in range(2, h.dim()):
        side = h.shape[dimension]
        length = -(-side // count)
        starts = [(side - length) * i // max(count - 1, 1) for i in range(count)]
        parts = [part.narrow(dimension, start, length) for part in parts for start in starts]
    return torch.cat(parts)
