"""VeLoRA: a linear layer that keeps one number per group of its inputs."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.once import once_differentiable
from layerwise.errors import LayerwiseError


class _Projected(torch.autograd.Function):
    """A linear layer that keeps projections of its input for the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, direction: Tensor, scale: float) -> Tensor:
        z = x.reshape(-1, direction.numel()) @ direction.to(x.dtype)
        # (tokens, groups), in half precision as in the paper; a bfloat16 projection keeps its range
        z = z.view(x.shape[:-1].numel(), -1).to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16)
        ctx.save_for_backward(z, weight, direction)
        ctx.scale, ctx.biased, ctx.of = scale, bias is not None, x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, weight, direction = ctx.saved_tensors
        dy = gradients[0]
        dx = (dy @ weight.to(dy.dtype)).to(ctx.of) if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1]).to(weight.dtype)
        dw = db = None
        if ctx.needs_input_grad[1]:  # dy^T (z v^T), group by group, without the tensor in brackets
            dw = ctx.scale * ((rows.T @ z.to(weight.dtype))[..., None] * direction.to(weight.dtype)).flatten(1)
        if ctx.biased and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None, None


class VeLoRALinear(nn.Linear):
    r"""A linear layer whose weight learns from rank-1 projections of its input; everything else is exact.

    The input of a token is cut into G sub-tokens of D / G numbers. Of each, $z = x^\top v$ is kept, in half precision.
    The unit vector v is the same for all: the normalised mean over the sub-tokens of the first batch, which then stays
    fixed. The gradients are

    $$\mathrm{d}X = \mathrm{d}Y\, W, \qquad \mathrm{d}W = s\, \mathrm{d}Y^\top \hat X, \quad \hat X = z v^\top,
      \qquad \mathrm{d}b = \sum \mathrm{d}Y$$

    so that 2 bytes are kept for D / G numbers.

    Args:
        groups: G, a divisor of `in_features`.
        scale: s; 1 for training from scratch, 0.1 for fine-tuning in the paper.

    Raises:
        LayerwiseError: G does not divide the inputs.

    Source: Miles et al. 2024, "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections".

    >>> layer, x = VeLoRALinear(8, 3, groups=2), torch.randn(5, 8)
    >>> torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    True
    """

    direction: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        groups: int = 32,
        scale: float = 1.0,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if groups < 1 or in_features % groups:
            raise LayerwiseError(f"{groups} groups do not divide {in_features} inputs; choose a divisor.")
        self.groups, self.scale = groups, scale
        self.register_buffer("direction", torch.zeros(in_features // groups, device=device, dtype=dtype))
        self._known: int | None = None
        """`id` of the buffer that is known to hold a direction; another buffer may have been loaded, or be a copy."""

    @classmethod
    def of(cls, linear: nn.Linear, groups: int = 32, scale: float = 1.0) -> Self:
        """The same layer with the same parameters."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", None, groups, scale)
        made.weight, made.bias = linear.weight, linear.bias
        made.direction = torch.zeros_like(linear.weight[0, : linear.in_features // groups])
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        exact = not (torch.is_grad_enabled() and self.weight.requires_grad)
        if exact or (self._known != id(self.direction) and not self._has_direction(input.detach())):
            return super().forward(input)
        given = (input, self.weight, self.bias, self.direction, self.scale)
        return _Projected.apply(*given)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _has_direction(self, x: Tensor) -> bool:
        """Whether there is a direction; the first batch in training sets it. Later steps do not check again."""
        if not bool(self.direction.any()):
            if not self.training:
                return False
            self.direction.copy_(F.normalize(x.reshape(-1, self.direction.numel()).float().mean(0), dim=0))
        self._known = id(self.direction)
        return True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, groups and scale."""
        return f"{super().extra_repr()}, groups={self.groups}, scale={self.scale}"
