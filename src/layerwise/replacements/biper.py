"""BiPer: layers whose weights are the signs of a sine of real numbers."""

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.once import once_differentiable
from layerwise.errors import LayerwiseError
from layerwise.replacements.alike import alike

Stage = Literal["sign", "sine"]
OMEGA = 20.0


def _wave(weight: Tensor, omega: float, stage: Stage) -> Tensor:
    wave = torch.sin(omega * weight)
    return torch.where(wave < 0, -1.0, 1.0).to(weight.dtype) if stage == "sign" else wave


class _Wave(torch.autograd.Function):
    """The weight in use; keeps nothing but the parameters, and computes the waves again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, omega: float, stage: Stage) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        ctx.wave = omega, stage
        return _wave(weight, omega, stage) * alpha.view(-1, *[1] * (weight.dim() - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, alpha = ctx.saved_tensors
        (omega, stage), dused = ctx.wave, gradients[0]
        dw = dalpha = None
        if ctx.needs_input_grad[0]:
            dw = torch.cos(omega * weight).mul_(omega * alpha.view(-1, *[1] * (weight.dim() - 1))).mul_(dused)
        if ctx.needs_input_grad[1]:
            dalpha = (_wave(weight, omega, stage) * dused).flatten(1).sum(1)
        return dw, dalpha, None, None


class _Periodic(nn.Module):
    """What both layers share: the weight in use, and a scale per output."""

    weight: nn.Parameter
    alpha: nn.Parameter

    def _prepare(self, omega: float, stage: Stage) -> None:
        if not omega > 0:
            raise LayerwiseError(f"omega is {omega}; the frequency of the sine is above 0.")
        if stage not in ("sign", "sine"):
            raise LayerwiseError(f"stage is {stage!r}; choose sine, the first stage of training, or sign, the second.")
        self.omega, self.stage = omega, stage

    def reset_parameters(self) -> None:
        """Draw the weights, and begin with the mean magnitude of each output's, so that outputs keep their size."""
        super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        means = self.weight.abs().flatten(1).mean(1)
        if "alpha" in self._parameters and self.alpha.device == means.device:
            self.alpha.copy_(means)
        else:
            self.alpha = nn.Parameter(means)

    @classmethod
    def _of(cls, layer: Any, omega: float, stage: Stage) -> Self:
        made = alike(cls, layer, omega=omega, stage=stage)  # pyright: ignore[reportArgumentType]
        made._begin()
        return made

    def used(self) -> Tensor:
        """The weight in the forward and the backward pass."""
        return _Wave.apply(self.weight, self.alpha, self.omega, self.stage)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Sizes, frequency and stage."""
        return f"{super().extra_repr()}, omega={self.omega}, stage={self.stage!r}"


class BiPerLinear(_Periodic, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    r"""A linear layer whose weight is a square wave of real numbers: $\alpha\, \mathrm{sign}(\sin \omega w)$.

    The gradient is that of the sine, $\mathrm{d}w = \mathrm{d}w_b\, \alpha\, \omega \cos \omega w$, with $\mathrm{d}w_b
    \alpha$ from the forward and backward pass with signs. Unlike a plain sign, the wave needs no clipping: every weight
    is near both values. $\alpha$, a number per output, is a parameter of its own, and starts as the mean of $|w|$. The
    bias stays real.

    The authors train in two stages: first with $\sin \omega w$ itself (`stage="sine"`), then with its sign. Set the
    attribute `stage` of the layers to change over.

    Args:
        omega: $\omega$, radians per unit of weight.
        stage: `"sign"` or `"sine"`.

    Raises:
        LayerwiseError: a frequency that is not positive, or an unknown stage.

    Source: Vargas et al. 2024, "BiPer: Binary Neural Networks using a Periodic Function", and its authors' code. Our
    reading: the start of $\alpha$ (there at random, before a batch norm). Left out: binary activations, and the
    regulariser of the sine, which have to be part of the network and of its loss.

    >>> layer = BiPerLinear(4, 2)
    >>> bool((layer.used().abs() == layer.alpha[:, None]).all())
    True
    """

    def __init__(self, *sizes: Any, omega: float = OMEGA, stage: Stage = "sign", **more: Any):
        super().__init__(*sizes, **more)
        self._prepare(omega, stage)

    @classmethod
    def of(cls, linear: nn.Linear, omega: float = OMEGA, stage: Stage = "sign") -> Self:
        """The same layer with the same parameters, and a scale."""
        return cls._of(linear, omega, stage)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return F.linear(input, self.used(), self.bias)


class BiPerConv2d(_Periodic, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A convolution whose weights are a square wave; see `BiPerLinear`."""

    def __init__(self, *sizes: Any, omega: float = OMEGA, stage: Stage = "sign", **more: Any):
        super().__init__(*sizes, **more)
        self._prepare(omega, stage)

    @classmethod
    def of(cls, conv: nn.Conv2d, omega: float = OMEGA, stage: Stage = "sign") -> Self:
        """The same layer with the same parameters, and a scale."""
        return cls._of(conv, omega, stage)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, H, W)`."""
        return self._conv_forward(input, self.used(), self.bias)
