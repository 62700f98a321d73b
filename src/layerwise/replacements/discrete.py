"""Gradients through the choice of one of K categories: straight through, and ReinMax."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.core.once import once_differentiable
from layerwise.errors import LayerwiseError


def _through_softmax(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient on logits, from that on their softmax p."""
    return p * (gradient - (p * gradient).sum(-1, keepdim=True))


class _ReinMax(torch.autograd.Function):
    """A one-hot draw and the softmax; the gradient is of second order."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, hard: Tensor, tau: float) -> Any:
        soft = logits.softmax(-1)
        ctx.save_for_backward(logits, hard, soft)
        ctx.tau = tau
        return hard.clone(), soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, hard, soft = ctx.saved_tensors
        of_hard, of_soft = gradients
        middle = 0.5 * ((logits / ctx.tau).softmax(-1) + hard)
        found = _through_softmax(middle, 2 * of_hard) + _through_softmax(soft, of_soft - 0.5 * of_hard)
        return found - found.mean(-1, keepdim=True), None, None


class OneHot(nn.Module):
    r"""Draws one of K categories, as a one-hot vector, and lets a gradient through.

    $D \sim \mathrm{softmax}(\ell)$. With $J_p g = p \odot g - p\, (p^\top g)$ and the gradient g of D, the logits get

    - `"straight"`: $J_{\pi_\tau} g / \tau$, $\pi_\tau = \mathrm{softmax}(\ell / \tau)$, as if D were the softmax (first
      order);
    - `"reinmax"`: $2 J_{(\pi_\tau + D) / 2}\, g - \frac12 J_\pi\, g$ without its mean over the categories (Heun's
      method, second order: exact for quadratic functions of D in expectation, at $\tau = 1$).

    In evaluation the most probable category is taken.

    Args:
        gradient: `"reinmax"` or `"straight"`, the estimator of the gradient.
        tau: temperature of the backward pass; ReinMax needs at least 1.

    Raises:
        LayerwiseError: an unknown estimator, or a temperature out of range.

    Source: Liu et al. 2023, "Bridging Discrete and Backpropagation: Straight-Through and Beyond"; Bengio et al. 2013.

    >>> drawn = OneHot()(torch.zeros(2, 5))
    >>> drawn.shape, drawn.sum(-1).tolist()
    (torch.Size([2, 5]), [1.0, 1.0])
    """

    def __init__(self, gradient: Literal["reinmax", "straight"] = "reinmax", tau: float = 1.0):
        super().__init__()
        if gradient not in ("reinmax", "straight"):
            raise LayerwiseError(f"gradient is {gradient!r}; choose reinmax or straight.")
        least = 1.0 if gradient == "reinmax" else 0.0
        if not tau >= least or tau == 0:
            raise LayerwiseError(
                f"tau is {tau}; the temperature of {gradient} is {'at least 1' if least else 'above 0'}."
            )
        self.gradient, self.tau = gradient, tau

    def forward(self, logits: Tensor) -> Tensor:
        """Draw from logits `(..., K)`: one-hot `(..., K)`."""
        soft = logits.detach().float().softmax(-1)
        index = torch.multinomial(soft.flatten(0, -2), 1).view(soft.shape[:-1]) if self.training else soft.argmax(-1)
        hard = torch.zeros_like(logits).scatter_(-1, index[..., None], 1.0)
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return hard
        if self.gradient == "reinmax":
            return _ReinMax.apply(logits, hard, self.tau)[0]  # pyright: ignore[reportOptionalSubscript]
        surrogate = (logits / self.tau).softmax(-1)
        return hard + surrogate - surrogate.detach()
