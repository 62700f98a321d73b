"""Replicas: processes that hold the same blocks and train them on different samples of one batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerwise.core.groups import Unit
from layerwise.errors import LayerwiseError
from layerwise.parallel.alone import OneProcess
from layerwise.parallel.heartbeat import Heartbeat
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.serialization import all_gather_values


class Replicas(OneProcess):
    r"""The processes that hold the same blocks, each with its share of every batch.

    There are N replicas, and $c_r$ labels count in the share of replica r. It weights its gradient by $N c_r / c$ with
    $c = \sum_r c_r$. Then the mean of their gradients is the gradient of the mean loss over the c labels of the batch:

    $$\frac1N \sum_{r=1}^{N} \frac{N c_r}{c} \nabla \frac{1}{c_r} \sum_{i \in \text{share } r} \ell_i
      = \nabla \frac1c \sum_i \ell_i$$

    Give it to a `Learner`, whose `step` then takes this rank's share; all replicas call it equally often.

    Args:
        ranks: the processes of the job.
        group: those of them that are replicas of one another; all if not given.

    Attributes:
        rank: number of this process among the replicas.
        count: how many there are.
    """

    deferred = True

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup | None = None):
        self.ranks, self.group = ranks, group
        members = range(ranks.count) if group is None else dist.get_process_group_ranks(group)
        self.heartbeat = Heartbeat(ranks, members)
        self.first, self.rank, self.count = members[0], members.index(ranks.rank), len(members)

    def copy_from_first(self, tensors: Iterable[Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Overwrite tensors with those of the first replica.

        Args:
            tensors: of the same shapes and types everywhere.
            facts: by name, what else must be the same on all replicas.

        Raises:
            Refused: on all ranks, if the replicas differ.
        """
        tensors = list(tensors)
        kinds = [f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors]
        # Before anything is sent: a collective whose sizes differ fails in gloo without a clear message.
        self.ranks.agree(None, {**(facts or {}), "the tensors of the model": kinds}, column=self.first)
        self._copy(tensors)

    def adopt(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Prepare a group before its optimizer is created: copy its auxiliary modules from the first replica."""
        auxiliary = [unit.auxiliary for unit in units if unit.auxiliary is not None]
        self._copy(tensor for module in auxiliary for tensor in (*module.parameters(), *module.buffers()))

    def _copy(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            with self.heartbeat.watching():
                dist.broadcast(tensor.detach(), src=self.first, group=self.group)

    def reduce(
        self, parameters: Sequence[nn.Parameter], running: Sequence[Tensor], loss: Tensor
    ) -> Callable[[], Tensor]:
        """Start to average gradients and running statistics over the replicas, in one flat bucket per type.

        Args:
            parameters: those whose gradients are averaged; these live in the bucket from now on.
            running: running statistics, written when the averages have arrived.
            loss: a scalar; only whether it is finite matters.

        Returns:
            A function that waits for the averages and puts them in place. It returns 0, or NaN if the loss of any
            replica was not finite. Its result is the same on every replica.
        """
        learned = [p for p in parameters if p.grad is not None]
        sources: dict[torch.dtype, list[Tensor]] = {}
        for tensor in [*learned, *running]:
            sources.setdefault(tensor.dtype, []).append(tensor)
        sent = []
        for dtype, targets in sources.items() or [(torch.float32, [])]:
            flat = torch.empty(sum(t.numel() for t in targets) + 1, dtype=dtype, device=loss.device)
            flat[-1] = loss * 0
            parts = flat[:-1].split([t.numel() for t in targets])
            # In the memory order of the parameter, as fused optimizers require.
            views = [part.as_strided(t.shape, t.stride()) for part, t in zip(parts, targets, strict=True)]
            for view, target in zip(views, targets, strict=True):
                if isinstance(target, nn.Parameter):
                    assert target.grad is not None
                    view.copy_(target.grad)
                    target.grad = None
                else:
                    view.copy_(target)
            flat /= self.count
            with self.heartbeat.watching():
                sent.append((dist.all_reduce(flat, group=self.group, async_op=True), flat, views, targets))

        def arrived() -> Tensor:
            flag = torch.zeros((), device=loss.device)
            for work, flat, views, targets in sent:
                self._wait(work, flat)
                flag = flag + flat[-1]
                for view, target in zip(views, targets, strict=True):
                    if isinstance(target, nn.Parameter):
                        target.grad = view
                    else:
                        target.copy_(view)
            return flag

        return arrived

    def total(self, value: float | Tensor) -> float | Tensor:
        """Sum of the replicas' numbers; on an accelerator a scalar there, so that the host does not wait for it."""
        if self.count == 1:
            return value
        device = self.ranks.device
        found = value.float().clone() if isinstance(value, Tensor) else torch.full((), value, device=device)
        with self.heartbeat.watching():
            work = dist.all_reduce(found, group=self.group, async_op=True)
        self._wait(work, found)
        return float(found) if device.type == "cpu" else found

    def largest(self, value: int) -> Callable[[], int]:
        """Start to find the largest of the replicas' numbers; returns a function that waits for it."""
        found = torch.tensor([value], device="cpu")
        with self.heartbeat.watching():
            work = dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

        def arrived() -> int:
            self._wait(work, found)
            return int(found)

        return arrived

    def gather(self, value: Any) -> list[Any]:
        """Gather the replicas' values in order: numbers, strings, None, and tuples, lists and dicts of them."""
        with self.heartbeat.watching():
            return all_gather_values(value, self.group)

    def _wait(self, work: Any, tensor: Tensor) -> None:
        with self.heartbeat.watching():
            # With a limit, NCCL's wait would block the host; its own watchdog keeps the limit of the group.
            work.wait(*([] if tensor.is_cuda else [self.ranks.limit]))


def check_shares(batch_size: int, count: int) -> None:
    """Raise LayerwiseError unless a batch divides into equal shares: the mean of their losses must be its loss."""
    if batch_size % count:
        lower, upper = batch_size // count * count, -(-batch_size // count) * count
        raise LayerwiseError(
            f"{count} replicas cannot share a batch of {batch_size} samples equally; use --batch-size "
            f"{f'{lower} or {upper}' if lower else upper}."
        )
