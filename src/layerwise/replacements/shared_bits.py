"""Double Rounding: layers whose integer weights serve several numbers of bits."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.replacements.alike import alike

WIDTHS = (8, 6, 4, 2)


def fewer_bits(integers: Tensor, high: int, low: int) -> Tensor:
    """Integers of `high` bits, rounded once more to `low` bits; halves to even.

    >>> fewer_bits(torch.tensor([-128.0, -24.0, 24.0, 40.0, 127.0]), 8, 4)
    tensor([-8., -2.,  2.,  2.,  7.])
    """
    half = 2.0 ** (low - 1)
    return torch.round(integers / 2 ** (high - low)).clamp(-half, half - 1)


class _Quantised(torch.autograd.Function):
    """A weight of few bits; the gradient passes unchanged to the real weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, high: int, low: int) -> Tensor:
        integers, scale = quantised(weight, high)
        return fewer_bits(integers, high, low) * (scale * 2 ** (high - low))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers of a weight, as numbers of its own type, and the scale of each output `(out, 1, ...)`."""
    largest = weight.detach().abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
    scale = torch.where(largest == 0, 1, largest) / (2 ** (bits - 1) - 1)
    return torch.round(weight.detach() / scale), scale


class _SharedBits(nn.Module):
    """What both layers share."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def _prepare(self, widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        if not self.widths or any(type(b) is not int or not 2 <= b <= 16 for b in self.widths):
            raise LayerwiseError(f"widths is {widths!r}; give numbers of bits from 2 to 16, such as (8, 6, 4, 2).")
        self.bits = max(self.widths)

    def integers(self) -> tuple[Tensor, Tensor]:
        """The integers of the most bits, which all others are made of, and their scales: what a device has to store."""
        integers, scale = quantised(self.weight, max(self.widths))
        return integers.to(torch.int8 if max(self.widths) <= 8 else torch.int16), scale

    def used(self) -> Tensor:
        """The weight of this pass: of drawn bits in training, of `bits` otherwise."""
        low = self.bits
        if self.training:  # a pass that is made again, by a checkpoint, draws the same
            low = self.widths[int(torch.randint(len(self.widths), (), device="cpu"))]
        return _Quantised.apply(self.weight, max(self.widths), low)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"{super().extra_repr()}, widths={self.widths}"


class SharedBitsLinear(_SharedBits, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    r"""A linear layer that learns integer weights for several numbers of bits at once.

    Of the most bits h, with a scale per output, and of fewer bits l:

    $$w_h = \mathrm{round}(w / s), \quad s = \frac{\max |w|}{2^{h-1} - 1}; \qquad
      w_l = \mathrm{clip}\big(\mathrm{round}(w_h / 2^{h-l}),\, -2^{l-1},\, 2^{l-1} - 1\big), \quad
      \hat w = s\, 2^{h-l}\, w_l$$

    so that $w_h$ and s alone have to be stored (`integers()`). The gradient of $\hat w$ passes to w unchanged (straight
    through). Each pass in training draws one of the numbers of bits; otherwise the attribute `bits` says which is used
    (`set_bits`). The bias stays real.

    Args:
        widths: numbers of bits, 2 to 16.

    Raises:
        LayerwiseError: a number of bits out of range.

    Source: Huang et al. 2025, "Nearly Lossless Adaptive Bit Switching" (arXiv 2502.01199). Our reading: the scale from
    the largest weight, where the paper learns it and adapts the learning rate of the scales to the bits (ALRS); one
    drawn number of bits per pass, where it sums the losses of all.

    >>> layer = SharedBitsLinear(16, 4)
    >>> set_bits(layer.eval(), 2)
    >>> len(layer.used()[0].unique()) <= 4
    True
    """

    def __init__(self, *sizes: Any, widths: Sequence[int] = WIDTHS, **more: Any):
        super().__init__(*sizes, **more)
        self._prepare(widths)

    @classmethod
    def of(cls, linear: nn.Linear, widths: Sequence[int] = WIDTHS) -> Self:
        """The same layer with the same parameters."""
        return alike(cls, linear, widths=widths)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return F.linear(input, self.used(), self.bias)


class SharedBitsConv2d(_SharedBits, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A convolution with integer weights for several numbers of bits; see `SharedBitsLinear`."""

    def __init__(self, *sizes: Any, widths: Sequence[int] = WIDTHS, **more: Any):
        super().__init__(*sizes, **more)
        self._prepare(widths)

    @classmethod
    def of(cls, conv: nn.Conv2d, widths: Sequence[int] = WIDTHS) -> Self:
        """The same layer with the same parameters."""
        return alike(cls, conv, widths=widths)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, H, W)`."""
        return self._conv_forward(input, self.used(), self.bias)


def set_bits(model: nn.Module, bits: int) -> None:
    """Let all layers with shared integer weights use so many bits outside of training.

    Args:
        model: holds such layers.
        bits: one of their numbers of bits.

    Raises:
        LayerwiseError: the model has no such layer, or one that was not trained for so many bits; nothing is changed.
    """
    layers = [m for m in model.modules() if isinstance(m, _SharedBits)]
    if not layers:
        raise LayerwiseError(f"{type(model).__name__} has no layer with shared_bits; replace(model, 'shared_bits').")
    for layer in layers:
        if bits not in layer.widths:
            raise LayerwiseError(f"a layer has no weights of {bits} bits; choose one of {layer.widths}.")
    for layer in layers:
        layer.bits = bits
