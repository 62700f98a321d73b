"""The networks of NoProp: they take the image and denoise a label, step by step or at any time."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.functional import denoising_step, mixture, side_by_side, squared_distances
from layerwise.models.base import BlockSequential, ModelOptions, assemble, check_sizes, require

WAVES = 8  # pairs of sine and cosine that encode the time
TOP = 3.0  # log SNR at t = 1 in continuous time; at t = 0 it is minus this


class Denoiser(nn.Module):
    """Logits of the classes, computed from a noisy label z = p U + r, the image x and, where `timed`, the time t.

    Rows of U `(K, D)` are the embeddings of the classes: a copy, which does not learn here. The state is
    `[p | r | x]` or `[t | p | r | x]`, p with K, r with D columns.
    """

    embedding: Tensor
    trained_as: ClassVar[str]
    """Name of the model, for the rule that trains it."""

    def __init__(self, shape: tuple[int, int, int], embedding: Tensor, options: "NoProp", timed: bool):
        super().__init__()
        self.shape = shape
        self.register_buffer("embedding", embedding.clone())
        classes, size = embedding.shape
        features, norm = 8 * options.width, not timed
        self.columns = [*([1] if timed else []), classes, size, math.prod(shape)]
        self.image = _looks(shape, options, norm)
        if options.labels == "prototype":
            self.label: nn.Module = nn.Sequential(nn.Unflatten(1, shape), _looks(shape, options, norm))
        else:
            self.label = _Residual(size, features)
        self.time = nn.Sequential(nn.Linear(2 * WAVES, features), nn.ReLU()) if timed else None
        self.joined = nn.Sequential(
            nn.Linear((3 if timed else 2) * features, features),
            *([nn.BatchNorm1d(features)] if norm else []),
            nn.ReLU(),
            *([nn.Dropout(options.dropout)] if options.dropout else []),
            nn.Linear(features, classes),
        )

    def parts(self, h: Tensor) -> tuple[Tensor, ...]:
        """The parts of a state; of images `(B, C, H, W)`, those of a state of zeros with these images."""
        if h.dim() > 2:
            h = side_by_side(h.new_zeros(len(h), sum(self.columns[:-1])), h)
        return h.split(self.columns, dim=1)

    def logits(self, z: Tensor, x: Tensor, *t: Tensor) -> Tensor:
        """Logits `(B, K)` from a label `(B, D)`, an image `(B, CHW)` and, if there is one, the time `(B, 1)`."""
        kind = next(self.joined.parameters()).dtype  # the state may be wider
        found = [self.image(x.view(-1, *self.shape).to(kind)), self.label(z.to(kind))]
        if self.time is not None:
            angles = t[0] * (math.pi * 2.0 ** torch.arange(WAVES, device=z.device))
            found.append(self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(kind)))
        return self.joined(torch.cat(found, dim=1)).to(z.dtype)


class _Residual(nn.Module):
    """A linear layer, and a second one with a skip connection."""

    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, features), nn.Linear(features, features)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.first(z))
        return h + F.relu(self.second(h))


def _looks(shape: tuple[int, int, int], options: "NoProp", norm: bool) -> nn.Sequential:
    """Features of an image: two convolutions and a linear layer, or only a linear layer."""
    width, features = options.width, 8 * options.width
    if options.embedding == "conv":
        layers = [*_convolution(shape[0], width, norm), *_convolution(width, 2 * width, norm), nn.Flatten()]
        inputs = 2 * width * (shape[1] // 4) * (shape[2] // 4)
    else:
        layers, inputs = [nn.Flatten()], math.prod(shape)
    norms = [nn.BatchNorm1d(features)] if norm else []
    return nn.Sequential(*layers, nn.Linear(inputs, features), *norms, nn.ReLU())


def _convolution(inputs: int, outputs: int, norm: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)
    return [convolution, *([nn.BatchNorm2d(outputs)] if norm else []), nn.MaxPool2d(2), nn.ReLU()]


class Denoise(Denoiser):
    """Step t: `[p | r | x]` to `[A q | B z | x]`, where q is a softmax over the classes: z becomes A q U + B z."""

    trained_as: ClassVar[str] = "noprop"

    def __init__(self, t: int, shape: tuple[int, int, int], embedding: Tensor, options: "NoProp"):
        super().__init__(shape, embedding, options, timed=False)
        self.a, self.b, _ = denoising_step(t, options.depth)

    def forward(self, h: Tensor) -> Tensor:
        """The next state."""
        p, r, x = self.parts(h)
        z = mixture(p, self.embedding) + r
        return side_by_side(self.a * self.logits(z, x).softmax(1), self.b * z, x)


class Blend(Denoiser):
    """Step for backpropagation: `[p | r | x]` to `[(1 - a) p + a q | (1 - a) r | x]`, a = tanh(w) with a learned w."""

    trained_as: ClassVar[str] = ""

    def __init__(self, shape: tuple[int, int, int], embedding: Tensor, options: "NoProp"):
        super().__init__(shape, embedding, options, timed=False)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, h: Tensor) -> Tensor:
        """The next state."""
        p, r, x = self.parts(h)
        a = self.weight.tanh()
        q = self.logits(mixture(p, self.embedding) + r, x).softmax(1)
        return side_by_side((1 - a) * p + a * q, (1 - a) * r, x)


class DenoiseAt(Denoiser):
    r"""`[t | p | r | x]` to `[q | 0 | x]`: q is a softmax.

    It is computed from the label $z = \sqrt{\bar\alpha}\, p U + \sqrt{1 - \bar\alpha}\, r$ with $\bar\alpha$ at time t.
    """

    trained_as: ClassVar[str] = "noprop_ct"

    def __init__(self, shape: tuple[int, int, int], embedding: Tensor, options: "NoPropCT"):
        super().__init__(shape, embedding, options, timed=True)
        self.steps = options.depth
        self.schedule = LearnedSchedule() if options.schedule == "learned" else CosineSchedule()

    def forward(self, h: Tensor) -> Tensor:
        """The clear label."""
        t, p, r, x = self.parts(h)
        share = self.schedule(t)[0].sigmoid()
        z = share.sqrt() * mixture(p, self.embedding) + (1 - share).sqrt() * r
        return side_by_side(self.logits(z, x, t).softmax(1), torch.zeros_like(r), x)


class Flow(Denoiser):
    """`[t | p | r | x]` to `[v | 0 | x]`: v U is the velocity at the label p U + r and time t; v is not restricted."""

    trained_as: ClassVar[str] = "noprop_fm"

    def __init__(self, shape: tuple[int, int, int], embedding: Tensor, options: "NoPropFM"):
        super().__init__(shape, embedding, options, timed=True)
        self.steps = options.depth

    def forward(self, h: Tensor) -> Tensor:
        """The velocity, in units of the embeddings."""
        t, p, r, x = self.parts(h)
        return side_by_side(self.logits(mixture(p, self.embedding) + r, x, t), torch.zeros_like(r), x)


class CosineSchedule(nn.Module):
    r"""$\bar\alpha(t) = \sin^2 \theta$, where the angle rises evenly, from $\log SNR$ = -3 to 3."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\log SNR(t)$ and its derivative, both of the shape of t."""
        first, last = (math.atan(math.exp(end / 2)) for end in (-TOP, TOP))
        angle = first + (last - first) * t
        return 2 * angle.tan().log(), 4 * (last - first) / (2 * angle).sin()


