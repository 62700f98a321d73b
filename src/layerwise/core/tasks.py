"""What the labels mean: the loss on logits, the target distribution, what counts as correct."""

from dataclasses import dataclass, replace
from typing import Self

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

    @property
    def missing(self) -> int:
        """Label of a prediction that counts in nothing, as labels are given."""
        return UNLABELLED

    def with_classes(self, classes: int) -> Self:
        """The same task with `classes` classes."""
        return replace(self, classes=classes)

    def aligned(self, y: Tensor) -> Tensor:
        """The label of every prediction, -100 for one that counts in nothing, out of the labels as they are given."""
        return y

    def counted(self, y: Tensor, some_unlabelled: bool) -> float | Tensor:
        """Number of predictions that count; on an accelerator a scalar there."""
        if not some_unlabelled:
            return float(y.numel())
        counted = (self.aligned(y) != UNLABELLED).sum().float()
        return float(counted) if y.device.type == "cpu" else counted  # elsewhere it would wait for the device

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of `logits` `(..., K)` against labels `y` `(...)`: a scalar."""
        _check_shapes(logits, y)
        y = self.aligned(y).flatten()
        return F.cross_entropy(logits.float().flatten(0, -2), y, label_smoothing=self.label_smoothing)

    def distribution(self, y: Tensor) -> Tensor:
        """Target probabilities `(..., K)` of labels `y` `(...)`, with label smoothing."""
        hot = F.one_hot(y, self.classes).float()
        return hot * (1 - self.label_smoothing) + self.label_smoothing / self.classes

    def correct(self, logits: Tensor, y: Tensor) -> Tensor:
        """Number of predictions whose largest logit is the label: an int64 scalar on the device."""
        _check_shapes(logits, y)
        return (logits.argmax(-1) == self.aligned(y)).sum()

    def accuracy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Share of the labelled predictions that are correct: a scalar on the device.

        >>> Classification(2).accuracy(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 0, -100]))
        tensor(0.5000)
        """
        return self.correct(logits, y) / (self.aligned(y) != UNLABELLED).sum()

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


def _check_shapes(logits: Tensor, y: Tensor) -> None:
    if logits.shape[:-1] == y.shape:
        return
    if logits.dim() - 1 == y.dim() > 1:
        raise LayerwiseError(
            f"the labels have shape {tuple(y.shape)} and the logits {tuple(logits.shape)}; give one class number per "
            f"prediction, shape {tuple(logits.shape[:-1])}, and cut where the positions are those of the labels (an "
            "encoder's positions have none)."
        )
    raise LayerwiseError(
        f"the labels have shape {tuple(y.shape)} and the logits {tuple(logits.shape)}; give one class "
        f"number per prediction, shape {tuple(logits.shape[:-1])}."
    )


@dataclass(frozen=True)
class LanguageModel(Classification):
    r"""One of K tokens per position, as `transformers` has it: the label of a position is the next token.

    With tokens $y_1 \dots y_T$ as labels the loss is the mean over the positions t < T whose next token counts,

    $$L = \frac{1}{|\{t : y_{t+1} \ne \mathrm{ignore}\}|} \sum_{t} -\log p_t[y_{t+1}]$$

    at the network's head and at every block's readout, in float32.

    >>> task = LanguageModel().with_classes(10)
    >>> y = torch.tensor([[3, 7, -100]])  # one position counts: that of 3, whose next token is 7
    >>> round(float(task.loss(torch.zeros(1, 3, 10), y)), 4)  # ln 10
    2.3026
    """

    classes: int = 2
    """Size of the vocabulary K; the learner reads it off the logits."""
    shift: bool = True
    """Whether the label of a position is the next token; otherwise labels are given position by position."""
    ignore: int = UNLABELLED
    """Label of a token that counts in no loss and no accuracy."""

    @property
    def missing(self) -> int:
        """Label of a token that counts in nothing: `ignore`."""
        return self.ignore

    def aligned(self, y: Tensor) -> Tensor:
        """The next token of every position, -100 for the last one."""
        if self.ignore != UNLABELLED:
            y = y.masked_fill(y == self.ignore, UNLABELLED)
        return F.pad(y[..., 1:], (0, 1), value=UNLABELLED) if self.shift else y

    def counted(self, y: Tensor, some_unlabelled: bool) -> float | Tensor:
        """Number of positions whose label counts."""
        return super().counted(y, True)

    def distribution(self, y: Tensor) -> Tensor:
        """Target probabilities `(..., K)` of every position, where each has one.

        Raises:
            LayerwiseError: with `shift`, as the last position has no next token.
        """
        if self.shift:
            raise LayerwiseError(
                "this rule teaches a distribution at every position, and with shift=True the last one has no label; "
                "shift the labels yourself and give task=LanguageModel(shift=False)."
            )
        return super().distribution(y)

    def check(self, y: Tensor, unlabelled: bool = False) -> None:
        """Raise LayerwiseError unless `y` `(B, T)` holds tokens in `0 .. K-1`, or `ignore`, and some of them count."""
        if y.dtype == torch.int64 and (y.dim() < 2 or (self.shift and y.shape[-1] < 2)):
            raise LayerwiseError(
                f"the labels have shape {tuple(y.shape)}; a language model needs one per position, shape (B, T), with "
                "two positions or more where they are shifted."
            )
        if y.dtype == torch.int64 and y.device.type == "cpu":
            counts = self.aligned(y) != UNLABELLED
            if not bool(counts.any()):
                raise LayerwiseError("none of the labels counts: give at least one token with a label.")
            y = y[y != self.ignore]
        super().check(y, unlabelled)
