"""AugLocal: auxiliary networks with the structure of later blocks, so that a block learns what these will need."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Unchanged
from layerwise.core.layout import from_standard, to_standard
from layerwise.core.pieces import ReadsOut
from layerwise.core.ranges import Fraction, PositiveInt
from layerwise.core.rule import BlockContext, Locality, Rule, Signal, Site, loss_at_head, loss_of
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.ahead import LooksAhead
from layerwise.rules.readout import Pooling, pool_vectors


class Adapter(nn.Module):
    """Maps one block's output to the input of another: averages over space, and maps the channels linearly.

    Args:
        given: shape of one sample of the output, in the standard order: `(D,)`, `(T, D)`, `(C, H, W)`, `(C, D, H, W)`.
        wanted: shape of one sample of the input, likewise.
        layouts: of the output and of the input; None is the standard order.
    """

    def __init__(
        self,
        given: tuple[int, ...],
        wanted: tuple[int, ...],
        layouts: tuple[str | None, str | None] = (None, None),
    ):
        super().__init__()
        self.size: Any = None
        self.layouts = layouts
        if given == wanted:
            self.map: nn.Module = nn.Identity()
        elif len(given) == len(wanted) >= 3:
            self.size = wanted[1:] if given[1:] != wanted[1:] else None
            convolve = nn.Conv3d if len(given) == 4 else nn.Conv2d
            self.map = convolve(given[0], wanted[0], 1, bias=False)
        elif given[:-1] == wanted[:-1]:
            self.map = nn.Linear(given[-1], wanted[-1], bias=False)
        else:
            raise LayerwiseError(
                f"auglocal cannot lead an output of shape {given} into a block that takes {wanted}; join the blocks "
                "between which the form changes."
            )

    def forward(self, h: Tensor) -> Tensor:
        """`(B, *wanted)` from `(B, *given)`."""
        come, want = self.layouts
        h = h if come is None else to_standard(h, come)
        if self.size is not None:
            h = F.adaptive_avg_pool3d(h, self.size) if h.dim() == 5 else F.adaptive_avg_pool2d(h, self.size)
        h = self.map(h)
        return h if want is None else from_standard(h, want)


class Copies(nn.Module):
    """Copies of later blocks with their own weights, applied one after the other to a site's output.

    Args:
        site: whose output is read.
        indices: of the blocks to copy, in order.
        h: a sample of the output.
    """

    def __init__(self, site: Site, indices: list[int], h: Tensor):
        super().__init__()
        assert site.network is not None
        layers, at = [], site.index
        for index in indices:
            shape, wanted = site.standard_shape(at), site.standard_shape(index - 1)
            layouts = site.layout(at), site.layout(index - 1)
            if shape != wanted or layouts[0] != layouts[1]:
                layers.append(Adapter(shape, wanted, layouts))
            layers.append(site.network.blocks[index].redrawn(h.device))
            at = index
        self.layers = nn.Sequential(*layers)
        self._unchanged = Unchanged(site.name)  # a copy may begin with an in-place operation
        self.last = site.layout(at)
        self.shape = site.standard_shape(at)
        """Shape of one sample of the output."""
        self.to(h.dtype)

    def run(self, h: Tensor) -> Tensor:
        """Output of the last copy, in the standard order."""
        out = self._unchanged(self.layers, h, self.training)
        return out if self.last is None else to_standard(out, self.last)


class AuxiliaryNetwork(Copies):
    """Copies of later blocks, and a linear classifier on their pooled output.

    Args:
        site: whose output is read.
        indices: of the blocks to copy, in order.
        h: a sample of the output.
        classes: number of classes K.
        pool: how the last copy's output becomes a vector.
    """

    def __init__(self, site: Site, indices: list[int], h: Tensor, classes: int, pool: Pooling):
        super().__init__(site, indices, h)
        self.pool: Pooling = pool
        shape = self.shape
        width = pool_vectors(h.new_empty(1, *shape), pool, per_position=False).shape[-1]
        self.classifier = nn.Linear(width, classes)
        # As in the paper's code, which is about maps.
        self.norm = nn.BatchNorm1d(width) if len(indices) == 1 and len(shape) >= 3 else nn.Identity()
        self.to(h.dtype)

    def logits(self, h: Tensor, per_position: bool) -> Tensor:
        """Logits `(B, ..., K)`."""
        return self.classifier(self.norm(pool_vectors(self.run(h), self.pool, per_position)))


@dataclass(frozen=True)
class AugLocal(LooksAhead, ReadsOut, Rule):
    r"""Augmented local learning: each block minimises the cross-entropy after copies of later blocks.

    $$L_l = \mathrm{CE}(a_l(h_l), y), \qquad h_l = f_l(\mathrm{stopgrad}(h_{l-1}))$$

    The auxiliary network $a_l$ of block l, out of L (counted from 0), is made of $d_l$ blocks of the kind and width of
    blocks that lie evenly between it and the end, with weights of their own,

    $$j_i = \mathrm{round}\Big(l + \frac{L - 1 - l}{d_l}\, i\Big), \; i = 1 .. d_l, \qquad
      d_l = \max\Big(1, \mathrm{round}\big(d\,(1 - \tfrac{\tau l}{K - 2}) + \tfrac{\tau l}{K - 2}\big)\Big)$$

    and a linear classifier on their pooled output. The last d blocks are trained together, through the network's head;
    with them there are K = L - d + 1 groups. Prediction is a plain forward pass.

    The objective, the choice of blocks and the depths are those of the paper and its code. Ours: K in the formula of
    the depths; copies are exact, so that where the width or the size of the maps differs, they are adapted by averaging
    and a linear map (the paper builds the block with the input that it gets); weights are drawn by `reset_parameters`.

    >>> AugLocal(depth=2).groups(blocks=4)
    [range(0, 1), range(1, 2), range(2, 5)]
    >>> AugLocal(depth=3).chosen(index=0, blocks=9)
    [3, 5, 8]
    """

    depth: PositiveInt = 2
    """Blocks d in the first block's auxiliary network, and at the end of the network, where they learn together."""
    taper: Fraction = 0.5
    """How much the depth falls towards the end: tau in [0, 1], 0 for the same depth everywhere, 1 down to one block."""
    pool: Pooling = "auto"
    """How the last copy's output becomes a vector: auto | mean | moments (and standard deviation) | grid | cls."""

    name: ClassVar[str] = "auglocal"
    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation"
    flat_memory: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = (
        *("classification", "soft_labels", "language_model", "regression", "multilabel", "loss"),
    )
    only: ClassVar[str] = "the copies of later blocks give one vector per sample or token, not one per pixel"
    source: ClassVar[str] = (
        "Ma, Wu, Si & Tan, arXiv 2402.17318 (2024) and its code; number of groups in the depths, and how inputs of "
        "copies are adapted: our reading"
    )
    restrictions: ClassVar[str] = (
        "Blocks must be chains of modules that can draw new weights (reset_parameters). The auxiliary networks "
        "cost up to d blocks for each block."
    )

    def groups(self, blocks: int) -> list[range]:
        """One group per block, except that the last `depth` blocks learn together with the head."""
        alone = max(blocks - self.depth, 0)
        return [range(i, i + 1) for i in range(alone)] + [range(alone, blocks + 1)]

    def chosen(self, index: int, blocks: int) -> list[int]:
        """Which blocks the auxiliary network of block `index` copies, out of `blocks`."""
        along = self.taper * index / max(blocks - self.depth - 1, 1)  # K - 2
        count = max(1, round(self.depth * (1 - along) + along))
        return [round(index + (blocks - 1 - index) / count * i) for i in range(1, count + 1)]

    def has_head(self, site: Site) -> bool:
        """Whether the site is a block that learns alone."""
        return site.index < site.blocks - self.depth

    def head(self, site: Site, h: Tensor, task: Task) -> nn.Module:
        """Copies of later blocks, and a classifier; if the rule looks ahead, the next block is copied already."""
        first = site.index + (1 if self.ahead == "none" else 2)
        chosen = [index for index in self.chosen(site.index, site.blocks) if index >= first]
        return AuxiliaryNetwork(site, chosen, h, task.outputs, self.pool)

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The logits after the copies."""
        _, h, auxiliary = self.ahead_of(site, h, auxiliary)
        assert isinstance(auxiliary, AuxiliaryNetwork)
        return auxiliary.logits(h, task.positions != "sample")

    def signal(self, ctx: BlockContext) -> Signal:
        """Cross-entropy after the copies, or of the network's head at the end."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        if ctx.auxiliary is None:
            return Signal()
        ctx = self.looking(ctx)
        assert isinstance(ctx.auxiliary, AuxiliaryNetwork)
        return loss_of(ctx.task, ctx.auxiliary.logits(ctx.h, ctx.task.per_position(ctx.y)), ctx.y)