class LearnedSchedule(nn.Module):
    r"""A signal-to-noise ratio that rises in t, whatever the weights: $\log SNR(t) = \ell_1 - w\, (1 - \bar g(t))$.

    $\bar g(t) = \frac{g(t) - g(0)}{g(1) - g(0)}$, with $g(t) = \sum_j b_j\, \sigma(a_j t + c_j)$ a network of two
    layers with positive $a_j$, $b_j$. $w > 0$ is learned, $\ell_1$ is fixed.
    """

    def __init__(self, units: int = 16):
        super().__init__()
        self.rate, self.height = nn.Parameter(torch.zeros(units)), nn.Parameter(torch.zeros(units))
        self.offset = nn.Parameter(torch.linspace(-2, 2, units))
        self.width = nn.Parameter(torch.tensor(math.log(math.expm1(2 * TOP))))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""$\log SNR(t)$ and its derivative, both of the shape of t `(B, 1)`."""
        a, b, width = (F.softplus(weight) for weight in (self.rate, self.height, self.width))
        at_t, low, high = (torch.sigmoid(a * time + self.offset) for time in (t, 0 * t, 0 * t + 1))
        rise = (b * (high - low)).sum(1, keepdim=True)
        log_snr = TOP - width * (b * (high - at_t)).sum(1, keepdim=True) / rise
        return log_snr, width * (b * a * at_t * (1 - at_t)).sum(1, keepdim=True) / rise


class ReadLabel(nn.Module):
    r"""The head: logits of the classes from the label z = p U + r of a state `[p | r | ...]`.

    `linear`: f(z), a linear layer. `radial`: $-\|\tilde y - u_k\|^2 / 2 \sigma^2$ with
    $\tilde y = softmax(f(z))\, U$ and a learned $\sigma$. U learns here, unless the labels are one-hot.
    """

    embedding: Tensor

    def __init__(self, embedding: Tensor, options: "NoProp"):
        super().__init__()
        if options.labels == "one_hot":
            self.register_buffer("embedding", embedding)
        else:
            self.embedding = nn.Parameter(embedding)
        self.from_data = options.labels == "prototype"
        self.log_sigma = nn.Parameter(torch.tensor(-0.7)) if options.head == "radial" else None
        self.linear = nn.Linear(embedding.shape[1], len(embedding))

    def forward(self, h: Tensor) -> Tensor:
        """Logits `(B, K)`."""
        classes, size = self.embedding.shape
        z = mixture(h[:, :classes], self.embedding) + h[:, classes : classes + size]
        logits = self.linear(z.to(self.linear.weight.dtype))
        if self.log_sigma is None:
            return logits
        y = mixture(logits.softmax(1), self.embedding)
        return -squared_distances(y, self.embedding) / (2 * (2 * self.log_sigma).exp())


@dataclass(frozen=True)
class NoProp(ModelOptions):
    """Network of NoProp: block t sees the image and a noisy label, and predicts the clear one.

    Row u_k of U is the embedding of class k. One tensor crosses every cut, the state [p | r | x]: a label z = p U + r
    and the image. Block t embeds the image anew (two 3x3 convolutions with batch norm, ReLU and max-pool, and a linear
    layer; or a linear layer alone), puts z through two linear layers with a skip connection (a prototype through such
    convolutions), and joins both to a softmax q over the classes; then z becomes A q U + B z, the mean of the step of a
    reversed diffusion with a cosine schedule. The head reads the last z. As a plain network it starts from z = 0 and
    adds no noise. U learns in the head, blocks hold copies; one-hot labels are fixed.

    Source: Li, Teh and Pascanu 2025, https://arxiv.org/abs/2503.24322; sizes are ours.

    Example:
        >>> NoProp(depth=3, width=8).build((1, 28, 28), 10).block_names
        ('block1', 'block2', 'block3')
    """

    depth: int = 10
    """Number of denoising steps T; each is a block."""
    width: int = 16
    """Channels of the first convolution; the second has twice, the hidden layers eight times as many."""
    embedding: Literal["conv", "mlp"] = "conv"
    """How a block embeds the image: two convolutions and a linear layer, or only the linear layer."""
    labels: Literal["one_hot", "learned", "prototype"] = "one_hot"
    """Embedding of a class: a one-hot vector, a learned one, or one that starts as an image of the class."""
    label_size: int = 20
    """Length of a learned embedding, which starts orthogonal to the others."""
    head: Literal["linear", "radial"] = "linear"
    """What reads the last label: a linear layer, or distances of its softmax from the embeddings."""
    dropout: float = 0.0
    """Probability of zeroing a unit of the last hidden layer."""
    mixing: Literal["diffusion", "learned"] = "diffusion"
    """The next z of a block: A q U + B z; or (1 - a) z + a q U with a learned a, for backprop, the paper's baseline."""

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1, or images of less than 4 pixels that are to be pooled twice.
        """
        embedding = self._embedding(shape, classes)
        blocks = self._blocks(shape, embedding)
        return assemble(blocks, ReadLabel(embedding, self))

    def _embedding(self, shape: tuple[int, int, int], classes: int) -> Tensor:
        """Embeddings of the classes `(K, D)`; prototypes are random until there are data."""
        check_sizes(shape, classes)
        small = self.embedding == "conv" and min(shape[1:]) < 4
        require(not small, f"noprop pools twice, so images need 4x4 pixels, not {shape[1]}x{shape[2]}.")
        if self.labels == "one_hot":
            return torch.eye(classes)
        size = self.label_size if self.labels == "learned" else math.prod(shape)
        return nn.init.orthogonal_(torch.empty(classes, size))

    def _blocks(self, shape: tuple[int, int, int], embedding: Tensor) -> list[nn.Module]:
        if self.mixing == "learned":
            return [Blend(shape, embedding, self) for _ in range(self.depth)]
        return [Denoise(t, shape, embedding, self) for t in range(1, self.depth + 1)]


@dataclass(frozen=True)
class NoPropCT(NoProp):
    """Network of NoProp in continuous time: one block, given the time t, predicts the clear label from a noisy one.

    As a block of `noprop`, without batch norm; t goes through sines and cosines and a linear layer. It is a single
    block, whatever the depth. The noise schedule belongs to it: a learned one, or the cosine of `noprop`. As a plain
    network it runs once, at t = 0 and a label of zero.

    Source: Li, Teh and Pascanu 2025, https://arxiv.org/abs/2503.24322; sizes are ours.

    Example:
        >>> NoPropCT(width=8).build((1, 28, 28), 10).block_names
        ('block1',)
    """

    depth: int = 20
    """Number of denoising steps in prediction; training does not depend on it."""
    schedule: Literal["learned", "cosine"] = "learned"
    """How the share of the signal increases with time."""

    def _blocks(self, shape: tuple[int, int, int], embedding: Tensor) -> list[nn.Module]:
        return [DenoiseAt(shape, embedding, self)]


@dataclass(frozen=True)
class NoPropFM(NoProp):
    """Network of NoProp with flow matching: one block, given the time t, gives the velocity of a label.

    As a block of `noprop`, without batch norm; t goes through sines and cosines and a linear layer. It is a single
    block, whatever the depth. As a plain network it runs once, at t = 0 and a label of zero.

    Source: Li, Teh and Pascanu 2025, https://arxiv.org/abs/2503.24322; sizes are ours.

    Example:
        >>> NoPropFM(width=8).build((1, 28, 28), 10).block_names
        ('block1',)
    """

    depth: int = 20
    """Number of steps in prediction; training does not depend on it."""

    def _blocks(self, shape: tuple[int, int, int], embedding: Tensor) -> list[nn.Module]:
        return [Flow(shape, embedding, self)]
