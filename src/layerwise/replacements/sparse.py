"""Bi-Mask: a linear layer that is N:M sparse in the forward pass and, towards its input, in the backward pass."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.once import once_differentiable
from layerwise.errors import LayerwiseError

RENEWED = 100
"""Forward passes in training between two reorderings of the rows."""
TRIED = 100
"""Number of orders of the rows to try; the one with the most surviving weights is used."""
DECAY = 2e-4
"""Decay of masked weights (SR-STE)."""


def largest(weight: Tensor, n: int, m: int) -> Tensor:
    """A mask of the n largest magnitudes of every m neighbours along the last dimension.

    >>> largest(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    pieces = weight.detach().abs().unflatten(-1, (-1, m))
    kept = torch.zeros_like(pieces, dtype=torch.bool)
    return kept.scatter_(-1, pieces.topk(n, dim=-1).indices, True).flatten(-2)


class _Masked(torch.autograd.Function):
    """A linear layer with one mask for its output, another for its input's gradient, and none for its weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mask, back)
        ctx.biased = bias is not None
        return F.linear(x, weight * mask, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mask, back = ctx.saved_tensors
        dy = gradients[0]
        dx = (dy @ (weight * back).to(dy.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1]).to(weight.dtype)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = rows.T @ x.reshape(-1, x.shape[-1]).to(weight.dtype) + DECAY * (~mask * weight)
        return dx, dw, rows.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None, None, None


class BiMaskLinear(nn.Linear):
    r"""A linear layer that keeps N of every M weights, in both directions.

    Forward: $y = (W \odot m) x$, where m keeps the N largest of every M weights of a row. Backward: $dx = (W \odot m
    \odot b)^\top dy$, where b keeps N of every M of a column of $W \odot m$ after its rows are put into another order,
    so that this product is N:M sparse too. $dW = dy\, x^\top + \lambda (1 - m) \odot W$ is dense, so that weights can
    come back. The order of the rows is the best of 100 random ones, and is renewed every 100 forward passes.

    The masks are computed and applied by dense operations. Sparse kernels would be faster; this layer is not.

    Args:
        n: weights that are kept of every m.
        m: a divisor of `in_features` and `out_features`.

    Raises:
        LayerwiseError: m does not divide them, or n is not below m.

    Source: Zhang et al. 2023, "Bi-directional Masks for Efficient N:M Sparse Training"; the code of its authors.

    >>> layer = BiMaskLinear(8, 4, bias=False)
    >>> int((layer(torch.eye(8)) != 0).sum())  # half of 32
    16
    """

    order: Tensor
    passes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        n: int = 2,
        m: int = 4,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if not 0 < n < m or in_features % m or out_features % m:
            raise LayerwiseError(
                f"{n}:{m} does not fit a layer of {in_features} inputs and {out_features} outputs; m has to divide "
                "both, and n to lie below m."
            )
        self.n, self.m = n, m
        self.register_buffer("order", torch.arange(out_features, device=device))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64, device=device))
        self._passes: int | None = None
        """The same number on the host, so that nothing waits for the device; None after loading a state."""

    @classmethod
    def of(cls, linear: nn.Linear, n: int = 2, m: int = 4) -> Self:
        """The same layer with the same parameters."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", None, n, m)
        made.weight, made.bias = linear.weight, linear.bias
        made.order = torch.arange(linear.out_features, device=linear.weight.device)
        made.passes = torch.zeros((), dtype=torch.int64, device=linear.weight.device)
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        mask = largest(self.weight, self.n, self.m)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(input, self.weight * mask, self.bias)
        if self.training:
            before = int(self.passes) if self._passes is None else self._passes
            if before % RENEWED == 0:
                self._reorder(mask)
            self._passes = before + 1
            self.passes.fill_(self._passes)
        back = self._backward_mask(mask, self.order)
        return _Masked.apply(input, self.weight, self.bias, mask, back)  # pyright: ignore[reportReturnType]

    def _backward_mask(self, mask: Tensor, order: Tensor) -> Tensor:
        """The mask b where m holds too, in the original order of the rows."""
        turned = (self.weight.detach() * mask)[order].T
        found = torch.empty_like(mask)
        found[order] = largest(turned, self.n, self.m).T
        return found & mask

    @torch.no_grad()
    def _reorder(self, mask: Tensor) -> None:
        """Take the best of some random orders, on the device, so that nothing waits."""
        best, kept = self.order.clone(), self._backward_mask(mask, self.order).sum()
        for _ in range(TRIED):
            order = torch.randperm(len(best), device=best.device)
            survive = self._backward_mask(mask, order).sum()
            best, kept = torch.where(survive > kept, order, best), torch.maximum(survive, kept)
        self.order.copy_(best)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._passes = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, n and m."""
        return f"{super().extra_repr()}, n={self.n}, m={self.m}"
