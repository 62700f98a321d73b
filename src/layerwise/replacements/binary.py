"""BinaryConnect: layers whose weights are +1 or -1 in use, and real numbers for learning."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.replacements.alike import alike


class _Sign(torch.autograd.Function):
    """The sign, 1 at zero; the gradient passes unchanged to the real weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


def binary(weight: Tensor, training: bool) -> Tensor:
    """The binary weight of a real one, which is clipped to [-1, 1] before it is used in training.

    The paper clips after every step. Clipping before the next use is equivalent, and works with every optimizer.

    >>> weight = nn.Parameter(torch.tensor([-3.0, 0.0, 0.5]))
    >>> binary(weight, training=True).tolist(), weight.tolist()
    ([-1.0, 1.0, 1.0], [-1.0, 0.0, 0.5])
    """
    if training and not weight.is_inference():
        with torch.no_grad():
            weight.clamp_(-1, 1)
    return _Sign.apply(weight)  # pyright: ignore[reportReturnType]


class BinaryLinear(nn.Linear):
    r"""A linear layer with the weight $w_b = \mathrm{sign}(w)$ in the forward and the backward pass.

    The gradient with respect to $w_b$ is used as that of w, which is kept within [-1, 1]. The bias stays real. This is
    the deterministic form of the paper. There, weights have Glorot's initialisation, and a norm follows every layer,
    because sums of ones are large.

    Source: Courbariaux et al. 2015, "BinaryConnect".

    >>> layer = BinaryLinear.of(nn.Linear(4, 2))
    >>> sorted(set((layer(torch.eye(4)) - layer.bias).flatten().round().tolist()))[-1]
    1.0
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The same layer with the same parameters."""
        return alike(cls, linear)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return F.linear(input, binary(self.weight, self.training), self.bias)


class BinaryConv2d(nn.Conv2d):
    """A convolution with binary weights; see `BinaryLinear`."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """The same layer with the same parameters."""
        return alike(cls, conv)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, H, W)`."""
        return self._conv_forward(input, binary(self.weight, self.training), self.bias)
