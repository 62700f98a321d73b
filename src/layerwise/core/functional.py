"""Pure mathematics of the learning rules: functions of tensors, without state."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import LayerwiseError

GRID = 4096  # numbers that `pool_features(h, "grid")` leaves at most


def wide(x: Tensor) -> Tensor:
    """Numbers in float32, or in float64 where they are: losses and sums of float64 keep it, those of less gain.

    >>> [wide(torch.ones(1, dtype=kind)).dtype for kind in (torch.bfloat16, torch.float64, torch.int64)]
    [torch.float32, torch.float64, torch.float32]
    """
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def side_by_side(*parts: Tensor) -> Tensor:
    """One row per sample with all of its parts, `(B, ...)` each, in float32 or wider.

    >>> side_by_side(torch.zeros(2, 1), torch.ones(2, 2, 2)).shape
    torch.Size([2, 5])
    """
    return torch.cat([wide(part.flatten(1)) for part in parts], dim=1)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on tensors such as `x` have the precision of their operands."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def log_bhattacharyya(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Logarithm of the Bhattacharyya coefficient of two categorical distributions.

    $\log BC(p, q) = \log \sum_k \sqrt{p_k q_k}$, evaluated stably as
    $\operatorname{logsumexp}_k \tfrac12 (\log p_k + \log q_k)$. It is 0 for $p = q$ and negative otherwise.

    Args:
        log_p: log-probabilities, shape `(..., K)`.
        log_q: log-probabilities, shape `(..., K)`.

    Returns:
        A tensor of shape `(...)`, in nats.

    >>> p = torch.tensor([0.5, 0.5]).log()
    >>> float(log_bhattacharyya(p, p).abs()) < 1e-6
    True
    """
    return torch.logsumexp(0.5 * (log_p + log_q), dim=-1)


