"""Inputs of the forward-forward rules: a label written into an image, and negative images without a label."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.layout import from_standard, to_standard
from layerwise.errors import LayerwiseError


def overlay(x: Tensor, p: Tensor) -> Tensor:
    r"""Write class probabilities into the first K numbers of every sample.

    Number k becomes $\min x + p_k (\max x - \min x)$, with the sample's own extremes: a one-hot label is one bright
    pixel among dark ones, the neutral label ($p_k = 1/K$) is faint everywhere.

    Args:
        x: `(B, ...)`, of K numbers or more per sample.
        p: `(B, K)`.

    >>> overlay(torch.tensor([[0.0, 5.0, 10.0, 7.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([[ 0., 10., 10.,  7.]])
    """
    if not x.is_floating_point():
        raise LayerwiseError(
            f"a label is written into inputs of real numbers, not of {x.dtype}; cast numbers with x.float(), and for "
            "tokens choose a rule such as local_ce."
        )
    flat = x.flatten(1)
    if p.shape[1] > flat.shape[1]:
        raise LayerwiseError(
            f"an input of {flat.shape[1]} numbers has no room for {p.shape[1]} labels; use label='map'."
        )
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return torch.cat([low + p * (high - low), flat[:, p.shape[1] :]], dim=1).view_as(x)


def label_map(x: Tensor, p: Tensor, layout: str | None = "BCHW") -> Tensor:
    r"""Add a wave over the whole image that depends on the label, so that every filter sees the label.

    The image plus $s \sum_k p_k w_k$, where $w_k$ are the first K of the waves
    $\sqrt2 \cos, \sqrt2 \sin (2\pi(a u / H + b v / W))$ in order of rising frequency, which are orthogonal and of mean
    square 1, and s is the sample's standard deviation.

    Args:
        x: images, such as `(B, C, H, W)`.
        p: `(B, K)`.
        layout: of x.

    Raises:
        LayerwiseError: x holds no images, or images with less room than K waves need, or its layout is not known.
    """
    if x.dim() != 4:
        raise LayerwiseError(f"label='map' needs images, not inputs of shape {tuple(x.shape)}; use label='overlay'.")
    images = to_standard(x, known_layout(layout))
    waves = _waves(images.shape[2], images.shape[3], p.shape[1]).to(x)
    scale = x.flatten(1).std(1).view(-1, 1, 1, 1)
    return x + from_standard(scale * torch.tensordot(p, waves, dims=1).unsqueeze(1), known_layout(layout))


def known_layout(layout: str | None) -> str:
    """The layout of images that enter the network.

    Raises:
        LayerwiseError: it is not known.
    """
    if layout is None:
        raise LayerwiseError(
            "the first layers do not tell which dimension of the input holds the channels; declare it: "
            "layout={'input': 'BCHW'}, or 'BHWC'."
        )
    return layout


def _waves(height: int, width: int, count: int) -> Tensor:
    """The first `count` real Fourier waves of an image, the constant left out: `(count, H, W)`."""
    tall, wide = (height - 1) // 2, (width - 1) // 2
    pairs = [(a, b) for a in range(tall + 1) for b in range(-wide, wide + 1) if a > 0 or b > 0]
    if count > 2 * len(pairs):
        raise LayerwiseError(
            f"an image of {height} x {width} has {2 * len(pairs)} label maps, fewer than the {count} classes; "
            "use label='overlay'."
        )
    pairs.sort(key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))
    frequency = torch.tensor(pairs[: (count + 1) // 2], dtype=torch.float32, device="cpu")
    places = torch.cartesian_prod(
        torch.arange(height, dtype=torch.float32, device="cpu") / height,
        torch.arange(width, dtype=torch.float32, device="cpu") / width,
    )
    phase = 2 * math.pi * frequency @ places.T
    waves = torch.stack([phase.cos(), phase.sin()], dim=1).flatten(0, 1)[:count]
    return 2**0.5 * waves.view(count, height, width)


def wrong_labels(y: Tensor, classes: int, logits: Tensor | None = None) -> Tensor:
    """A wrong label per sample: uniform over the other classes, or with the probabilities of `logits`.

    Args:
        y: `(B,)`, the labels.
        classes: K.
        logits: `(B, K)`, for hard negatives. A sample whose logits are not finite gets a uniform label.
    """
    if logits is None:
        return (y + torch.randint(1, classes, y.shape, device=y.device)) % classes
    known = torch.isfinite(logits).all(1, keepdim=True)  # the loss reports the others
    others = torch.where(known, logits.float(), 0.0).scatter(1, y[:, None], -math.inf).softmax(1)
    return torch.multinomial(others, 1)[:, 0]


def hybrid_images(x: Tensor, blurs: int = 6, layout: str | None = "BCHW") -> Tensor:
    """Images composed of two of the batch: correct at short range and wrong at long range.

    The mask of large spots is a random bit image, blurred with (1/4, 1/2, 1/4) both ways and cut off at 1/2.

    Args:
        x: `(B, C, H, W)`, of two images or more.
        blurs: how often the bits are blurred.
        layout: of x.
    """
    if x.dim() != 4 or len(x) < 2:
        raise LayerwiseError(
            f"hybrid images are made of two images of a batch, not of inputs of shape {tuple(x.shape)}; use "
            "negatives='random'."
        )
    layout = known_layout(layout)
    x = to_standard(x, layout)
    mask = torch.randint(2, (len(x), 1, *x.shape[2:]), device=x.device).float()
    row = torch.tensor([0.25, 0.5, 0.25], dtype=mask.dtype, device=x.device)
    kernel = (row[:, None] * row)[None, None]
    for _ in range(blurs):
        mask = F.conv2d(F.pad(mask, (1, 1, 1, 1), mode="replicate"), kernel)
    other = x.roll(int(torch.randint(1, len(x), (), device="cpu")), dims=0)
    return from_standard(torch.where(mask > 0.5, x, other), layout)
