"""Cross-entropy of a linear readout in chunks of predictions, so that the logits of all of them never exist at once."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**22
"""Logits that exist at once where nothing else is said: 16 MiB in float32."""


@dataclass(frozen=True, eq=False)
class LinearOutputs:
    """Outputs `features @ weight.T + bias` that nobody has computed yet.

    >>> LinearOutputs(torch.ones(2, 3, 4), torch.ones(5, 4)).whole().shape
    torch.Size([2, 3, 5])
    """

    features: Tensor
    """What the layer reads, `(..., D)`."""
    weight: Tensor
    """Its matrix, `(K, D)`."""
    bias: Tensor | None = None
    """Its bias, `(K,)`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the outputs, `(..., K)`."""
        return (*self.features.shape[:-1], self.weight.shape[0])

    def whole(self) -> Tensor:
        """All outputs, `(..., K)`."""
        return F.linear(self.features, self.weight, self.bias)


def cross_entropy(
    outputs: LinearOutputs,
    y: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore: int = -100,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean cross-entropy, the plain sum of $-\log p_i[y_i]$, and how many predictions are right, chunk after chunk.

    Loss and gradients are those of `torch.nn.functional.cross_entropy` on `outputs.whole()`, in float32 or wider. The
    gradient on a chunk's logits is known as soon as the chunk is, $s_i\,\mathrm{softmax}(z_i) - t_i$ with target $t_i$
    of sum $s_i$; it is multiplied into those of features, weight and bias at once, and the logits are forgotten. Beside
    these gradients two chunks of logits are in memory at a time. The backward pass can be made once.

    Args:
        outputs: of N predictions in all.
        y: class numbers, `(...)`; `ignore` for a prediction that does not count.
        weights: one per class, `(K,)`.
        label_smoothing: share of the target that is spread evenly over the classes.
        ignore: the label that counts in nothing.
        chunk: predictions at a time; as many as have `LOGITS` logits if not given.

    Returns:
        The loss, a scalar in float32 or wider; the sum, without weights and smoothing, and an int64 scalar, without
        history.

    >>> outputs = LinearOutputs(torch.ones(4, 2), torch.zeros(10, 2))
    >>> loss, nats, right = cross_entropy(outputs, torch.tensor([0, 0, 3, -100]), chunk=3)
    >>> round(float(loss), 4), round(float(nats), 4), int(right)  # ln 10; among equal logits the first is predicted
    (2.3026, 6.9078, 2)
    """
    features, y = outputs.features.flatten(0, -2), y.flatten()
    chunk = chunk or max(1, LOGITS // outputs.weight.shape[0])
    # Inside of `apply` gradients are always off.
    learns = torch.is_grad_enabled()
    given = (features, outputs.weight, outputs.bias, y, weights, label_smoothing, ignore, chunk, learns)
    return _Chunked.apply(*given)  # pyright: ignore[reportReturnType]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        weights: Tensor | None,
        smoothing: float,
        ignore: int,
        chunk: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Sums, in float32 or wider: a gradient that is divided by the number of predictions may vanish in fp16.
        gradients = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
            if t is not None and wanted and learns
            else None
            for t, wanted in zip((features, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        kind = torch.promote_types(features.dtype, torch.float32)
        total, mass, nats = features.new_zeros(3, dtype=kind)
        right = torch.zeros((), dtype=torch.int64, device=features.device)
        spread = smoothing / weight.shape[0]
        weights = None if weights is None else weights.to(kind)
        every = features.new_ones(weight.shape[0], dtype=kind) if weights is None else weights
        for start in range(0, len(features), chunk):
            part = slice(start, start + chunk)
            x, labels = features[part], y[part]
            there = labels != ignore
            place = labels.clamp_min(0)[:, None] if ignore < 0 else labels.masked_fill(~there, 0)[:, None]
            counts = there.to(kind)  # a bool times a number would be of the default type
            made = F.linear(x, weight, bias)
            low, z = made.dtype, made.to(kind)
            del made
            right += ((z.argmax(-1) == labels) & there).sum()
            own = counts if weights is None else weights[place[:, 0]] * counts
            mass = mass + own.sum()
            log_sum = z.logsumexp(-1)
            sure = (1 - smoothing) * own  # of the target, on the label
            surprise = log_sum - z.gather(1, place)[:, 0]
            nats = nats + (surprise * counts).sum()
            each = sure * surprise
            size = sure
            if smoothing:
                each = each + spread * counts * (log_sum * every.sum() - z @ every)
                size = sure + spread * counts * every.sum()
            total = total + each.sum()
            if not any(g is not None for g in gradients):
                continue
            # From here on `z` is the gradient on the chunk's logits.
            z.sub_(log_sum[:, None]).exp_().mul_(size[:, None])
            z.scatter_add_(1, place, -sure[:, None])
            if smoothing:
                z.addcmul_(counts[:, None], every[None], value=-spread)
            z = z.to(low)
            if gradients[0] is not None:
                gradients[0][part] = z @ weight
            if gradients[1] is not None:
                if z.dtype == x.dtype == gradients[1].dtype:
                    gradients[1].addmm_(z.T, x)
                else:
                    gradients[1] += z.T @ x
            if gradients[2] is not None:
                gradients[2] += z.sum(0)
        ctx.gradients, ctx.mass = gradients, mass
        ctx.kinds = [None if t is None else t.dtype for t in (features, weight, bias)]
        ctx.mark_non_differentiable(nats, right)
        return total / mass, nats, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("a loss in chunks cannot be run backward a second time: its gradients are used up.")
        gradients, ctx.gradients = ctx.gradients, None
        scale = cotangents[0] / ctx.mass
        # In place: nobody else has them, and the weight's is as large as the weight.
        found = [None if g is None else g.mul_(scale).to(kind) for g, kind in zip(gradients, ctx.kinds, strict=True)]
        return (*found, None, None, None, None, None, None)