def neg_log_bc(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Bhattacharyya distance $-\log BC(p, q)$ of log-probabilities `(..., K)`; shape `(...)`."""
    return -log_bhattacharyya(log_p, log_q)


def one_minus_bc(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Squared Hellinger distance $1 - BC(p, q)$ of log-probabilities `(..., K)`; shape `(...)`."""
    return 1.0 - log_bhattacharyya(log_p, log_q).exp()


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Hellinger distance $\sqrt{1 - BC(p, q)}$ of log-probabilities `(..., K)`; shape `(...)`.

    The square root has no derivative at $p = q$; below $1 - BC = 10^{-7}$ the gradient is set to zero.
    """
    return one_minus_bc(log_p, log_q).clamp_min(1e-7).sqrt()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence $KL(p \| q) = \sum_k p_k (\log p_k - \log q_k)$; shape `(...)`."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def pool_features(h: Tensor, pool: str) -> Tensor:
    """Reduce a block's output to one vector per prediction.

    Args:
        h: in the standard order of `layerwise.core.layout`: `(B, D)`, `(B, T, D)`, `(B, C, H, W)` or a volume
            `(B, C, D, H, W)`.
        pool: `"mean"` averages over space or tokens, `"moments"` gives mean and standard deviation over them
            (2 C or 2 D numbers), `"grid"` averages an image over the cells of the finest square grid that leaves
            at most 4096 numbers (tokens as `"mean"`), `"cls"` takes the first token, `"none"` keeps every position
            (a language model), `"flatten"` keeps everything in one vector.

    Returns:
        `(B, D)`, or `(B, ..., D)` for `"none"` on tokens and images.

    Raises:
        LayerwiseError: `"cls"` of what are no tokens.

    >>> pool_features(torch.ones(2, 3, 4, 4), "mean").shape
    torch.Size([2, 3])
    >>> pool_features(torch.ones(2, 256, 8, 8), "grid").shape  # 4 x 4 cells
    torch.Size([2, 4096])
    """
    if pool == "flatten":
        return h.flatten(1)
    if h.dim() <= 2:
        return h
    if pool == "none":
        return h.movedim(1, -1) if h.dim() >= 4 else h
    if pool == "cls":
        if h.dim() != 3:
            raise LayerwiseError(
                f"pool='cls' takes the first token, and an output of shape (B, {', '.join(map(str, h.shape[1:]))}) has "
                "none; use pool='mean'."
            )
        return h[:, 0]
    places = tuple(range(2, h.dim())) if h.dim() >= 4 else (1,)
    if pool == "grid" and h.dim() >= 4:
        cells = GRID // h.shape[1]
        finest = math.isqrt(cells) if h.dim() == 4 else round(cells ** (1 / 3) + 1e-9 - 0.5)
        side = max(min(finest, *h.shape[2:]), 1)
        pooled = F.adaptive_avg_pool2d(h, side) if h.dim() == 4 else F.adaptive_avg_pool3d(h, side)
        return pooled.flatten(1)
    if pool in ("mean", "grid"):
        return h.mean(places)
    variance, mean = torch.var_mean(wide(h), places, correction=0)
    return torch.cat([mean, (variance + 1e-5).sqrt()], dim=-1).to(h.dtype)


def normalise(h: Tensor, norm: str, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension without parameters.

    Args:
        h: `(..., D)`.
        norm: `"layer"` (zero mean, unit variance), `"rms"` (unit root mean square) or `"none"`.
        eps: added to the variance.
    """
    if norm == "layer":
        return F.layer_norm(h, h.shape[-1:], eps=eps)
    if norm == "rms":
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h


def goodness(h: Tensor, kind: str) -> Tensor:
    """Activity of a block per sample: the sum or the mean of the squares of all its units, in float32 or wider.

    Args:
        h: `(B, ...)`.
        kind: `"sum"` or `"mean"`.

    Returns:
        `(B,)`.

    >>> goodness(torch.tensor([[3.0, 4.0]]), "sum"), goodness(torch.tensor([[3.0, 4.0]]), "mean")
    (tensor([25.]), tensor([12.5000]))
    """
    squares = wide(h).flatten(1).square()
    return squares.sum(1) if kind == "sum" else squares.mean(1)


def unit_length(h: Tensor) -> Tensor:
    """Each sample of `(B, ...)` divided by the root mean square of all its units: its goodness is gone."""
    return normalise(wide(h.flatten(1)), "rms").view_as(h).to(h.dtype)


def similarity(x: Tensor) -> Tensor:
    """Cosine similarities of the rows of `(B, D)` after each row's own mean is taken off, `(B, B)`, float32 or wider.

    >>> similarity(torch.eye(3))[0]  # two classes out of K: -1 / (K - 1)
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    centred = wide(x) - wide(x).mean(1, keepdim=True)
    directions = F.normalize(centred, dim=1)
    with without_autocast(x):
        return directions @ directions.T


def supervised_contrastive(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    r"""Supervised contrastive loss: samples of one class are near one another, among all others of the batch.

    $$\frac{1}{|A|} \sum_{i \in A} \frac{-1}{|P_i|} \sum_{p \in P_i}
      \log \frac{\exp(\hat z_i \cdot \hat z_p / \tau)}{\sum_{a \ne i} \exp(\hat z_i \cdot \hat z_a / \tau)}$$

    $\hat z$ has unit length, $P_i$ are the other samples of the class of i, A the samples that have such
    others (the loss is 0 where there is none). Source: Khosla et al., arXiv 2004.11362 (2020), equation 2.

    Args:
        z: `(B, D)`.
        y: labels `(B,)`.
        temperature: $\tau$.

    Returns:
        A scalar, in float32 or wider.

    >>> z = torch.eye(2).repeat(2, 1)  # its own class at 1, the two others at 0
    >>> round(float(supervised_contrastive(z, torch.tensor([0, 1, 0, 1]), 1.0)), 4)  # ln(e + 2) - 1
    0.5514
    """
    directions = F.normalize(wide(z), dim=1)
    with without_autocast(z):
        scores = directions @ directions.T / temperature
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    log_p = scores - scores.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
    same = (y[:, None] == y) & ~itself
    others = same.sum(1)
    mean = torch.where(same, log_p, 0.0).sum(1) / others.clamp_min(1)
    return -mean.sum() / (others > 0).sum().clamp_min(1)


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    r"""SimCLR's loss: each view is near the other view of its sample, among all others of the batch.

    $$\frac{1}{2B} \sum_a -\log \frac{\exp(\hat z_a \cdot \hat z_{a'} / \tau)}
      {\sum_{b \ne a} \exp(\hat z_a \cdot \hat z_b / \tau)}$$

    $\hat z$ has unit length, $a' = a \pm B$. It is the supervised contrastive loss where a sample is a class.
    Source: Chen et al., arXiv 2002.05709 (2020), equation 1.

    Args:
        z: `(2 B, D)`, second views after the first ones, in the same order.
        temperature: $\tau$.

    Returns:
        A scalar, in float32 or wider.

    >>> round(float(nt_xent(torch.ones(6, 2), 0.1)), 4)  # ln 5: nothing distinguishes the views
    1.6094
    """
    return supervised_contrastive(z, torch.arange(len(z) // 2, device=z.device).repeat(2), temperature)


def matched(z: Tensor) -> Tensor:
    """Share of the views `(2 B, D)`, ordered as for `nt_xent`, whose nearest other view is of their own sample.

    >>> matched(torch.eye(3).repeat(2, 1))
    tensor(1.)
    """
    directions = F.normalize(wide(z), dim=1)
    with without_autocast(z):
        nearest = (directions @ directions.T).fill_diagonal_(-math.inf).argmax(1)
    own = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return (nearest == own).float().mean()


def newton_step(f: Tensor, total: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    r"""Slope and curvature of the cross-entropy of $F + \rho f$ at $\rho = 0$; Newton's $\rho$ is their quotient.

    The slope is $\langle f \cdot r \rangle$ with the residual $r = y - p$, $p = \mathrm{softmax}(F)$, the curvature
    $\langle \sum_k p_k f_k^2 - (\sum_k p_k f_k)^2 \rangle$, means over the batch.

    Args:
        f: direction `(B, K)`.
        total: F `(B, K)`.
        residual: r `(B, K)`.

    Returns:
        Two scalars; the slope counts downhill.

    >>> slope, curvature = newton_step(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2), torch.tensor([[0.5, -0.5]]))
    >>> float(slope), float(curvature)
    (1.0, 1.0)
    """
    p = total.softmax(-1)
    centred = f - (p * f).sum(-1, keepdim=True)
    return (f * residual).sum(-1).mean(), (p * centred.square()).sum(-1).mean()


def signal_share(t: int, steps: int) -> float:
    r"""Share of the signal in a diffusion that runs from noise to signal: a cosine that reaches neither 0 nor 1.

    $\bar\alpha_t = \cos^2\big(\frac{\pi}{2}(1 - \frac{t + 1}{T + 2})\big)$ for t = 0 .. T = `steps`: $z_t$ is
    $\sqrt{\bar\alpha_t}\, u + \sqrt{1 - \bar\alpha_t}\, \epsilon$.

    >>> round(signal_share(0, 10), 3), round(signal_share(10, 10), 3)
    (0.017, 0.983)
    """
    return math.cos(math.pi / 2 * (1 - (t + 1) / (steps + 2))) ** 2


def denoising_step(t: int, steps: int) -> tuple[float, float, float]:
    r"""Factors of $z_t = A\, u + B\, z_{t-1} + \sqrt C\, \epsilon$, the t-th step of that diffusion towards a signal u.

    With $\alpha = \bar\alpha_{t-1} / \bar\alpha_t$: $A = \sqrt{\bar\alpha_t}\,(1 - \alpha) / (1 - \bar\alpha_{t-1})$,
    $B = \sqrt{\alpha}\,(1 - \bar\alpha_t) / (1 - \bar\alpha_{t-1})$,
    $C = (1 - \bar\alpha_t)(1 - \alpha) / (1 - \bar\alpha_{t-1})$.

    >>> a, b, c = denoising_step(3, 10)
    >>> abs(a + b * signal_share(2, 10) ** 0.5 - signal_share(3, 10) ** 0.5) < 1e-12  # a chain keeps its share
    True
    """
    before, after = signal_share(t - 1, steps), signal_share(t, steps)
    alpha = before / after
    a = math.sqrt(after) * (1 - alpha) / (1 - before)
    return a, math.sqrt(alpha) * (1 - after) / (1 - before), (1 - after) * (1 - alpha) / (1 - before)


def mixture(p: Tensor, rows: Tensor) -> Tensor:
    r"""$\sum_k p_k u_k$ of coefficients `(B, K)` and rows u `(K, D)`: `(B, D)`, in the wider precision of both.

    >>> mixture(torch.tensor([[0.5, 0.5]]), torch.eye(2))
    tensor([[0.5000, 0.5000]])
    """
    with without_autocast(p):
        kind = torch.promote_types(p.dtype, rows.dtype)
        return p.to(kind) @ rows.to(kind)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    r"""$\|a_i - b_j\|^2$ of rows `(N, D)` and `(M, D)`: `(N, M)`, in the wider precision of both.

    >>> squared_distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor([[25.,  1.]])
    """
    with without_autocast(a):
        kind = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(kind), b.to(kind)
        return a.square().sum(1, keepdim=True) - 2 * a @ b.T + b.square().sum(1)


def prior_divergence(u: Tensor, share: Tensor | float) -> Tensor:
    r"""$KL(N(\sqrt{\bar\alpha}\, u, (1 - \bar\alpha) I) \,\|\, N(0, I))$ for each row of u `(B, D)`: `(B,)`, in nats.

    It is $\frac12 (\bar\alpha \|u\|^2 - D \bar\alpha - D \log(1 - \bar\alpha))$; `share` is $\bar\alpha$, a number.

    >>> float(prior_divergence(torch.ones(1, 3), 0.0))
    0.0
    """
    share, size = torch.as_tensor(share, dtype=u.dtype, device=u.device), u.shape[1]
    return (share * u.square().sum(1) - size * share - size * torch.log1p(-share)) / 2


def medoid(x: Tensor) -> int:
    """Index of the row of `(N, D)` whose median distance to the others is smallest (of two in the middle, the larger).

    >>> medoid(torch.tensor([[0.0], [9.0], [4.0], [6.0]]))
    3
    """
    distances = torch.cdist(wide(x), wide(x)).fill_diagonal_(math.inf)
    return int(distances.median(1).values.argmin())


def integrate(velocity: Callable[[Tensor, float], Tensor], z: Tensor, steps: int, solver: str) -> Tensor:
    """Follow $dz/dt$ = `velocity(z, t)` from t = 0 to t = 1 in equal steps.

    Args:
        velocity: a function of z and t, of the shape of z.
        z: where it starts.
        steps: how many.
        solver: `"euler"`, or `"heun"` (second order, two velocities per step).

    >>> integrate(lambda z, t: torch.tensor(2 * t), torch.tensor(0.0), 4, "heun")
    tensor(1.)
    """
    for i in range(steps):
        now = velocity(z, i / steps)
        if solver == "heun":
            now = (now + velocity(z + now / steps, (i + 1) / steps)) / 2
        z = z + now / steps
    return z
