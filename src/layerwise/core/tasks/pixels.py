"""A class per pixel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.functional import wide
from layerwise.core.posteriors import Categorical
from layerwise.core.tasks.base import Positions, Task, cells, nearest
from layerwise.core.tasks.classes import UNLABELLED
from layerwise.errors import LayerwiseError


@dataclass(frozen=True)
class Segmentation(Task):
    r"""One of K classes per pixel: logits `(B, K, H, W)`, labels `(B, H, W)`; volumes likewise.

    The loss is the cross-entropy, averaged over the pixels whose label is not `ignore`. Metrics: `miou` (the main one),
    the mean over classes of $|\text{predicted} \cap \text{true}| / |\text{predicted} \cup \text{true}|$, where classes
    without a pixel in either are left out; and `pixel_accuracy`.

    A block of a lower resolution is compared with the most frequent class in each of its cells (in a tie, the class of
    the smaller number). Ignored pixels do not vote, and a cell of only ignored pixels is ignored. So the readout costs
    K numbers per pixel of the block, not per pixel of the labels, as it would if its logits were scaled up.

    >>> task, y = Segmentation().with_outputs(2), torch.tensor([[[0, 1], [1, 1]]])
    >>> task.at(y, (1, 1))
    tensor([[[1]]])
    >>> found = task.metrics(torch.eye(2)[y * 0 + 1].movedim(-1, 1), y)  # class 1 everywhere
    >>> {name: round(float(value), 3) for name, value in found.items()}
    {'miou': 0.375, 'pixel_accuracy': 0.75}
    """

    ignore: int = UNLABELLED
    """Label of a pixel that does not count."""
    outputs: int = 0
    """Number of classes K; the learner reads it off the network."""

    kind: ClassVar[str] = "segmentation"
    main: ClassVar[str] = "miou"
    larger_is_better: ClassVar[bool] = True
    share: ClassVar[bool] = True
    positions: Positions = "pixel"

    def check(self, y: Tensor, unlabelled: bool = False) -> None:
        """Raise LayerwiseError unless `y` `(B, H, W)` holds classes or `ignore`, and some of them count."""
        if y.dtype not in (torch.int64, torch.uint8) or y.dim() < 3:
            raise LayerwiseError(
                f"the labels are {str(y.dtype).removeprefix('torch.')} of shape {tuple(y.shape)}; give a class number "
                "per pixel as int64 (or uint8), shape (B, H, W)."
            )
        if y.device.type != "cpu":
            return
        y = y[y != self.ignore]
        if not y.numel():
            raise LayerwiseError(f"none of the pixels counts: all are {self.ignore}; give at least one.")
        low, high = int(y.min()), int(y.max())
        if low < 0 or (self.outputs and high >= self.outputs):
            raise LayerwiseError(
                f"label {low if low < 0 else high} is out of range: the network has {self.outputs} outputs per pixel, "
                f"so labels go from 0 to {self.outputs - 1}, or are {self.ignore} where a pixel is to be ignored."
            )

    def counted(self, y: Tensor, some_unlabelled: bool) -> float | Tensor:
        """Number of pixels that count; on an accelerator a scalar there."""
        counted = (y != self.ignore).sum().float()
        return float(counted) if y.device.type == "cpu" else counted

    def at(self, y: Tensor, resolution: tuple[int, ...]) -> Tensor:
        """Labels at a block's resolution: the most frequent class of each cell."""
        y, sizes = y.long(), tuple(y.shape[1:])
        if sizes == resolution:
            return y
        if len(sizes) != len(resolution):
            raise LayerwiseError(
                f"the labels have shape {tuple(y.shape)} and a block's maps the resolution {resolution}; give a label "
                "per pixel of the network's output."
            )
        # Along dimensions in which the block is finer than the labels, each label is repeated.
        y = nearest(y, tuple(max(size, into) for size, into in zip(sizes, resolution, strict=True)))
        at = torch.arange(len(y), device=y.device).view(-1, *[1] * len(resolution))
        for dim, into in enumerate(resolution, 1):
            own = cells(y.shape[dim], into, y.device)
            at = at * into + own.view(-1, *[1] * (len(resolution) - dim))
        counts = y != self.ignore
        slot = (at * self.outputs + y.where(counts, 0)).flatten()
        votes = torch.zeros(len(y) * _product(resolution) * self.outputs, dtype=torch.int64, device=y.device)
        votes = votes.index_add_(0, slot, counts.flatten().long()).view(-1, self.outputs)
        most, chosen = votes.max(-1)
        return chosen.where(most > 0, self.ignore).view(len(y), *resolution)

    def _numbers(self, z: Tensor, y: Tensor) -> Tensor:
        """Labels with -100 for `ignore`, for outputs `(B, H, W, K)`."""
        if tuple(z.shape[:-1]) != tuple(y.shape):
            raise LayerwiseError(
                f"the labels have shape {tuple(y.shape)} and the outputs {tuple(self.as_outputs(z).shape)}; give a "
                f"class number per pixel of the output, shape {tuple(z.shape[:-1])}, or scale the output up."
            )
        return y.long() if self.ignore == UNLABELLED else y.long().masked_fill(y == self.ignore, UNLABELLED)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over the pixels that count: a scalar."""
        return F.cross_entropy(wide(outputs), self._numbers(self.outputs_last(outputs), y))

    def surprise(self, z: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of every pixel, `(B, H, W)`; 0 for one that does not count."""
        y = self._numbers(z, y)
        return F.cross_entropy(wide(z).flatten(0, -2), y.flatten(), reduction="none").view(y.shape)

    def average(self, each: Tensor, y: Tensor) -> Tensor:
        """Mean over the pixels that count."""
        counts = y != self.ignore
        return each.where(counts, 0.0).sum() / counts.sum().clamp_min(1)

    def posterior(self, z: Tensor) -> Categorical:
        """The softmax of logits `(B, H, W, K)`."""
        return Categorical(wide(z).log_softmax(-1))

    def decode(self, outputs: Tensor) -> Tensor:
        """The class of each pixel, `(B, H, W)`."""
        return outputs.argmax(1)

    def statistics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Pixels per class: in both, predicted, true."""
        z = self.outputs_last(outputs)
        y = self._numbers(z, y).flatten()
        predicted, counts = z.argmax(-1).flatten(), (y != UNLABELLED).long()
        true = y.clamp_min(0)
        none = torch.zeros(self.outputs, dtype=torch.int64, device=y.device)
        return {
            "both": none.index_add(0, true, counts * (predicted == true)),
            "predicted": none.index_add(0, predicted, counts),
            "true": none.index_add(0, true, counts),
        }

    def measures(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean intersection over union, and share of the pixels that are right."""
        both, true = statistics["both"], statistics["true"]
        union = statistics["predicted"] + true - both
        present = union > 0
        return {
            "miou": (both / union.clamp_min(1)).sum() / present.sum().clamp_min(1),
            "pixel_accuracy": both.sum() / true.sum().clamp_min(1),
        }


def _product(sizes: tuple[int, ...]) -> int:
    return torch.Size(sizes).numel()
