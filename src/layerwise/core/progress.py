"""What the engine keeps of an unfinished update: its batches, what a pass records, a trunk that waits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.core.groups import Group
from layerwise.core.rule import Scalar, Signal
from layerwise.errors import LayerwiseError, short


@dataclass
class Accumulation:
    r"""The current update: which one it is, and how much its batches weigh.

    The losses are means over the counted labels of a batch. With $c_i$ of them in batch $i$ the update follows

    $$\frac{\sum_i c_i \nabla \ell_i}{\sum_i c_i},$$

    which is the gradient of the mean over all counted labels, whether or not the batches are equally large. A batch
    weighs $c_i / c_1$ while it is added, so that equal batches weigh exactly 1. Of N replicas, whose mean is taken, the
    one with $c_{ir}$ of the labels weighs its gradient by $N c_{ir} / c_1$.
    """

    updates: int = 0
    """Number of the current update; those before it are done."""
    batches: int = 0
    """Batches that have been added to it."""
    first: float | Tensor = 0.0
    """Counted labels of its first batch, of all replicas together."""
    weight: float | Tensor = 0.0
    """Sum of the weights of its batches."""

    def add(self, counted: float | Tensor, total: float | Tensor) -> float | Tensor:
        """Add a batch.

        Args:
            counted: labels that count in this process's share, times the number of replicas.
            total: labels that count in the whole batch.

        Returns:
            The weight of this process's share.
        """
        if self.batches == 0:
            self.first = total
        self.batches += 1
        self.weight = self.weight + total / self.first
        return counted / self.first

    def next(self) -> None:
        """The update is done."""
        self.updates, self.batches, self.first, self.weight = self.updates + 1, 0, 0.0, 0.0

    def restart(self) -> None:
        """The update has no batch any more."""
        self.batches, self.first, self.weight = 0, 0.0, 0.0

    def state(self) -> dict[str, float]:
        """As plain numbers."""
        return {name: float(getattr(self, name)) for name in ("updates", "batches", "first", "weight")}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from `state()`."""
        self.updates, self.batches = int(state["updates"]), int(state["batches"])
        self.first, self.weight = state["first"], state["weight"]


@dataclass
class Trace:
    """What one pass records: scalars on the device, read when somebody asks."""

    metrics: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    finite: dict[str, Tensor] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)

    def add(self, name: str, metrics: dict[str, Scalar], statistics: dict[str, Tensor], share: float = 1.0) -> None:
        """Record a block's scalars and sums; the scalars of a part of the batch weigh by its share of the labels."""
        if share == 1:
            self.metrics[name] = {
                key: value.detach() if isinstance(value, Tensor) else value for key, value in metrics.items()
            }
            if statistics:
                self.statistics[name] = statistics
        elif share:
            before: dict[str, Any] = self.metrics.get(name, {})
            self.metrics[name] = {**_sum(before, {key: read(key, value) for key, value in metrics.items()}, share)}
            if statistics:
                self.statistics[name] = _sum(self.statistics.get(name, {}), statistics, 1)


def read(name: str, metric: Scalar) -> Tensor:
    """The value of a metric, without history.

    Raises:
        LayerwiseError: it is a function that returns no scalar.
    """
    value: Any = metric if isinstance(metric, Tensor) else metric()
    if not (isinstance(value, Tensor) and value.dim() == 0):
        raise LayerwiseError(f"the function of metric {name!r} returns {short(value)}; let it return a scalar tensor.")
    return value.detach()


def _sum(before: dict[str, Tensor], new: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {
        name: torch.add(before[name], value, alpha=factor) if name in before else value * factor
        for name, value in new.items()
    }


@dataclass
class WaitingTrunk:
    """The first group while it waits: its graph is kept until the later groups have sent their gradients back."""

    group: Group
    h: Tensor
    """Its input."""
    signals: list[tuple[Signal, Tensor | None]]
    out: Tensor
    """Its output, with the graph."""
    gradient: Tensor
    """Sum of what the later groups sent back, of the shape of `out`."""
