"""A batch in parts: what a group's update runs one after the other, and its outputs put together again."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.core.tasks import Task, of_one_batch
from layerwise.core.trees import mapped
from layerwise.errors import LayerwiseError


@dataclass(frozen=True)
class MicroBatch:
    """Some neighbouring samples of a batch."""

    samples: slice
    """Which ones."""
    batch: int
    """Number of samples in the whole batch."""
    index: int | None = None
    """Number of the part; None for a batch that is run as a whole."""

    def of(self, tree: Any) -> Any:
        """The part's share of every tensor whose first dimension is the batch; what else there is as it is.

        >>> MicroBatch(slice(2, 4), batch=4, index=1).of({"x": torch.arange(4), "scale": torch.tensor(3)})
        {'x': tensor([2, 3]), 'scale': tensor(3)}
        """
        if self.index is None:
            return tree
        return mapped(tree, lambda t: t[self.samples] if t.dim() and len(t) == self.batch else t)


@dataclass(frozen=True)
class Labelled:
    """A part with its labels, which are the same for every group."""

    part: MicroBatch
    y: Tensor
    share: float
    """Of the batch's labels that count, how many are here."""


def labelled_parts(y: Tensor, count: int, task: Task, some: bool) -> list[Labelled]:
    """The parts of a batch with these labels.

    Whether a part has labels that count decides whether there is anything to learn from it. On an accelerator that is
    looked at once per batch, and only where some may not count.

    Args:
        y: labels of the batch.
        count: of parts.
        task: counts the labels.
        some: whether some samples may have none.

    >>> from layerwise.core.tasks import Classification
    >>> y = torch.tensor([0, 1, 1, -100])
    >>> [(p.y.tolist(), round(p.share, 2)) for p in labelled_parts(y, 2, Classification(2), some=True)]
    [([0, 1], 0.67), ([1, -100], 0.33)]
    """
    parts = [*parts_of(len(y), count)]
    if len(parts) == 1:
        return [Labelled(parts[0], y, 1.0)]
    labels = [of_one_batch(part.of(y)) for part in parts]
    counts: Any = [task.counted(own, some) for own in labels]
    if isinstance(counts[0], Tensor):
        counts = torch.stack(counts).tolist()
    total = sum(counts)
    return [Labelled(part, own, n / total) for part, own, n in zip(parts, labels, counts, strict=True)]


def parts_of(batch: int, count: int) -> Iterator[MicroBatch]:
    """A batch of `batch` samples in `count` parts whose sizes differ by one at most, and no empty one.

    >>> [(part.samples.start, part.samples.stop) for part in parts_of(5, 2)]
    [(0, 3), (3, 5)]
    """
    count = min(count, batch)
    if count <= 1:
        yield MicroBatch(slice(0, batch), batch)
        return
    start = 0
    for index in range(count):
        stop = start + batch // count + (index < batch % count)
        yield MicroBatch(slice(start, stop), batch, index)
        start = stop


@dataclass
class JoinedParts:
    """Output and message of a group, put together out of those of its parts, in memory that is taken once."""

    name: str
    """Of the group, for messages."""
    tensors: list[Tensor] = field(default_factory=list)
    tree: Any = None

    def add(self, part: MicroBatch, tree: Any) -> None:
        """Take over the output and message of a part, which come after those of the parts before.

        Raises:
            LayerwiseError: a tensor of them does not have one entry per sample.
        """
        if part.index is None:
            self.tree = tree
            return
        arrived: list[Tensor] = []
        form = mapped(tree, lambda t: self._place(part, t, arrived))
        if part.index == 0:
            self.tree = form

    def _place(self, part: MicroBatch, tensor: Tensor, arrived: list[Tensor]) -> Tensor:
        samples = part.samples.stop - part.samples.start
        if tensor.dim() == 0 or len(tensor) != samples:
            raise LayerwiseError(
                f"block {self.name!r} passes on a tensor of shape {tuple(tensor.shape)} for {samples} samples, so that "
                "its batch cannot be run in parts; leave micro out, or pass on tensors whose first dimension is the "
                "batch."
            )
        place = len(arrived)
        if part.index == 0:
            self.tensors.append(torch.empty((part.batch, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device))
        self.tensors[place][part.samples] = tensor
        arrived.append(self.tensors[place])
        return self.tensors[place]
