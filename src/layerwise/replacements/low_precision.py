"""Emulated low precision: layers whose inputs, weights and gradients are rounded to fewer bits."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from layerwise.core.once import once_differentiable
from layerwise.errors import unknown
from layerwise.replacements.alike import alike, padded

PARTS = 8
"""A tensor is rounded in so many parts, so that what is computed on the way is small."""


@dataclass(frozen=True)
class Format:
    """A floating-point format, and the type of torch that holds all of its numbers."""

    mantissa: int
    """Bits of the mantissa that are stored."""
    lowest: int
    """Exponent of the smallest normal number."""
    largest: float
    """The largest number."""
    dtype: torch.dtype
    scaled: bool = True
    """Whether tensors are scaled by a power of two to use the format's range."""
    emulated: bool = False
    """Whether the type of torch has more numbers than the format."""


FORMATS = {
    "bf16": Format(7, -126, float(torch.finfo(torch.bfloat16).max), torch.bfloat16, False),
    "fp16": Format(10, -14, 65504.0, torch.float16, False),
    "fp8_e5m2": Format(2, -14, 57344.0, torch.float8_e5m2),
    "fp8_e4m3": Format(3, -6, 448.0, torch.float8_e4m3fn),
    "fp4_e2m1": Format(1, 0, 6.0, torch.float8_e4m3fn, emulated=True),
}


