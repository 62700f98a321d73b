"""What the labels mean: the loss on logits, the target distribution, what counts as correct."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.ranges import check_ranges
from layerwise.errors import LayerwiseError

UNLABELLED = -100
"""Label of a prediction that counts in no loss and no accuracy (torch's own value)."""


@dataclass(frozen=True)
class Classification:
    """One of K classes per prediction: per sample, or per position for a language model.

    Every loss is the mean over predictions, those with the label -100 left out, in nats, computed in float32 whatever
    the precision of the network.

    >>> task = Classification(classes=10)
    >>> y = torch.tensor([3, 7])
    >>> round(float(task.loss(torch.zeros(2, 10), y)), 4)  # ln 10
    2.3026
    """

    classes: int
    """Number of classes K, 2 or more."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over all K classes."""

    def __post_init__(self) -> None:
        check_ranges(label_smoothing=self.label_smoothing)
        if self.classes < 2:  # any answer would be right
            raise LayerwiseError(
                f"the network has {self.classes} output{'s' * (self.classes != 1)}, and classification needs one per "
                "class; give the last layer 2 outputs or more."
            )

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of `logits` `(..., K)` against labels `y` `(...)`: a scalar."""
        if logits.shape[:-1] != y.shape:
            raise LayerwiseError(
                f"the labels have shape {tuple(y.shape)} and the logits {tuple(logits.shape)}; give one class "
                f"number per prediction, shape {tuple(logits.shape[:-1])}."
            )
        return F.cross_entropy(logits.float().flatten(0, -2), y.flatten(), label_smoothing=self.label_smoothing)

    def distribution(self, y: Tensor) -> Tensor:
        """Target probabilities `(..., K)` of labels `y` `(...)`, with label smoothing."""
        hot = F.one_hot(y, self.classes).float()
        return hot * (1 - self.label_smoothing) + self.label_smoothing / self.classes

    def correct(self, logits: Tensor, y: Tensor) -> Tensor:
        """Number of predictions whose largest logit is the label: an int64 scalar on the device."""
        return (logits.argmax(-1) == y).sum()

    def accuracy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Share of the labelled predictions that are correct: a scalar on the device.

        >>> Classification(2).accuracy(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 0, -100]))
        tensor(0.5000)
        """
        return self.correct(logits, y) / (y != UNLABELLED).sum()

    def check(self, y: Tensor, unlabelled: bool = False) -> None:
        """Raise LayerwiseError unless `y` holds integer labels in `0 .. K-1`, or -100 where that is allowed.

        The values are looked at only on the host: on an accelerator the look would wait for the device.
        """
        if y.dtype != torch.int64:
            raise LayerwiseError(f"the labels are {str(y.dtype).removeprefix('torch.')}; give class numbers as int64.")
        if unlabelled and y.device.type == "cpu":
            y = y[y != UNLABELLED]
            if not y.numel():
                raise LayerwiseError("none of the labels counts: all are -100; give at least one.")
        if y.device.type == "cpu" and y.numel() > 0:
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.classes:
                wrong = low if low < 0 else high
                raise LayerwiseError(
                    f"label {wrong} is out of range: the network has {self.classes} outputs, so labels "
                    f"go from 0 to {self.classes - 1}."
                )
