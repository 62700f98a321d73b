"""The interface of a task: the width of the outputs, the loss, the metrics, and the labels at a block."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from layerwise.core.abstract import Abstract
from layerwise.core.chunked import LinearOutputs
from layerwise.core.posteriors import Posterior
from layerwise.errors import LayerwiseError

Positions = Literal["sample", "token", "pixel"]


class Task(Abstract):
    """The meaning of the labels. A task of your own is a frozen dataclass that inherits this and overrides `loss`.

    Outputs are those of the network's head, or of a block's readout: `(B, K)` per sample, `(B, T, K)` per token,
    `(B, K, H, W)` per pixel, with K = `outputs`. Every loss is computed in float32 or wider whatever the precision
    of the network.

    Attributes:
        outputs: width K of the head and of every readout; 0 until the network is known.
    """

    kind: ClassVar[str] = "loss"
    """The kind of task that a rule must support to train this one, see `Rule.tasks`."""
    main: ClassVar[str] = "loss"
    """Name of the metric by which runs are compared."""
    larger_is_better: ClassVar[bool] = False
    """Whether a larger value of it is better."""
    share: ClassVar[bool] = False
    """Whether it is a share, shown in percent."""

    wanted: ClassVar[str] = ""
    """Description of the labels, to follow "give a tensor" in a sentence."""

    outputs: int
    positions: Positions = "sample"
    """Where there is a label: one per sample, per token or per pixel."""

    @property
    def missing(self) -> int | None:
        """Label of predictions that do not count, if only some rules can ignore it; None otherwise."""
        return None

    def fitted(self, outputs: Tensor) -> Self:
        """The task for a network whose output looks like this.

        Raises:
            LayerwiseError: no network for this task has such outputs.
        """
        return self.with_outputs(self.width(outputs))

    def with_outputs(self, outputs: int) -> Self:
        """The same task with this number of outputs."""
        return replace(self, outputs=outputs)  # pyright: ignore[reportArgumentType]

    def width(self, outputs: Tensor) -> int:
        """Number of outputs per prediction."""
        if self.positions != "pixel":
            return outputs.shape[-1]
        if outputs.dim() < 4:
            raise LayerwiseError(
                f"the network's output has the shape {tuple(outputs.shape)}, and {self.kind} per pixel needs maps, "
                "(B, K, H, W); give a network of maps, such as the model fcn."
            )
        return outputs.shape[1]

    def per_position(self, y: Tensor) -> bool:
        """Whether labels `y` are given per position, not per sample."""
        return self.positions != "sample"

    def counted(self, y: Tensor, some_unlabelled: bool) -> float | Tensor:
        """Weight of a batch in an update that accumulates several: how many predictions count in its mean loss."""
        return float(len(y))

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Mean over what counts, a scalar in float32 or wider."""

    def chunk(self, predictions: int) -> int | None:
        """Number of predictions whose outputs the loss of a linear readout computes at a time; None for all of them."""
        return None

    def loss_in_chunks(self, outputs: LinearOutputs, y: Tensor, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` and `statistics` of a linear readout, `chunk` predictions at a time."""
        raise LayerwiseError(f"{self.kind} has no loss in chunks.")

    def statistics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Sums over the batch, from which `measures` computes the metrics of any number of batches; empty for none."""
        return {}

    def statistics_beside(self, outputs: Tensor, y: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """The same if the mean loss of the batch is known, which may save a pass over its outputs."""
        return self.statistics(outputs, y)

    def measures(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics from sums: scalars on the device."""
        return {}

    def metrics(self, outputs: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Metrics of a batch by name: scalars on the device, without history."""
        return self.measures(self.statistics(outputs.detach(), y))

    def check(self, y: Tensor, unlabelled: bool = False) -> None:
        """Raise LayerwiseError unless `y` holds labels of this task.

        Args:
            y: labels `(B, ...)`; values are read only on the host.
            unlabelled: whether the rule can ignore predictions that do not count.
        """

    def metrics_later(self, outputs: Tensor, y: Tensor) -> Mapping[str, Tensor | Callable[[], Tensor]]:
        """The same, in a training step, where most metrics are never read: scalars, or functions that compute them.

        A function keeps what it holds until it is read, so it holds little, and nothing that a loader may overwrite.
        """
        return self.metrics(outputs, y)

    def at(self, y: Tensor, resolution: tuple[int, ...]) -> Tensor:
        """Labels at a block's resolution, `(B, h, w)` of maps `(B, H, W)`; other labels unchanged."""
        return y

    def outputs_last(self, outputs: Tensor) -> Tensor:
        """Outputs `(B, K, H, W)` as `(B, H, W, K)`; others unchanged."""
        return outputs.movedim(1, -1) if self.positions == "pixel" else outputs

    def as_outputs(self, z: Tensor) -> Tensor:
        """The inverse of `outputs_last`."""
        return z.movedim(-1, 1) if self.positions == "pixel" else z

    def posterior(self, z: Tensor) -> Posterior:
        """The distribution of the label that outputs describe, outputs last.

        Raises:
            LayerwiseError: the task has no such distribution.
        """
        raise LayerwiseError(f"{self.kind} has no distribution of the label; choose a rule such as local_ce.")

    def surprise(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of each prediction, in the shape of the posterior's divergences; outputs last."""
        raise LayerwiseError(f"{self.kind} has no distribution of the label; choose a rule such as local_ce.")

    def average(self, each: Tensor, y: Tensor) -> Tensor:
        """Mean of one number per prediction over the predictions that count, a scalar."""
        return each.mean()

    def distribution(self, y: Tensor) -> Tensor:
        """Target probabilities `(..., K)` of labels `y`, where labels are classes."""
        raise LayerwiseError(f"{self.kind} has no classes.")

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Number of predictions that are right, where labels are classes."""
        raise LayerwiseError(f"{self.kind} has no classes.")

    def accuracy(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Share of the predictions that are right, where labels are classes."""
        raise LayerwiseError(f"{self.kind} has no classes.")

    def decode(self, outputs: Tensor) -> Tensor:
        """Predictions in the units of the labels."""
        return outputs

    @property
    def classes(self) -> int:
        """Number of outputs, where each one is a class."""
        return self.outputs


def cells(size: int, into: int, device: torch.device) -> Tensor:
    """For each of `size` places, the number of its cell among `into` equal cells: int64 `(size,)`.

    >>> cells(6, 3, torch.device("cpu"))
    tensor([0, 0, 1, 1, 2, 2])
    """
    return torch.arange(size, device=device) * into // size


def nearest(y: Tensor, resolution: tuple[int, ...]) -> Tensor:
    """The label at the middle of every cell of maps `(B, ..., *places)`; also for resolutions above that of the labels.

    >>> nearest(torch.tensor([[1, 2]]), (4,))
    tensor([[1, 1, 2, 2]])
    """
    for dim, into in enumerate(resolution, y.dim() - len(resolution)):
        size = y.shape[dim]
        if size != into:
            middle = (2 * torch.arange(into, device=y.device) + 1) * size // (2 * into)
            y = y.index_select(dim, middle)
    return y
