"""Objectives of a linear readout in chunks of predictions, so that the logits of all of them never exist at once."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.functional import without_autocast
from layerwise.core.once import once_differentiable

LOGITS = 2**22
"""Default number of logits that exist at once: 16 MiB in float32."""


@dataclass(frozen=True, eq=False)
class LinearOutputs:
    """Outputs `features @ weight.T + bias` that are not computed yet.

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


@dataclass(frozen=True, eq=False)
class Aligned:
    r"""The term that an objective adds to the cross-entropy: the divergence from a neighbour's detached posterior.

    $$w \, \mathrm{CE}(q, y) + \lambda \, D(p, q), \qquad q = \mathrm{softmax}(z), \; p = \mathrm{softmax}(u)$$

    With $r = \mathrm{softmax}(\tfrac12 (z + u))$ the Bhattacharyya coefficient is that of the logits themselves, and so
    are the gradients on z:

    $$\log BC(p, q) = \mathrm{lse}(\tfrac12 (z + u)) - \tfrac12 (\mathrm{lse}(z) + \mathrm{lse}(u)), \qquad
      \nabla \log BC = \tfrac12 (r - q), \qquad \nabla KL(p \,\|\, q) = q - p$$
    """

    before: LinearOutputs
    """The neighbour's outputs u, of the same predictions."""
    surrogate: str
    """The divergence D: `neg_log_bc`, `one_minus_bc`, `hellinger` or `kl`."""
    weight: float
    """Its weight lambda."""

    def divergence(self, part: slice, z: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a chunk: D of every prediction `(n,)`, and k `(n,)` and t `(n, K)` of its gradient on z, k (q - t)."""
        before = self.before
        with without_autocast(z):
            u = F.linear(before.features[part], before.weight, before.bias).to(z.dtype)
        log_sum_u = u.logsumexp(-1)
        if self.surrogate == "kl":
            log_ratio = u - z  # log p - log q, up to a constant
            p = u.sub_(log_sum_u[:, None]).exp_()
            return log_ratio.mul_(p).sum(-1) + log_sum - log_sum_u, torch.ones_like(log_sum), p
        middle = u.add_(z).mul_(0.5)
        log_sum_middle = middle.logsumexp(-1)
        log_bc = log_sum_middle - 0.5 * (log_sum + log_sum_u)
        r = middle.sub_(log_sum_middle[:, None]).exp_()
        if self.surrogate == "neg_log_bc":
            return -log_bc, torch.full_like(log_bc, 0.5), r
        bc = log_bc.exp()
        if self.surrogate == "one_minus_bc":
            return 1 - bc, 0.5 * bc, r
        distance = (1 - bc).clamp_min(1e-7).sqrt()  # as in `posteriors.divergence`
        return distance, torch.where(1 - bc < 1e-7, 0.0, 0.25 * bc / distance), r


def objective(
    outputs: LinearOutputs,
    y: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore: int = -100,
    chunk: int | None = None,
    likelihood_weight: float = 1.0,
    aligned: Aligned | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Mean cross-entropy, or $w \, \mathrm{CE} + \lambda D$ with a neighbour (see `Aligned`), chunk after chunk.

    The cross-entropy and its gradients are those of `torch.nn.functional.cross_entropy` on `outputs.whole()`, in
    float32 or wider. The gradient on a chunk's logits is known as soon as the chunk is,
    $s_i\,\mathrm{softmax}(z_i) - t_i$ with target $t_i$ of sum $s_i$; it is multiplied into those of features, weight
    and bias at once, and the logits are forgotten. Beside these gradients two chunks of logits are in memory at a time,
    with a neighbour three. The backward pass can be made once. The divergence is averaged as the cross-entropy is: over
    the predictions that count, with the weights of their classes.

    Args:
        outputs: of N predictions in all.
        y: class numbers, `(...)`; `ignore` for a prediction that does not count.
        weights: one per class, `(K,)`.
        label_smoothing: share of the target that is spread evenly over the classes.
        ignore: the label of predictions that do not count.
        chunk: predictions at a time (default: as many as have `LOGITS` logits).
        likelihood_weight: w.
        aligned: the neighbour and lambda (default: none).

    Returns:
        The objective, a scalar in float32 or wider; then without history the mean cross-entropy, the mean divergence (0
        without a neighbour), the plain sum of $-\log p_i[y_i]$, and how many predictions are right, an int64 scalar.

    >>> outputs = LinearOutputs(torch.ones(4, 2), torch.zeros(10, 2))
    >>> loss, _, _, nats, right = objective(outputs, torch.tensor([0, 0, 3, -100]), chunk=3)
    >>> round(float(loss), 4), round(float(nats), 4), int(right)  # ln 10; among equal logits the first is predicted
    (2.3026, 6.9078, 2)
    """
    features, y = outputs.features.flatten(0, -2), y.flatten()
    chunk = chunk or max(1, LOGITS // outputs.weight.shape[0])
    if aligned is not None:
        before = aligned.before
        before = LinearOutputs(before.features.detach().flatten(0, -2), before.weight.detach(), _detached(before.bias))
        aligned = replace(aligned, before=before)
    # Inside of `apply` gradients are always off.
    learns = torch.is_grad_enabled()
    given = (features, outputs.weight, outputs.bias, y, weights, label_smoothing, ignore, chunk, learns)
    return _Chunked.apply(*given, likelihood_weight, aligned)  # pyright: ignore[reportReturnType]


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


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
        likelihood_weight: float,
        aligned: Aligned | None,
    ) -> tuple[Tensor, ...]:
        # Sums, in float32 or wider: a gradient that is divided by the number of predictions may vanish in fp16.
        gradients = [
            torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
            if t is not None and wanted and learns
            else None
            for t, wanted in zip((features, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        kind = torch.promote_types(features.dtype, torch.float32)
        total, mass, nats, apart = features.new_zeros(4, dtype=kind)
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
            k = target = None
            if aligned is not None:
                distance, k, target = aligned.divergence(part, z, log_sum)
                apart, k = apart + (own * distance).sum(), aligned.weight * own * k
            if not any(g is not None for g in gradients):
                continue
            # From here on `z` is the gradient on the chunk's logits.
            if likelihood_weight != 1:
                size, sure = likelihood_weight * size, likelihood_weight * sure
            z.sub_(log_sum[:, None]).exp_().mul_((size if k is None else size + k)[:, None])
            z.scatter_add_(1, place, -sure[:, None])
            if smoothing:
                z.addcmul_(counts[:, None], every[None], value=-spread * likelihood_weight)
            if k is not None and target is not None:
                z.addcmul_(k[:, None], target, value=-1)
            del target
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
        likelihood, apart = total / mass, apart / mass
        found = likelihood.clone() if likelihood_weight == 1 else likelihood_weight * likelihood
        if aligned is not None:
            found = found + aligned.weight * apart
        ctx.mark_non_differentiable(likelihood, apart, nats, right)
        return found, likelihood, apart, nats, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("a loss in chunks cannot be run backward a second time: its gradients are used up.")
        gradients, ctx.gradients = ctx.gradients, None
        scale = cotangents[0] / ctx.mass
        # In place: nothing else refers to them, and the weight's gradient is as large as the weight.
        found = [None if g is None else g.mul_(scale).to(kind) for g, kind in zip(gradients, ctx.kinds, strict=True)]
        return (*found, *[None] * 8)
