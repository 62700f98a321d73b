"""Mixup and CutMix: two samples of a batch become one, and its label holds the classes of both."""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """How the samples of one batch are mixed with their partners."""

    share: float
    """Share of a sample itself in what becomes of it, lambda; its partner has the rest."""
    box: tuple[slice, slice] | None = None
    """Rows and columns that come from the partner (CutMix); None adds the two up (mixup)."""

    def images(self, own: Tensor, partner: Tensor) -> Tensor:
        """Mix `(B, C, H, W)` with the partners' of the same shape."""
        if self.box is None:
            return torch.lerp(partner, own, self.share)
        mixed = own.clone()
        mixed[..., self.box[0], self.box[1]] = partner[..., self.box[0], self.box[1]]
        return mixed

    def labels(self, own: Tensor, partner: Tensor, classes: int) -> Tensor:
        """The probabilities `(B, K)` of the classes, from class numbers `(B,)`."""
        first, second = (F.one_hot(y.long(), classes).float() for y in (own, partner))
        return torch.lerp(second, first, self.share)


@dataclass(frozen=True)
class Mixing:
    r"""Mixup and CutMix of the samples of a batch with those of the reversed batch.

    $$\lambda \sim \mathrm{Beta}(\alpha, \alpha), \qquad \tilde x_i = \lambda x_i + (1 - \lambda) x_{B + 1 - i}, \qquad
    \tilde y_i = \lambda y_i + (1 - \lambda) y_{B + 1 - i}$$

    CutMix replaces a box of the image by the partner's instead. The box has the shape of the image and the area
    $1 - \lambda$, its centre is any pixel, what falls outside of the image is cut off, and $\lambda$ becomes the share
    of the pixels that are left. Each batch has one draw. With both, each batch has one of the two, with equal
    probability.

    Source: Zhang et al., arXiv 1710.09412 (2018): mixup; Yun et al., arXiv 1905.04899 (2019): CutMix. One draw per
    batch is the papers' statement, the reversed batch in place of a random permutation our reading: batches are
    shuffled.

    >>> mix = Mixing(classes=3, cutmix=1.0).draw(0, 8, 8)
    >>> mixed = mix.images(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    >>> math.isclose(mixed.mean().item(), 1 - mix.share)
    True
    >>> Mix(0.75).labels(torch.tensor([2]), torch.tensor([0]), 3)
    tensor([[0.2500, 0.0000, 0.7500]])
    """

    classes: int
    """Number of classes, K."""
    mixup: float = 0.0
    """Alpha of mixup; 0 never mixes up."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0 never cuts."""

    def draw(self, seed: int, height: int, width: int) -> Mix:
        """The mix of a batch of images of H x W pixels, a function of the seed alone."""
        draws = random.Random(seed)
        cuts = self.cutmix > 0 and (self.mixup == 0 or draws.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = draws.betavariate(alpha, alpha)
        if not cuts:
            return Mix(share)
        side = math.sqrt(1 - share)
        rows, columns = (_interval(draws.randrange(size), round(side * size), size) for size in (height, width))
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        return Mix(1 - area / (height * width), (rows, columns))


def _interval(centre: int, length: int, size: int) -> slice:
    start = centre - length // 2
    return slice(max(0, start), min(size, start + length))
