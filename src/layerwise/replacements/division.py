"""DIVISION: layers that keep a coarse copy of their input, and what it leaves out in a few bits."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from layerwise.core.once import once_differentiable
from layerwise.errors import LayerwiseError
from layerwise.replacements.alike import alike, padded

PARTS = 8
"""A batch is packed and unpacked in so many parts, so that only one of them exists in full at a time."""


@dataclass(frozen=True)
class Packing:
    """How maps are packed; see `DivisionConv2d`."""

    window: int = 8
    bits: int = 2
    stochastic: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise LayerwiseError(f"window is {self.window}; the side of the averaged squares is 1 or more.")
        if self.bits not in (1, 2, 4, 8):
            raise LayerwiseError(f"bits is {self.bits}; choose 1, 2, 4 or 8, which fill a byte.")

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Averages, codes, steps and minima of maps `(B, C, H, W)`."""
        packed = [self._pack(part) for part in x.split(_length(x))]
        low, codes, step, least = (torch.cat(pieces) for pieces in zip(*packed, strict=True))
        return low, codes, step, least

    def parts(self, packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Any:
        """Slices of the batch, and the maps of each as they are restored."""
        length = _length(packed[0])
        for start in range(0, shape[0], length):
            place = slice(start, start + length)
            yield place, self._restored(tuple(t[place] for t in packed), shape[1:]).to(dtype)

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = (x.float() if x.element_size() < 4 else x).contiguous()  # draws do not depend on the layout
        low = F.avg_pool2d(x, self._window(x.shape), ceil_mode=True).bfloat16()
        high = self._add_spread(x.clone(), low, -1)
        least, most = high.amin((2, 3)).bfloat16(), high.amax((2, 3)).bfloat16()
        step = (most - least) / (2**self.bits - 1)
        of_map = torch.where(step == 0, 1, step).to(x.dtype)[..., None, None]
        high = high.sub_(least.to(x.dtype)[..., None, None]).div_(of_map)
        high = high.add_(_draws(high)).floor_() if self.stochastic else high.round_()
        codes = high.clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(1)
        per_byte = 8 // self.bits
        found = codes.new_zeros(len(codes), -(-codes.shape[1] // per_byte))
        for place, piece in enumerate(codes.split(found.shape[1], dim=1)):
            found[:, : piece.shape[1]] |= piece << (self.bits * place)
        return low, found, step, least

    def _restored(self, packed: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
        low, bytes_, step, least = packed
        found = step.new_empty((len(low), shape.numel()), dtype=torch.float32)
        for place, piece in enumerate(found.split(bytes_.shape[1], dim=1)):
            piece.copy_((bytes_[:, : piece.shape[1]] >> (self.bits * place)) & (2**self.bits - 1))
        found = found.view(-1, *shape)
        found *= step[..., None, None]
        found += least[..., None, None]
        return self._add_spread(found, low, 1)

    def _window(self, shape: torch.Size) -> tuple[int, int]:
        return min(self.window, shape[2]), min(self.window, shape[3])

    def _add_spread(self, x: Tensor, low: Tensor, sign: int) -> Tensor:
        """Add every average, or subtract it, in the place of all numbers that it is of."""
        high, wide = self._window(x.shape)
        low = low.to(x.dtype)
        if x.shape[2] % high == 0 and x.shape[3] % wide == 0:  # without a copy in full size
            squares = x.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
            squares.add_(low[:, :, :, None, :, None], alpha=sign)
            return x
        return x.add_(
            low.repeat_interleave(high, 2)[:, :, : x.shape[2]].repeat_interleave(wide, 3)[..., : x.shape[3]], alpha=sign
        )


def _draws(x: Tensor) -> Tensor:
    """Uniform in [0, 1), of 16 bits: four of them take one call of the generator, which dominates on a CPU."""
    whole = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return whole.view(torch.int16)[: x.numel()].view(x.shape).to(x.dtype).mul_(2**-16).add_(0.5)


def _length(x: Tensor) -> int:
    """Samples per part."""
    return max(-(-len(x) // PARTS), 1)


class _Convolved(torch.autograd.Function):
    """A convolution that packs its input for the gradient of its weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing, stride: Any, padding: Any, rest: Any
    ) -> Tensor:
        ctx.save_for_backward(weight, *packing.pack(x))
        ctx.packing, ctx.shape, ctx.dtype, ctx.biased = packing, x.shape, x.dtype, bias is not None
        ctx.how = stride, padding, *rest
        return F.conv2d(x, weight, bias, stride, padding, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, *packed = ctx.saved_tensors
        dy = gradients[0]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = conv2d_input(ctx.shape, weight.to(dy.dtype), dy, *ctx.how).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(weight)
            for place, x in ctx.packing.parts(tuple(packed), ctx.shape, dy.dtype):
                dw += conv2d_weight(x, weight.shape, dy[place], *ctx.how)  # pyright: ignore
        if ctx.biased and ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3))
        return dx, dw, db, None, None, None, None


class DivisionConv2d(nn.Conv2d):
    r"""A convolution that keeps its input packed: averages of squares, and the rest in 2 bits.

    The output and the gradient of the input are exact. The gradient of the weight is that of a restored input: with
    the average l of every square of `window` x `window` numbers (bfloat16), and $h = x - l$,

    $$\hat x = l + \min h + q \Delta, \qquad q = \left\lfloor \frac{h - \min h}{\Delta} + u \right\rfloor, \qquad
      \Delta = \frac{\max h - \min h}{2^b - 1}$$

    with minimum and maximum per sample and channel (bfloat16). $u \sim U(0, 1)$ makes $\hat x$, and so the gradient,
    unbiased up to the rounding of the minimum and of the step; $u = 1/2$ rounds to the nearest. Per number $b$ bits
    are kept, per map 4 bytes, and per square 2. An input of height 1 is kept as it is.

    If the next or the previous layer keeps the same tensor, as `nn.ReLU` does, nothing is saved: replace that too
    (`mask_relu`).

    Args:
        window: side of a square.
        bits: b, of 1, 2, 4 or 8.
        stochastic: whether codes are drawn; `False` rounds.

    Raises:
        LayerwiseError: a window or a number of bits that does not exist.

    Source: Wang et al. 2023, "DIVISION: Memory Efficient Training via Dual Activation Precision", and its authors' code
    (window 8, 2 bits, bfloat16, drawn codes). That the rest is of the averages as they are kept is our reading.

    >>> conv, x = DivisionConv2d(3, 4, 3), torch.randn(2, 3, 16, 16)
    >>> torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias))
    True
    """

    def __init__(self, *sizes: Any, window: int = 8, bits: int = 2, stochastic: bool = True, **more: Any):
        super().__init__(*sizes, **more)
        self.packing = Packing(window, bits, stochastic)

    @classmethod
    def of(cls, conv: nn.Conv2d, window: int = 8, bits: int = 2, stochastic: bool = True) -> Self:
        """The same layer with the same parameters."""
        return alike(cls, conv, window=window, bits=bits, stochastic=stochastic)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, H, W)`."""
        plain = input.dim() != 4 or input.shape[2] == 1 or not input.numel()
        if plain or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        x, padding = padded(self, input)
        given = (x, self.weight, self.bias, self.packing, self.stride, padding, (self.dilation, self.groups))
        return _Convolved.apply(*given)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Sizes, window and bits."""
        return f"{super().extra_repr()}, window={self.packing.window}, bits={self.packing.bits}"


class _Normalised(torch.autograd.Function):
    """A batch norm in training that packs its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, means: Any, variances: Any, packing: Packing, how: Any):
        out, mean, scale = torch.native_batch_norm(x, weight, bias, means, variances, True, *how)
        ctx.save_for_backward(weight, mean, scale, *packing.pack(x))
        ctx.packing, ctx.eps, ctx.shape, ctx.dtype = packing, how[1], x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, mean, scale, *packed = ctx.saved_tensors
        dy, x = gradients[0], torch.empty(ctx.shape, dtype=ctx.dtype, device=mean.device)
        for place, part in ctx.packing.parts(tuple(packed), ctx.shape, ctx.dtype):
            x[place] = part
        found = torch.ops.aten.native_batch_norm_backward(
            dy.contiguous(), x, weight, None, None, mean, scale, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *found, None, None, None, None


class DivisionBatchNorm2d(nn.BatchNorm2d):
    r"""A batch norm that keeps its input packed, as `DivisionConv2d` does.

    The output and the running statistics are exact. The gradients are those of the plain norm at the restored input:
    that of the shift is exact, the others are approximate.

    Args:
        window: side of a square.
        bits: of 1, 2, 4 or 8.
        stochastic: whether codes are drawn; `False` rounds.

    Raises:
        LayerwiseError: a window or a number of bits that does not exist.

    Source: as `DivisionConv2d`; the authors' code packs the inputs of both.

    >>> norm, x = DivisionBatchNorm2d(3), torch.randn(2, 3, 8, 8)
    >>> torch.equal(norm(x), nn.BatchNorm2d(3)(x))
    True
    """

    def __init__(self, *sizes: Any, window: int = 8, bits: int = 2, stochastic: bool = True, **more: Any):
        super().__init__(*sizes, **more)
        self.packing = Packing(window, bits, stochastic)

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, window: int = 8, bits: int = 2, stochastic: bool = True) -> Self:
        """The same layer with the same parameters and running statistics."""
        options = {"window": window, "bits": bits, "stochastic": stochastic}
        plain = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made = cls(*plain, device="meta", **options)
        made._parameters.update(norm._parameters)
        made._buffers.update(norm._buffers)
        return made.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)`."""
        self._check_input_dim(input)
        exact = not (torch.is_grad_enabled() and self.training) or input.shape[2] == 1
        if exact or not (input.requires_grad or (self.weight is not None and self.weight.requires_grad)):
            return super().forward(input)
        if input.numel() == input.shape[1]:
            return super().forward(input)  # torch says what is wrong
        momentum = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        given = (input, self.weight, self.bias, self.running_mean, self.running_var, self.packing, (momentum, self.eps))
        return _Normalised.apply(*given)  # pyright: ignore[reportReturnType]
