"""Greedy self-supervised blocks: each learns to match two views of a sample among all other samples, without labels."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.core.augment import AUGMENTATIONS, check_augmentations
from layerwise.core.functional import matched, nt_xent
from layerwise.core.layout import from_standard, to_standard
from layerwise.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ProperFraction
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.label_input import known_layout
from layerwise.rules.readout import Pooling, check_several, grouped, pool_vectors


@dataclass(frozen=True)
class SSLLocal(Rule):
    r"""Self-supervised local learning: a contrastive loss per block, a linear probe on top.

    $v_1, v_2$ are two random views of each of the B samples, and travel through the network with it, as one batch. Each
    block has a projection head $g_i$ (two layers, ReLU between) and minimises

    $$L_i = \frac{1}{2B} \sum_{a} -\log \frac{\exp(\hat z_a \cdot \hat z_{a'} / \tau)}
      {\sum_{b \ne a} \exp(\hat z_a \cdot \hat z_b / \tau)}, \qquad
      z = g_i(\mathrm{pool}(h_i)), \qquad h_i = f_i(\mathrm{stopgrad}(h_{i-1}))$$

    where a and b are views, $\hat z$ has unit length and $a'$ is the other view of the sample of a. The network's head
    is a linear probe: it minimises the cross-entropy on the detached features of the samples themselves. Prediction is
    a plain forward pass.

    Views of images are made by the project's augmentations and Gaussian noise; in other inputs a share of
    the numbers is set to zero instead, and noise is added.

    Loss and projection head are SimCLR's; that blocks learn from losses of their own, without gradient between them, is
    Greedy InfoMax's. Ours: the two together, every block in each step, these views, and a probe that learns alongside
    the blocks.

    >>> SSLLocal().groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    temperature: PositiveFloat = 0.5
    """Temperature tau."""
    augment: tuple[str, ...] = ("cutout",)
    """Views of images: names among flip, crop, cutout; none if empty."""
    noise: NonNegativeFloat = 0.2
    """Standard deviation of the Gaussian noise on every view."""
    drop: ProperFraction = 0.2
    """Views of other inputs than images: share of the numbers that are set to zero."""
    hidden: PositiveInt = 256
    """Hidden units of the projection head."""
    dim: PositiveInt = 128
    """Outputs of the projection head."""
    pool: Pooling = "auto"
    """How a block's output becomes a vector: auto | mean | moments (and standard deviation) | grid | cls | flatten."""
    group: PositiveInt = 1
    """Neighbouring blocks that share one loss, one graph and one backward pass."""

    name: ClassVar[str] = "ssl_local"
    locality: ClassVar[Locality] = "local"
    whole_batch: ClassVar[str] = "compares the samples of a batch"
    boundary: ClassVar[str] = "detached activation, of every sample and two views of it"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels", "regression", "multilabel", "loss")
    only: ClassVar[str] = "its two views are of samples with one label each"
    begins_with_batch: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Chen et al., arXiv 2002.05709 (2020; SimCLR) for the loss, Loewe et al., arXiv 1905.11786 (2019) for isolated "
        "blocks; the two together, views, probe: our reading"
    )
    restrictions: ClassVar[str] = (
        "One label per sample, used by the head alone; inputs of real numbers, batches of two or more (their other "
        "samples are the negatives). A step also runs two views of every sample."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_augmentations(self.augment)

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each; the head, the only part that sees labels, is its own group."""
        return grouped(blocks, self.group, join_head=False)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The projection head at the end of every group of blocks."""
        if site.is_head or ((site.index + 1) % self.group and site.index < site.blocks - 1):
            return None
        width = pool_vectors(h, self.pool, False, site).shape[-1]
        layers = [nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.dim)]
        return nn.Sequential(*layers).to(h.dtype)

    def view(self, x: Tensor, layout: str | None = "BCHW") -> Tensor:
        """A random view of every sample `(B, ...)`; `layout` is that of images."""
        if x.dim() == 4 and min(to_standard(x, known_layout(layout)).shape[2:]) > 1:
            layout = known_layout(layout)
            x = to_standard(x, layout)
            for name in self.augment:
                x = AUGMENTATIONS[name](x, torch.default_generator)  # drawn on the host, like all augmentation
            x = from_standard(x, layout)
        else:
            x = x * (torch.rand_like(x) >= self.drop)
        return x + self.noise * torch.randn_like(x)

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """First views of all samples, second views, and the samples; only the samples in evaluation."""
        if ctx.task.per_position(ctx.y) or not ctx.x.is_floating_point():
            raise LayerwiseError(
                f"{self.name} makes views of samples of real numbers with one label each, not of inputs of shape "
                f"{tuple(ctx.x.shape)} and type {str(ctx.x.dtype).removeprefix('torch.')} with labels of shape "
                f"{tuple(ctx.y.shape)}; choose a rule such as local_ce."
            )
        if not ctx.training:
            return ctx.x, None
        layout = ctx.network.input_layout
        return torch.cat([self.view(ctx.x, layout), self.view(ctx.x, layout), ctx.x]), None

    def signal(self, ctx: BlockContext) -> Signal:
        """The contrast of the two views; at the head the cross-entropy of the probe, which gets only the samples."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        if not ctx.training:
            return Signal()
        check_several(self.name, ctx)
        views, itself = ctx.h[: 2 * len(ctx.y)], ctx.h[2 * len(ctx.y) :]
        signal = Signal(output=itself if ctx.site.index == ctx.site.blocks - 1 else None)
        if ctx.auxiliary is not None:
            z = ctx.auxiliary(pool_vectors(views, self.pool, False, ctx.site))
            signal.loss, signal.metrics = nt_xent(z, self.temperature), {"matched": matched(z.detach())}
        return signal
