"""Heads that look ahead: a block is read through copies of the next block's first layer."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Unchanged
from layerwise.core.first_layer import first_layer
from layerwise.core.pieces import FollowsNextBlock
from layerwise.core.ranges import ProperFraction
from layerwise.core.rule import BlockContext, Rule, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError

Ahead = Literal["none", "learned", "momentum", "both"]


@dataclass(frozen=True, kw_only=True)
class LooksAhead(FollowsNextBlock, Rule):
    r"""A rule whose heads may read a block through the first layer of the block after it.

    With $f$ a copy of that layer that the block's own loss trains, and $\bar f$ one whose parameters are the moving
    average $\bar\theta \leftarrow m \bar\theta + (1 - m)\, \theta$ of the layer's own, the head reads $f(h)$
    (`ahead="learned"`), $\bar f(h)$ (`"momentum"`), or with a learned number s that starts at 1

    $$s\, f(h) + (2 - s)\, \bar f(h)$$

    (`"both"`) instead of the block's output h. Both copies start from the layer's weights. Each has its own running
    statistics of norms. If the next block is the head, or the block has no head of its own, nothing changes.
    """

    ahead: Ahead = "none"
    """Copy of the next block's first layer before a block's head: none | one of its own (learned) | a moving average of
    the next block's (momentum) | the sum of both, with a learned weight."""
    ahead_momentum: ProperFraction = 0.995
    """Share m of the moving average that stays in an update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead != "none":  # what the class declares holds for "none"
            object.__setattr__(self, "runs_once", False)
        if self.ahead in ("momentum", "both"):
            back = "the parameters of the next block's first layer, back, once per update"
            object.__setattr__(self, "boundary", f"{self.boundary}; {back}")

    @abstractmethod
    def has_head(self, site: Site) -> bool:
        """Whether the rule adds a head at a site."""

    @abstractmethod
    def head(self, site: Site, h: Tensor, task: Task) -> nn.Module:
        """The head that reads `h`, a sample of the site's output or of the copies' output."""

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The head of a site, after copies of the next block's first layer if the rule looks ahead."""
        if not self.has_head(site):
            return None
        if not self.begins_as_next(site):
            return self.head(site, h, task)
        looking = LookingAhead(self.ahead, site, h)
        looking.head = self.head(looking.site_of(site), looking.sample(h), task)
        return looking

    def begins_as_next(self, site: Site) -> bool:
        """Whether the head of a site holds copies."""
        return self.ahead != "none" and self.has_head(site) and site.index + 1 < site.blocks

    def followed(self, site: Site) -> list[str]:
        """The parameters of the next block's first layer, if there is a moving average."""
        if self.ahead not in ("momentum", "both") or not self.begins_as_next(site):
            return []
        assert site.network is not None
        return first_layer(site.network.blocks[site.index + 1]).parameter_names()

    def follow(self, auxiliary: nn.Module, tensors: list[Tensor]) -> None:
        """Move the average towards the next block's first layer."""
        assert isinstance(auxiliary, LookingAhead)
        auxiliary.follow(tensors, self.ahead_momentum)

    def ahead_of(self, site: Site, h: Tensor, auxiliary: nn.Module) -> tuple[Site, Tensor, nn.Module]:
        """The site, input and head to read with: the site's own, or those after the copies."""
        if not isinstance(auxiliary, LookingAhead):
            return site, h, auxiliary
        return auxiliary.site_of(site), auxiliary(h), auxiliary.head

    def looking(self, ctx: BlockContext) -> BlockContext:
        """The context in which the head reads the copies' output instead of the block's output."""
        if not isinstance(ctx.auxiliary, LookingAhead):
            return ctx
        site, h, head = self.ahead_of(ctx.site, ctx.h, ctx.auxiliary)
        return replace(ctx, site=site, h=h, auxiliary=head)


def head_of(auxiliary: nn.Module) -> nn.Module:
    """The head of a rule's module, without copies of the next block's layer before it."""
    return auxiliary.head if isinstance(auxiliary, LookingAhead) else auxiliary


class LookingAhead(nn.Module):
    """Copies of the next block's first layer, and the head that reads their outputs.

    Args:
        kind: which copies there are.
        site: whose output comes in.
        h: a sample of it.
    """

    head: nn.Module

    def __init__(self, kind: Ahead, site: Site, h: Tensor):
        super().__init__()
        assert site.network is not None
        layer = first_layer(site.network.blocks[site.index + 1])
        self.learned = layer.copied(h.device) if kind != "momentum" else None
        self.average = layer.copied(h.device).requires_grad_(False) if kind != "learned" else None
        self.scale = nn.Parameter(torch.ones((), device=h.device)) if kind == "both" else None
        self._unchanged = Unchanged(site.name)  # a copy may begin with an in-place operation
        if layer.whole:
            shape, self._layout = site.shapes[site.index + 1], site.layouts[site.index + 1]
        else:
            shape, self._layout = self._measured(site, h)
        self._shape = tuple(shape)

    def _measured(self, site: Site, h: Tensor) -> tuple[tuple[int, ...], str | None]:
        """Shape and layout of the copies' output, if they differ from a block's."""
        self.eval()
        with torch.no_grad():
            shape = tuple(self(h).shape[1:])
        self.train()
        of = [i for i in (site.index + 1, site.index) if len(site.shapes[i]) == len(shape)]
        if not of:
            raise LayerwiseError(
                f"the first layer of the block after {site.name!r} gives an output of shape {shape}, in which no head "
                "can tell the channels; cut the model after that layer, or leave ahead out."
            )
        return shape, site.layouts[of[0]]

    def site_of(self, site: Site) -> Site:
        """The site as the head sees it: with the shape and the layout of the copies' output."""
        i = site.index
        shapes = (*site.shapes[:i], self._shape, *site.shapes[i + 1 :])
        return replace(site, shapes=shapes, layouts=(*site.layouts[:i], self._layout, *site.layouts[i + 1 :]))

    def sample(self, h: Tensor) -> Tensor:
        """Zeros in the shape of the copies' output for the samples `h`."""
        return h.new_zeros(len(h), *self._shape)

    def forward(self, h: Tensor) -> Tensor:
        """The copies' output for a block's output."""
        copies = [copy for copy in (self.learned, self.average) if copy is not None]
        # Each reader gets its own graph node: the first run of a copy clones its input and later ones do not, and so
        # gradients are summed in the same order in both.
        read = [self._unchanged(copy, h.view_as(h), self.training) for copy in copies]
        return read[0] if self.scale is None else self.scale * read[0] + (2 - self.scale) * read[1]

    def follow(self, parameters: list[Tensor], momentum: float) -> None:
        """Move the average towards the parameters of the layer."""
        assert self.average is not None
        torch._foreach_lerp_(list(self.average.parameters()), parameters, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
