r"""Normalisations that share the memory of the layer after them (MS-LayerNorm, MS-RMSNorm of MS-BP).

A norm keeps its input, and the linear layer after it keeps the norm's output. But the backward pass of a norm without
scale and shift needs only its output y and the deviation:

$$\mathrm{d}x = \frac{1}{\sigma} \big(\mathrm{d}y - \overline{\mathrm{d}y} - y\, \overline{\mathrm{d}y \odot y}\big)$$

(without the first mean for an RMS norm), so that one tensor is kept for both. Scale and shift of the norm are merged
into the linear layers that read it: $W \leftarrow W \mathrm{diag}(\gamma)$, $b \leftarrow b + W \beta$.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.once import once_differentiable


class _Norm(torch.autograd.Function):
    """Normalises the last dimension; keeps the output and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, centred: bool) -> Tensor:
        if centred:
            y, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        else:
            scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            y = x * scale
        ctx.centred = centred
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        y, scale = ctx.saved_tensors
        (dy,) = gradients
        if ctx.centred:  # with y for the input, mean 0 and deviation 1, torch's own kernel has the formula in brackets
            dy, zero, one = dy.contiguous(), torch.zeros_like(scale), torch.ones_like(scale)
            found = torch.ops.aten.native_layer_norm_backward(
                dy, y, y.shape[-1:], zero, one, None, None, [True, False, False]
            )[0]
        else:
            found = torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1)
        return found.mul_(scale), None, None


class _Shared(nn.Module):
    """Base of both norms: over the last dimension, without parameters.

    Args:
        size: of the last dimension.
        eps: added to the variance, or to the mean square.
    """

    centred = True

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(..., size)`; in float32 under autocast, as torch's norms do."""
        x = x.float() if torch.is_autocast_enabled(x.device.type) else x
        if not (torch.is_grad_enabled() and x.requires_grad):
            return (
                F.layer_norm(x, (self.size,), eps=self.eps)
                if self.centred
                else F.rms_norm(x, (self.size,), None, self.eps)
            )
        return _Norm.apply(x.contiguous(), self.eps, self.centred)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.size}, eps={self.eps}"


class MSLayerNorm(_Shared):
    """Layer norm without scale and shift, which keeps its output instead of its input.

    >>> x = torch.randn(4, 8, requires_grad=True)
    >>> torch.equal(MSLayerNorm(8)(x), nn.functional.layer_norm(x, (8,)))
    True
    """


class MSRMSNorm(_Shared):
    """RMS norm without scale, which keeps its output instead of its input."""

    centred = False


@torch.no_grad()
def merge(norm: nn.LayerNorm | nn.RMSNorm, readers: list[nn.Linear]) -> None:
    """Merge a norm's scale and shift into the linear layers that read it; the norm then has no scale and shift."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    for linear in readers:
        if bias is not None:
            assert linear.bias is not None
            linear.bias += linear.weight @ bias
        if weight is not None:
            linear.weight *= weight


def replacement(norm: nn.LayerNorm | nn.RMSNorm) -> nn.Module:
    """The replacement of a norm whose scale and shift are merged."""
    if isinstance(norm, nn.LayerNorm):
        return MSLayerNorm(norm.normalized_shape[-1], norm.eps)
    eps = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps
    return MSRMSNorm(norm.normalized_shape[-1], eps)
