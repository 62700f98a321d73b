r"""Activations that keep a few bits per number for the backward pass, instead of their whole input.

The derivative is replaced by a step function: $f'(x) \approx D_k$ where $k$ of the thresholds $c_i$ are below x. Only k
is kept, in 1 or 2 bits.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.once import once_differentiable

GELU_THRESHOLDS = (-3.1858810036855245, -0.001178821281161997, 3.190832613414926)
GELU_JUMPS = (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286)
SILU_THRESHOLDS = (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708)
SILU_JUMPS = (-0.04060357190528599, 1.080925428529668, -0.040321856624382146)


def packed(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The number of thresholds below each number: 1 bit for one threshold, 2 bits for three, eight or four per byte.

    Byte j holds the numbers j, j + q, j + 2q, ... of the flattened tensor of n, so that operations run on neighbours.

    Returns:
        (q,) bytes, q = ceil(n / 8) or ceil(n / 4).

    >>> packed(torch.tensor([-1.0, 2.0, 3.0, -4.0]), [0.0])  # 0 + 2 + 4 + 0
    tensor([6], dtype=torch.uint8)
    """
    per_byte, bits = _layout(len(thresholds))
    flat = x.reshape(-1)
    found = torch.zeros(-(-flat.numel() // per_byte), dtype=torch.uint8, device=x.device)
    for place, piece in enumerate(flat.split(len(found))):
        # Viewed as bytes; booleans would be converted.
        code = (piece > thresholds[0]).view(torch.uint8)
        for threshold in thresholds[1:]:
            code += (piece > threshold).view(torch.uint8)
        found[: len(piece)] |= code << (bits * place)
    return found


def stepped(gradient: Tensor, codes: Tensor, values: Sequence[float]) -> Tensor:
    """The gradient times the value of each number's code, for one place within the bytes at a time."""
    bits = _layout(len(values) - 1)[1]
    flat = gradient.reshape(-1)
    out = torch.empty_like(flat)
    # Created on the device: a copy from the host would wait for the device.
    table = torch.cat([flat.new_full((1,), value) for value in values])
    for place, (piece, into) in enumerate(zip(flat.split(len(codes)), out.split(len(codes)), strict=True)):
        code = (codes[: len(piece)] >> (bits * place)) & (len(values) - 1)
        torch.mul(piece, table.index_select(0, code.int()), out=into)
    return out.view(gradient.shape)


def _layout(thresholds: int) -> tuple[int, int]:
    bits = {1: 1, 3: 2}[thresholds]
    return 8 // bits, bits


class _Stepped(torch.autograd.Function):
    """A function of every number, whose derivative is a step function of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Any) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(packed(x, kind.thresholds))
        return kind.function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (codes,) = ctx.saved_tensors
        return stepped(gradients[0], codes, ctx.kind.values), None


class Stepped(nn.Module):
    """Base of the activations here: the forward pass is exact."""

    thresholds: ClassVar[tuple[float, ...]]
    """c, ascending: one or three."""
    values: ClassVar[tuple[float, ...]]
    """D: the derivative below, between and above the thresholds."""

    @classmethod
    def function(cls, x: Tensor) -> Tensor:
        """The activation."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every number."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.function(x)
        return _Stepped.apply(x, type(self))  # pyright: ignore[reportReturnType]


def _sums(jumps: Sequence[float]) -> tuple[float, ...]:
    return tuple(sum(jumps[:k]) for k in range(len(jumps) + 1))


class ApproxGELU(Stepped):
    r"""GELU that keeps 2 bits of every number for the backward pass (ReGELU2 of Approx-BP).

    $f'(x) \approx \sum_i a_i [x > c_i]$ with the constants of the paper, instead of
    $\Phi(x) + x \varphi(x)$.

    Source: Yang et al. 2024, "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation".

    >>> x = torch.tensor([-4.0, -1.0, 1.0, 4.0], requires_grad=True)
    >>> ApproxGELU()(x).sum().backward()
    >>> x.grad
    tensor([ 0.0000, -0.0492,  1.0487,  1.0000])
    """

    thresholds = GELU_THRESHOLDS
    values = _sums(GELU_JUMPS)

    @classmethod
    def function(cls, x: Tensor) -> Tensor:
        """GELU."""
        return F.gelu(x)


class ApproxSiLU(Stepped):
    """SiLU that keeps 2 bits of every number for the backward pass (ReSiLU2 of Approx-BP); see `ApproxGELU`."""

    thresholds = SILU_THRESHOLDS
    values = _sums(SILU_JUMPS)

    @classmethod
    def function(cls, x: Tensor) -> Tensor:
        """SiLU."""
        return F.silu(x)


class MaskReLU(Stepped):
    """ReLU that keeps 1 bit of every number; its gradient is exact.

    `nn.ReLU` keeps its output. If the next layer keeps the same tensor (a linear layer, a convolution, a pool), that
    costs nothing, and this module saves nothing.

    >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> MaskReLU()(x).sum().backward()
    >>> x.grad
    tensor([0., 0., 1.])
    """

    thresholds = (0.0,)
    values = (0.0, 1.0)

    @classmethod
    def function(cls, x: Tensor) -> Tensor:
        """ReLU."""
        return F.relu(x)
