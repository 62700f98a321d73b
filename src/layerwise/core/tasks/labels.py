"""Several labels at once."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.functional import wide
from layerwise.core.posteriors import Bernoullis
from layerwise.core.tasks.base import Task
from layerwise.errors import LayerwiseError


@dataclass(frozen=True)
class MultiLabel(Task):
    r"""K labels per sample that each hold or not: zeros and ones `(B, K)`, floats or integers.

    The loss is the binary cross-entropy, averaged over samples and labels. Metrics: `f1` (the main one), the micro-F1
    $2\,TP / (2\,TP + FP + FN)$ over all labels of all samples, where a label is predicted if its probability is one
    half or more (0 if no label holds and none is predicted); and `exact_match`, the share of samples with all K labels
    right. Both are computed from sums over samples, so that they are exact over any number of batches.

    >>> task, y = MultiLabel(), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> found = task.metrics(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), y)
    >>> {name: round(float(value), 3) for name, value in found.items()}
    {'f1': 0.8, 'exact_match': 0.5}
    """

    outputs: int = 0
    """Number of labels K; the learner reads it off the network."""

    kind: ClassVar[str] = "multilabel"
    main: ClassVar[str] = "f1"
    larger_is_better: ClassVar[bool] = True
    share: ClassVar[bool] = True

    def check(self, y: Tensor, unlabelled: bool = False) -> None:
        """Raise LayerwiseError unless `y` `(B, K)` holds zeros and ones, or probabilities."""
        if y.dim() != 2 or (self.outputs and y.shape[1] != self.outputs):
            raise LayerwiseError(
                f"the labels have shape {tuple(y.shape)} and the network has {self.outputs} outputs; give one number "
                f"per label, shape (B, {self.outputs})."
            )
        if y.is_complex():
            raise LayerwiseError("the labels are complex numbers; give zeros and ones.")
        if y.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch can compare none of them
            raise LayerwiseError(f"the labels are {str(y.dtype).removeprefix('torch.')}; give floats, bool or int64.")
        if y.device.type == "cpu" and not bool(((y >= 0) & (y <= 1)).all()):
            raise LayerwiseError("some labels are neither 0 nor 1; give 1 where a label holds and 0 where it does not.")

    def surprise(self, z: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy of every label, `(B, K)`."""
        return self._surprise(z, y, "none")

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean over samples and labels: a scalar."""
        return self._surprise(outputs, y, "mean")

    @staticmethod
    def _surprise(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        if z.shape != y.shape:
            raise LayerwiseError(
                f"the labels have shape {tuple(y.shape)} and the outputs {tuple(z.shape)}; give one number per output."
            )
        return F.binary_cross_entropy_with_logits(wide(z), y.to(wide(z[:0]).dtype), reduction=reduction)

    def posterior(self, z: Tensor) -> Bernoullis:
        """One Bernoulli distribution per label, from logits `(B, K)`."""
        return Bernoullis(wide(z))

    def distribution(self, y: Tensor) -> Tensor:
        """The labels as numbers, `(B, K)`."""
        return wide(y)

    def decode(self, outputs: Tensor) -> Tensor:
        """Which labels hold, bool `(B, K)`."""
        return outputs >= 0

    def statistics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Counts over the batch."""
        predicted, true = outputs >= 0, y >= 0.5
        return {
            "hits": (predicted & true).sum(),
            "named": predicted.sum() + true.sum(),
            "exact": (predicted == true).all(-1).sum(),
            "count": torch.full((), len(y), device=y.device),
        }

    def measures(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Micro-F1 and share of exact matches."""
        return {
            "f1": 2 * statistics["hits"] / statistics["named"].clamp_min(1),
            "exact_match": statistics["exact"] / statistics["count"],
        }
