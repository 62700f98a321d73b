"""Windows: a block also learns from the losses of heads some blocks ahead."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from layerwise.core.ranges import NonNegativeInt, PositiveInt
from layerwise.core.rule import BlockContext, Rule, Signal, Site
from layerwise.errors import LayerwiseError
from layerwise.rules.readout import grouped

Make = Callable[[Site, Tensor], nn.Module]


@dataclass(frozen=True)
class Windows(Rule):
    r"""A rule whose groups of blocks may have a view of the `overlap` blocks after them.

    A window is a group and its view. A head at its end learns in the turn of the group that it reads. Its
    loss trains every group that sees it: gradients cross up to `overlap` boundaries. With `own`, each group also has a
    head at its own output, whose loss trains only that group.
    """

    group: PositiveInt = 1
    """Neighbouring blocks that share one loss, one graph and one backward pass."""
    overlap: NonNegativeInt = field(default=0, kw_only=True)
    """Later blocks between a group and the head at the end of its window; gradients cross that many boundaries."""
    own: bool = field(default=False, kw_only=True)
    """Whether each group has a head at its own output, in addition to those of the windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        says_interlocking(self, self.overlap, self.own)

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each, with a view of `overlap` more; the head belongs to the last group."""
        return grouped(blocks, self.group, join_head=True, overlap=self.overlap)

    def window_ends(self, site: Site) -> bool:
        """Whether the view of a group ends at a site, and not at the network's head."""
        return any(view.stop == site.index + 1 for view in self.groups(site.blocks)) and not site.is_head

    def group_ends(self, site: Site) -> bool:
        """Whether a group other than the last ends at a site."""
        return any(view.start == site.index + 1 for view in self.groups(site.blocks))

    def has_head(self, site: Site) -> bool:
        """Whether a window ends at the site, or, with `own`, a group."""
        return self.window_ends(site) or (self.own and self.group_ends(site))

    def heads(self, site: Site, h: Tensor, make: Make) -> nn.Module:
        """The head of a site, or both."""
        if not self.own:
            return make(site, h)
        own = make(site, h) if self.group_ends(site) else None
        return WindowHeads(own, make(site, h) if self.window_ends(site) else None)

    def read_heads(self, ctx: BlockContext, read: Callable[[BlockContext], Signal]) -> Signal:
        """The signals of the heads of a site, summed; if the site lends its graph, only that of the window's."""
        if not isinstance(ctx.auxiliary, WindowHeads):
            return read(ctx)
        lent = ctx.site.index >= ctx.view.start + self.group
        found = {"window": ctx.auxiliary.window, "own": None if lent else ctx.auxiliary.own}
        signals = {name: read(replace(ctx, auxiliary=head)) for name, head in found.items() if head is not None}
        if len(signals) < 2:
            return next(iter(signals.values()), Signal())
        signal, own = signals["window"], signals["own"]
        assert signal.loss is not None
        assert own.loss is not None
        metrics = {"loss": signal.loss, **signal.metrics, "own_loss": own.loss}
        return replace(signal, loss=signal.loss + own.loss, metrics=metrics)


class WindowHeads(nn.Module):
    """Two heads of one site: of the group that ends there, and of a window."""

    def __init__(self, own: nn.Module | None, window: nn.Module | None):
        super().__init__()
        self.own, self.window = own, window


def head_at(auxiliary: nn.Module) -> nn.Module:
    """The head that predicts at a site: the window's, if there is one."""
    if not isinstance(auxiliary, WindowHeads):
        return auxiliary
    found = auxiliary.own if auxiliary.window is None else auxiliary.window
    assert found is not None
    return found


def says_interlocking(rule: Rule, overlap: int, own: bool) -> None:
    """Declare that a rule's gradients cross `overlap` boundaries; what its class declares holds for 0.

    Raises:
        LayerwiseError: `own` is set without an overlap.
    """
    if own and not overlap:
        raise LayerwiseError(
            f"{rule.name}'s own=true reads a group's own output besides the end of its window, and with overlap=0 "
            "both are one; give overlap=1 or more, or leave own out."
        )
    if overlap > 0:
        object.__setattr__(rule, "locality", "interlocking")
        object.__setattr__(rule, "boundary", f"{rule.boundary}; gradients back over {overlap} boundaries")
