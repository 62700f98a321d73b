"""Reversible vision transformer: the backward pass computes each block's input from its output."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.core.once import once_differentiable
from layerwise.errors import LayerwiseError
from layerwise.models.base import named
from layerwise.models.vit import PatchTransformer


@dataclass(frozen=True)
class Reversible(PatchTransformer):
    r"""Reversible vision transformer: two streams of tokens, of which every block changes one and then the other.

    $$y_1 = x_1 + F(x_2), \qquad y_2 = x_2 + G(y_1)$$

    with attention for F and an MLP for G, both pre-norm. A block keeps nothing for the backward pass: it computes its
    input from its output, $x_2 = y_2 - G(y_1)$, $x_1 = y_1 - F(x_2)$, and runs F and G once more. A row of neighbouring
    blocks keeps only the last output, so that activations do not grow with the depth under `backprop`; gradients of
    parameters do. Gradients are those of plain autograd up to the rounding of the inverse.

    The first block begins with the stem: patch embedding, class token (with `pool="cls"` only), learned positions. Both
    streams start as its tokens. Hidden activations are (B, tokens, 2 width); the head reads both streams.

    Source: Gomez et al. 2017, https://arxiv.org/abs/1707.04585 (reversible blocks); Mangalam et al. 2022,
    https://arxiv.org/abs/2302.04869 (vision transformer), without their fusion layers.

    Example:
        >>> model = Reversible(depth=2, width=48).build((3, 32, 32), 10)
        >>> model.block1(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 65, 96])
    """

    streams: ClassVar[int] = 2

    def _blocks(self, stem: nn.Module) -> list[nn.Module]:
        blocks: list[nn.Module] = [ReversibleBlock(*self._units().values()) for _ in range(self.depth)]
        blocks[0] = named(stem=named(embedding=stem, streams=TwoStreams()), unit=blocks[0])
        return blocks


class TwoStreams(nn.Module):
    """Two streams that start as the same: (B, tokens, width) to (B, tokens, 2 width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Repeat the last dimension."""
        return torch.cat([tokens, tokens], dim=-1)


class ReversibleBlock(nn.Module):
    """One reversible block; `f` and `g` have a `branch` from a stream to the term that is added to the other.

    Args:
        f: reads the second stream and changes the first.
        g: reads the first, changed stream and changes the second.
    """

    def __init__(self, f: Any, g: Any):
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on (B, ..., 2 width)."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or x.requires_grad):
            return self.plain(x)
        row = Row.ending_with(x)
        out = _Reversed.apply(self, row, x, *parameters)
        assert isinstance(out, Tensor)
        row.append(out)
        return out

    def plain(self, x: Tensor) -> Tensor:
        """The block's output, computed so that autograd records it."""
        x1, x2 = x.chunk(2, dim=-1)
        y1 = x1 + self.f.branch(x2)
        return torch.cat([y1, x2 + self.g.branch(y1)], dim=-1)


class Row:
    """Reversible blocks in a row: the output of the last one is kept, and the others are computed from it.

    A block that gets the last output of a row is appended to it; any other begins a row.
    """

    def __init__(self) -> None:
        self.blocks = 0
        """Blocks whose backward pass is still to come."""
        self.out: Tensor | None = None
        """Output of the last of them, without history."""
        self.version = 0

    @staticmethod
    def ending_with(x: Tensor) -> "Row":
        """The row with the last output `x`, or a new one."""
        row = getattr(x, "_reversible_row", None)
        if isinstance(row, Row) and row.out is not None and row.out.data_ptr() == x.data_ptr():
            return row
        return Row()

    def append(self, out: Tensor) -> None:
        """Add the output of the next block."""
        self.blocks += 1
        self.out, self.version = out.detach(), out._version
        out._reversible_row = self  # pyright: ignore[reportAttributeAccessIssue]

    def last(self, place: int) -> Tensor:
        """Output of the block at `place`, which has to be the last one left.

        Raises:
            LayerwiseError: it is not the last one, or the tensor was changed.
        """
        if self.out is None or place != self.blocks:
            raise LayerwiseError(
                "the output of a reversible block is gone; run backward once through all blocks that follow it, or "
                "run the forward pass again."
            )
        if self.out._version != self.version:
            raise LayerwiseError(
                "the output of a reversible block was changed by an in-place operation; give what follows it an "
                "operation that is not in-place."
            )
        return self.out

    def put(self, out: Tensor | None) -> None:
        """Remove the last block, which is done; `out` is its input, the output of the one before it."""
        self.blocks -= 1
        self.out, self.version = out, 0 if out is None else out._version


class _Reversed(torch.autograd.Function):
    """A block that saves nothing; its backward pass begins with the inverse."""

    @staticmethod
    def forward(ctx: Any, block: ReversibleBlock, row: Row, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.block, ctx.row, ctx.place, ctx.parameters = block, row, row.blocks + 1, parameters
        kind = x.device.type
        ctx.precision = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return block.plain(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(*ctx.precision):  # as in the forward pass
            return _Reversed.undone(ctx, gradient)

    @staticmethod
    def undone(ctx: Any, gradient: Tensor) -> Any:
        """The gradients on input and parameters; the row's last output becomes the block's input."""
        block, row = ctx.block, ctx.row
        y = row.last(ctx.place)
        (y1, y2), (g1, g2) = y.chunk(2, dim=-1), gradient.chunk(2, dim=-1)
        # One branch after the other, each run once: its output gives the inverse, and its graph the gradients.
        with torch.enable_grad():
            seen = y1.detach().requires_grad_()
            added = block.g.branch(seen)
        into, own = _gradients(added, seen, block.g, g2)
        g1, x2 = g1 + into, y2 - added.detach()
        del added, seen
        with torch.enable_grad():
            seen = x2.requires_grad_()
            added = block.f.branch(seen)
        into, of_f = _gradients(added, seen, block.f, g1)
        own |= of_f
        x1 = y1 - added.detach()
        row.put(torch.cat([x1, x2.detach()], dim=-1) if row.blocks > 1 else None)
        return None, None, torch.cat([g1, g2 + into], dim=-1), *(own.get(id(p)) for p in ctx.parameters)


def _gradients(added: Tensor, seen: Tensor, branch: nn.Module, gradient: Tensor) -> tuple[Tensor, dict[int, Any]]:
    """Gradients on a branch's input, and on its parameters by identity."""
    parameters = [p for p in branch.parameters() if p.requires_grad]
    found = torch.autograd.grad(added, [seen, *parameters], gradient, allow_unused=True)
    assert found[0] is not None
    return found[0], {id(p): grad for p, grad in zip(parameters, found[1:], strict=True)}