def rounded(x: Tensor, format: str, stochastic: bool = False) -> tuple[Tensor, Tensor]:
    r"""A tensor in a format of few bits, times a power of two: the nearest numbers, or neighbours at random.

    With the exponent e of a number (at least the format's lowest) and m bits of mantissa, the distance of neighbours is
    $2^{e-m}$. Halves go to the even neighbour. At random, the upper one is taken with the probability that makes the
    expectation the number itself. What is beyond the largest number becomes the largest number.

    Formats of 8 and fewer bits are scaled by the largest power of two that keeps the largest magnitude in range.

    Args:
        x: of one dimension or more.
        format: a name of `FORMATS`.
        stochastic: whether rounding is at random.

    Returns:
        The scaled numbers, in the format's type; and the factor that they were scaled with, `()` float32.

    >>> values, factor = rounded(torch.tensor([1.0, 1.06, 3.3]), "fp4_e2m1")
    >>> (values.float() / factor).tolist()
    [1.0, 1.0, 3.0]
    """
    kind = FORMATS[format]
    x = x.detach().float()
    factor = torch.ones((), device=x.device)
    if kind.scaled and x.numel():
        largest = x.abs().amax()
        usable = torch.isfinite(largest) & (largest > 0)
        exponent = torch.frexp(kind.largest / torch.where(usable, largest, 1.0))[1] - 1  # rounded down
        factor = torch.where(usable, torch.ldexp(factor, exponent.clamp(-100, 100)), factor)
    found = torch.empty_like(x, dtype=kind.dtype)
    length = max(-(-len(x) // PARTS), 1)
    for piece, into in zip(x.split(length), found.split(length), strict=True):
        piece = piece * factor
        if stochastic or kind.emulated:
            exponent = (torch.frexp(piece)[1] - 1).clamp_(min=kind.lowest)  # frexp has mantissas below 1
            step = torch.ldexp(torch.ones_like(piece), exponent - kind.mantissa)
            piece = piece.div_(step)
            piece = (
                piece.add_(torch.rand(piece.shape, device=x.device)).floor_() if stochastic else piece.round_()
            ).mul_(step)
        into.copy_(piece.clamp_(-kind.largest, kind.largest))  # to the nearest
    return found, factor


@dataclass(frozen=True)
class Precision:
    """Formats of a layer, by name; None leaves numbers as they are."""

    inputs: str | None = "fp8_e4m3"
    weights: str | None = "fp8_e4m3"
    gradients: str | None = "fp8_e5m2"
    stochastic: bool = False

    def __post_init__(self) -> None:
        for format in (self.inputs, self.weights, self.gradients):
            if format is not None and format not in FORMATS:
                raise unknown("format", str(format), list(FORMATS))

    def pack(self, x: Tensor, format: str | None) -> tuple[Tensor, Tensor | None]:
        """A tensor as it is kept, and its factor."""
        return (x, None) if format is None else rounded(x, format, self.stochastic)


def _unpacked(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if factor is None else (x.float() / factor).to(dtype)


class _Rounded(torch.autograd.Function):
    """A linear layer or a convolution of rounded numbers, with a rounded gradient of its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision, how: Any) -> Tensor:
        kept_x, kept_w = precision.pack(x, precision.inputs), precision.pack(weight, precision.weights)
        ctx.save_for_backward(*kept_x, *kept_w)
        ctx.precision, ctx.how, ctx.biased, ctx.dtypes = precision, how, bias is not None, (x.dtype, weight.dtype)
        used = _unpacked(*kept_x, x.dtype), _unpacked(*kept_w, weight.dtype)
        return F.linear(*used, bias) if how is None else F.conv2d(*used, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved, precision = ctx.saved_tensors, ctx.precision
        dtype = gradients[0].dtype
        kept_x, x_factor, kept_w, w_factor = saved
        kept_dy, dy_factor = precision.pack(gradients[0], precision.gradients)
        dy = _unpacked(kept_dy, dy_factor, dtype)
        x, weight = _unpacked(kept_x, x_factor, dtype), _unpacked(kept_w, w_factor, dtype)
        dx = dw = db = None
        if ctx.how is not None:
            if ctx.needs_input_grad[0]:
                dx = conv2d_input(x.shape, weight, dy, *ctx.how)
            if ctx.needs_input_grad[1]:
                dw = conv2d_weight(x, weight.shape, dy, *ctx.how)  # pyright: ignore[reportArgumentType]
            db = dy.sum((0, 2, 3)) if ctx.biased else None
        else:
            rows = dy.reshape(-1, dy.shape[-1])
            dx = dy @ weight if ctx.needs_input_grad[0] else None
            dw = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
            db = rows.sum(0) if ctx.biased else None
        of_x, of_weight = ctx.dtypes
        return None if dx is None else dx.to(of_x), None if dw is None else dw.to(of_weight), db, None, None


class LowPrecisionLinear(nn.Linear):
    r"""A linear layer that computes with rounded numbers: $y = q(x)\, q(W)^\top + b$.

    With $g = q(\mathrm{d}y)$ the gradients are $\mathrm{d}x = g\, q(W)$, $\mathrm{d}W = g^\top q(x)$, $\mathrm{d}b =
    \sum g$: rounding itself has the derivative 1 (straight through), and the real weight learns. Products and sums have
    the precision of the model, as in the units that multiply such formats.

    This emulates a format on every device, and is not faster. What is kept for the backward pass are $q(x)$ and $q(W)$
    in the format's own type, so a byte per number in 8 or 4 bits.

    Formats (`rounded` has the formula): `"bf16"`, `"fp16"`, `"fp8_e5m2"`, `"fp8_e4m3"`, `"fp4_e2m1"`, the last three
    with a power of two per tensor as their scale; `None` rounds nothing.

    Args:
        inputs: format of x.
        weights: format of W.
        gradients: format of dy.
        stochastic: whether all three are rounded at random, without bias, instead of to the nearest.

    Raises:
        LayerwiseError: an unknown format.

    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (e4m3 forward, e5m2 backward); Gupta et al. 2015,
    "Deep Learning with Limited Numerical Precision" (stochastic rounding). The scales are our choice.

    >>> layer = LowPrecisionLinear(4, 2, inputs=None, weights=None, gradients=None)
    >>> torch.equal(layer(torch.ones(3, 4)), F.linear(torch.ones(3, 4), layer.weight, layer.bias))
    True
    """

    def __init__(
        self,
        *sizes: Any,
        inputs: str | None = "fp8_e4m3",
        weights: str | None = "fp8_e4m3",
        gradients: str | None = "fp8_e5m2",
        stochastic: bool = False,
        **more: Any,
    ):
        super().__init__(*sizes, **more)
        self.precision = Precision(inputs, weights, gradients, stochastic)

    @classmethod
    def of(cls, linear: nn.Linear, **precision: Any) -> Self:
        """The same layer with the same parameters."""
        return alike(cls, linear, **precision)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return _Rounded.apply(input, self.weight, self.bias, self.precision, None)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Sizes and formats."""
        return f"{super().extra_repr()}, {self.precision}"


class LowPrecisionConv2d(nn.Conv2d):
    """A convolution that computes with rounded numbers; see `LowPrecisionLinear`."""

    def __init__(
        self,
        *sizes: Any,
        inputs: str | None = "fp8_e4m3",
        weights: str | None = "fp8_e4m3",
        gradients: str | None = "fp8_e5m2",
        stochastic: bool = False,
        **more: Any,
    ):
        super().__init__(*sizes, **more)
        self.precision = Precision(inputs, weights, gradients, stochastic)

    @classmethod
    def of(cls, conv: nn.Conv2d, **precision: Any) -> Self:
        """The same layer with the same parameters."""
        return alike(cls, conv, **precision)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, H, W)`."""
        x, padding = padded(self, input if input.dim() == 4 else input[None])
        how = (self.stride, padding, self.dilation, self.groups)
        out: Any = _Rounded.apply(x, self.weight, self.bias, self.precision, how)
        return out if input.dim() == 4 else out[0]

    def extra_repr(self) -> str:
        """Sizes and formats."""
        return f"{super().extra_repr()}, {self.precision}"
