"""One class per prediction: per sample, or per position for a language model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.chunked import LOGITS, Aligned, LinearOutputs, objective
from layerwise.core.functional import wide
from layerwise.core.posteriors import Categorical
from layerwise.core.ranges import NonNegativeFloat, PositiveInt, check_fields, check_ranges
from layerwise.core.tasks.base import Task
from layerwise.core.tasks.once import once
from layerwise.errors import LayerwiseError

UNLABELLED = -100
"""Label of a prediction that counts in no loss and no accuracy (torch's own value)."""
MOST_NATS = 80.0  # per token in a perplexity: more would be infinite in float32


@dataclass(frozen=True)
class Classification(Task):
    r"""One of K classes per prediction: per sample, or per position for a language model.

    Every loss is the mean over predictions, those with the label `ignore_index` left out, in nats, computed in float32
    whatever the precision of the network. With weights w it is $\sum_i w_{y_i} \ell_i / \sum_i w_{y_i}$.

    Labels are class numbers, int64 `(B,)` or `(B, T)`, or *soft*: probabilities `(B, K)`, whose loss is the
    cross-entropy $-\sum_k y_k \log p_k$; accuracy then counts the most likely class.

    >>> task = Classification(classes=10)
    >>> y = torch.tensor([3, 7])
    >>> round(float(task.loss(torch.zeros(2, 10), y)), 4)  # ln 10
    2.3026
    """

    classes: int = 2  # pyright: ignore[reportIncompatibleMethodOverride]
    """Number of classes K, 2 or more; the learner reads it off the logits."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread evenly over all K classes."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Weight of each class in the loss; all the same if not given."""
    ignore_index: int = UNLABELLED
    """Label of a prediction that counts in no loss and no accuracy."""

    kind: ClassVar[str] = "classification"
    wanted: ClassVar[str] = " of int64 class numbers"
    main: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True
    share: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(label_smoothing=self.label_smoothing)
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        check_fields(self)
        if self.classes < 2:  # any answer would be right
            raise LayerwiseError(
                f"the network has {self.classes} output{'s' * (self.classes != 1)}, and classification needs one per "
                "class; give the last layer 2 outputs or more."
            )

    @property
    def missing(self) -> int:
        """Label of a prediction that does not count, among the labels as they are given."""
        return self.ignore_index

    @property
    def outputs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of classes K."""
        return self.classes

    def with_classes(self, classes: int) -> Self:
        """The same task with `classes` classes."""
        if self.weights is not None and len(self.weights) != classes:
            raise LayerwiseError(
                f"weights has {len(self.weights)} numbers, and the network has {classes} outputs; give one per class."
            )
        return replace(self, classes=classes)

    def fitted(self, outputs: Tensor) -> Self:
        """The task for a network with such logits."""
        return self.with_classes(outputs.shape[-1])

    def with_outputs(self, outputs: int) -> Self:
        """The same task with this number of classes."""
        return self.with_classes(outputs)

    def per_position(self, y: Tensor) -> bool:
        """Whether there is a label per position: class numbers `(B, T)`, or probabilities `(B, T, K)`."""
        return y.dim() > (2 if y.is_floating_point() else 1)

    def aligned(self, y: Tensor) -> Tensor:
        """The label of every prediction, -100 for one that does not count, from the labels as they are given."""
        return y if self.missing == UNLABELLED else y.masked_fill(y == self.missing, UNLABELLED)

    def counted(self, y: Tensor, some_unlabelled: bool) -> float | Tensor:
        """Number of predictions that count, or the sum of their weights; on an accelerator a scalar there."""
        if y.is_floating_point():
            return float(y.numel() // self.classes)
        if self.weights is not None:
            y = self.aligned(y)
            counted = (self._weights(self.classes, y)[y.clamp_min(0)] * (y != UNLABELLED)).sum()
            return float(counted) if y.device.type == "cpu" else counted
        if not some_unlabelled:
            return float(y.numel())
        labelled = self._labelled(y)
        return labelled.float() if isinstance(labelled, Tensor) and not labelled.is_cpu else float(labelled)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of logits `(..., K)` against labels `y` `(...)`: a scalar."""
        check_shapes(outputs, y)
        given, outputs = outputs.shape[-1], wide(outputs)
        if y.is_floating_point():  # some readouts have further categories, which no label has
            y = F.pad(y.to(outputs.dtype), (0, given - y.shape[-1])).flatten(0, -2)
        else:
            y = self.aligned(y).flatten()
        weights = None if self.weights is None else self._weights(given, y).to(outputs.dtype)
        return F.cross_entropy(outputs.flatten(0, -2), y, weights, label_smoothing=self.label_smoothing)

    def _weights(self, size: int, like: Tensor) -> Tensor:
        """The weights of the classes, 1 for any further category."""
        assert self.weights is not None
        return _on(self.weights + (1.0,) * (size - len(self.weights)), like.device)

    def average(self, each: Tensor, y: Tensor) -> Tensor:
        """Mean over the predictions that count, with the weights of the classes."""
        if y.is_floating_point():
            return each.mean()
        counting = once(y, ("weights of", self), self._counting)
        if not counting:
            return each.mean()
        weights, total = counting
        return (weights * each).sum() / total

    def _counting(self, y: Tensor) -> tuple[Tensor, ...]:
        """The weight of every prediction in a mean, and their sum; nothing where all are known to count the same."""
        if self.weights is None and y.device.type == "cpu" and int(self._labelled(y)) == y.numel():
            return ()  # not on an accelerator, where it would wait for the number
        y = self.aligned(y)
        counts = y != UNLABELLED
        weights = counts if self.weights is None else self._weights(self.classes, y)[y.clamp_min(0)] * counts
        return weights, weights.sum()

    def posterior(self, z: Tensor) -> Categorical:
        """The softmax of logits `(..., K)`."""
        return Categorical(wide(z).log_softmax(-1))

    def distribution(self, y: Tensor) -> Tensor:
        """Target probabilities `(..., K)` of labels `y` `(...)`, with label smoothing; arbitrary where none counts."""
        return once(y, ("distribution of", self), self._targets)

    def target(self, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The target probabilities t of labels as `distribution` has them, and t log t, in a precision."""

        def made(y: Tensor) -> tuple[Tensor, Tensor]:
            target = self.distribution(y).to(dtype)
            return target, torch.xlogy(target, target)

        return once(y, ("target of", self, dtype), made)

    def _targets(self, y: Tensor) -> Tensor:
        hot = wide(y) if y.is_floating_point() else F.one_hot(self.aligned(y).clamp_min(0), self.classes).float()
        return hot * (1 - self.label_smoothing) + self.label_smoothing / self.classes

    def target_shares(self, y: Tensor) -> Tensor:
        r"""Weights $t_{ik}$ `(..., K)` that make the mean loss $-\sum_{ik} t_{ik} \log p_{ik}$; 0 where none counts.

        With $s_i = \sum_k t_{ik}$ its gradient on the logits is $s_i p_i - t_i$.

        >>> Classification(2).target_shares(torch.tensor([0, 1, -100]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000],
                [0.0000, 0.0000]])
        """
        shares = self.distribution(y)
        if self.weights is not None:
            shares = shares * self._weights(self.classes, y)
        if not y.is_floating_point():
            shares = shares * (self.aligned(y) != UNLABELLED)[..., None]
        return shares / self.counted(y, True)

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Number of predictions whose largest logit is the label: an int64 scalar on the device."""
        check_shapes(outputs, y)
        return (outputs.argmax(-1) == (y.argmax(-1) if y.is_floating_point() else self.aligned(y))).sum()

    def accuracy(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Share of the labelled predictions that are correct: a scalar on the device.

        >>> Classification(2).accuracy(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 0, -100]))
        tensor(0.5000)
        """
        return self._share(self.correct(outputs, y), y)

    def _share(self, correct: Tensor, y: Tensor) -> Tensor:
        return correct / self._labelled(y)

    def _labelled(self, y: Tensor) -> Tensor | int:
        """Number of predictions with a label."""
        if y.is_floating_point():
            return y.numel() // y.shape[-1]
        return once(y, ("number of", self), lambda y: (self.aligned(y) != UNLABELLED).sum())

    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The accuracy."""
        return {"accuracy": self.accuracy(outputs, y)}

    def metrics_later(self, outputs: Tensor, y: Tensor) -> Mapping[str, Tensor | Callable[[], Tensor]]:
        """The accuracy, as a number of hits until it is read; the hits themselves would grow with depth."""
        if type(self).metrics is not Classification.metrics:
            return self.metrics(outputs, y)
        correct, labelled = self.correct(outputs, y), self._labelled(y)
        return {"accuracy": lambda: correct / labelled}

    def decode(self, outputs: Tensor) -> Tensor:
        """The class of the largest logit."""
        return outputs.argmax(-1)

    def check(self, y: Tensor, unlabelled: bool = False) -> None:
        """Raise LayerwiseError unless `y` holds integer labels in `0 .. K-1`, or -100 where that is allowed.

        The values are read only on the host: on an accelerator, reading them would wait for the device.
        """
        if y.is_floating_point() and y.dim() > 1:
            self._check_soft(y)
            return
        if y.dtype != torch.int64:
            raise LayerwiseError(f"the labels are {str(y.dtype).removeprefix('torch.')}; give class numbers as int64.")
        if y.device.type != "cpu" or (y.numel() and self._in_range(y) and not 0 <= self.missing < self.classes):
            return
        if unlabelled:
            y = y[(y != UNLABELLED) & (y != self.missing)]
            if not y.numel():
                raise LayerwiseError(f"none of the labels counts: all are {self.missing}; give at least one.")
        if y.numel() and not self._in_range(y):
            low = int(y.min())
            raise LayerwiseError(
                f"label {low if low < 0 else int(y.max())} is out of range: the network has {self.classes} outputs, "
                f"so labels go from 0 to {self.classes - 1}."
            )

    def _in_range(self, y: Tensor) -> bool:
        low, high = y.aminmax()
        return int(low) >= 0 and int(high) < self.classes

    def _check_soft(self, y: Tensor) -> None:
        if y.shape[-1] != self.classes:
            raise LayerwiseError(
                f"the labels are {str(y.dtype).removeprefix('torch.')} of shape {tuple(y.shape)}; give class numbers "
                f"as int64, or the probabilities of all {self.classes} classes, shape (B, {self.classes})."
            )
        if y.device.type == "cpu":
            sums = y.double().sum(-1)
            if not (bool((y >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2, rtol=0)):
                raise LayerwiseError(
                    "the labels are not probabilities: some are negative, or do not add up to 1 over the classes; give "
                    "probabilities, or task=MultiLabel() where several labels hold at once."
                )


@lru_cache(maxsize=64)
def _on(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers on a device, copied there once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _whole_on(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def check_shapes(logits: Tensor | LinearOutputs, y: Tensor) -> None:
    """Raise LayerwiseError unless there is one label per prediction; others would be broadcast."""
    if logits.shape[:-1] == (y.shape[:-1] if y.is_floating_point() else y.shape):
        return
    if len(logits.shape) - 1 == y.dim() > 1:
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
    r"""One of K tokens per position, as in `transformers`: the label of a position is the next token.

    With tokens $y_1 \dots y_T$ as labels the loss is the mean over the positions t < T whose next token counts,

    $$L = \frac{1}{|\{t : y_{t+1} \ne \mathrm{ignore}\}|} \sum_{t} -\log p_t[y_{t+1}]$$

    at the network's head and at every block's readout, in float32. Metrics are `accuracy`, `perplexity`, which is
    e to the power of the mean over tokens, and, where the bytes of each token are known, `bits_per_byte`, which is
    comparable across tokenizers:

    $$\frac{\sum_t -\log p_t[y_{t+1}]}{\ln 2 \cdot \sum_t \mathrm{bytes}(y_{t+1})}$$

    All are computed from sums over the positions that count, so that they are exact over any number of batches.

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
    token_bytes: tuple[int, ...] = ()
    """Bytes of text that each token stands for; empty where they are not known."""
    positions_at_once: PositiveInt | None = None
    """Positions whose logits the loss of a linear readout computes at a time; as many as have 4 million logits if not
    given.
    """

    kind: ClassVar[str] = "language_model"
    main: ClassVar[str] = "bits_per_byte"
    larger_is_better: ClassVar[bool] = False
    share: ClassVar[bool] = False
    positions = "token"

    def chunk(self, predictions: int) -> int | None:
        """`positions_at_once`, or as many as have `chunked.LOGITS` logits; None if that is all of them.

        >>> LanguageModel(classes=2**15).chunk(100), LanguageModel(classes=2**15).chunk(1000)
        (None, 128)
        """
        chunk = self.positions_at_once or max(1, LOGITS // self.classes)
        return chunk if chunk < predictions else None

    def loss_in_chunks(self, outputs: LinearOutputs, y: Tensor, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` and `statistics` of a linear readout, `chunk` positions at a time."""
        loss, _, _, statistics = self.objective_in_chunks(outputs, y, chunk)
        return loss, statistics

    def objective_in_chunks(
        self,
        outputs: LinearOutputs,
        y: Tensor,
        chunk: int,
        likelihood_weight: float = 1.0,
        neighbour: Aligned | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """`chunked.objective` of a linear readout: the objective, `loss`, the mean divergence and `statistics`."""
        check_shapes(outputs, y)
        labels, classes = self.aligned(y), outputs.shape[-1]
        weights = None if self.weights is None else self._weights(classes, labels)
        how = (weights, self.label_smoothing, UNLABELLED, chunk, likelihood_weight, neighbour)
        found, loss, apart, nats, hits = objective(outputs, labels, *how)
        return found, loss, apart, self._sums(nats, hits, labels)

    @property
    def missing(self) -> int:
        """Label of a token that does not count: `ignore`."""
        return self.ignore

    def aligned(self, y: Tensor) -> Tensor:
        """The next token of every position, -100 for the last one."""
        y = super().aligned(y)
        return F.pad(y[..., 1:], (0, 1), value=UNLABELLED) if self.shift else y

    def counted(self, y: Tensor, some_unlabelled: bool) -> float | Tensor:
        """Number of positions whose label counts."""
        return super().counted(y, True)

    def statistics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Sums over the positions that count: nats, hits, tokens and, where they are known, bytes."""
        if y.is_floating_point():
            return {}
        check_shapes(outputs, y)
        z, y = outputs.flatten(0, -2), self.aligned(y).flatten()
        nats = F.cross_entropy(wide(z), y, reduction="sum", ignore_index=UNLABELLED)
        return self._sums(nats, (z.argmax(-1) == y).sum(), y)

    def statistics_beside(self, outputs: Tensor, y: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """The same sums; the nats are those of the loss, unless it is weighted or smoothed."""
        if y.is_floating_point() or self.weights is not None or self.label_smoothing:
            return self.statistics(outputs, y)
        y = self.aligned(y)
        return self._sums(loss * (y != UNLABELLED).sum(), (outputs.argmax(-1) == y).sum(), y)

    def _sums(self, nats: Tensor, hits: Tensor, y: Tensor) -> dict[str, Tensor]:
        counts = y != UNLABELLED
        found = {"nats": nats, "hits": hits, "tokens": counts.sum()}
        if self.token_bytes:
            found["bytes"] = (_whole_on(self.token_bytes, y.device)[y.clamp_min(0)] * counts).sum()
        return found

    def measures(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accuracy, perplexity and bits per byte."""
        nats, tokens = statistics["nats"], statistics["tokens"]
        found = {"accuracy": statistics["hits"] / tokens, "perplexity": (nats / tokens).clamp_max(MOST_NATS).exp()}
        if "bytes" in statistics:
            found["bits_per_byte"] = nats / (math.log(2) * statistics["bytes"])
        return found

    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Accuracy, perplexity and bits per byte of a batch."""
        outputs = outputs.detach()
        statistics = self.statistics(outputs, y)
        return self.measures(statistics) if statistics else super().metrics(outputs, y)

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
