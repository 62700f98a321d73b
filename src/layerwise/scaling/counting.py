"""Measures a rank while it trains: its time, that of each group, and the bytes that it sends."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.utils._pytree import tree_leaves

from layerwise.core.engine import Engine
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.transport import FORWARD, PrefetchingChannel, SendChannel


class Clock:
    """Wall time, and the parts of it in which this thread computed or waited for a core."""

    def __init__(self) -> None:
        self.wall = time.perf_counter()
        self.busy, self.queued = time.thread_time(), queued_seconds()

    def read(self) -> dict[str, float]:
        """`seconds` since the clock was created, and of these `busy` and `queued`; the rest is other waiting."""
        # The interval of the wall time contains the others.
        queued, busy = queued_seconds() - self.queued, time.thread_time() - self.busy
        return {"seconds": time.perf_counter() - self.wall, "busy": busy, "queued": queued}


def queued_seconds() -> float:
    """Seconds during which this thread was ready to run but had no core, as Linux counts them; 0 elsewhere."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


class GroupTimes(Engine):
    """An engine that records the seconds of every group's update."""

    def __init__(self, engine: Engine):
        super().__init__(engine.rule, engine.task, engine.execution)
        self.seconds: dict[str, list[float]] = {}

    def update(self, group: Any, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        started = time.perf_counter()
        result = super().update(group, *arguments)
        self.seconds.setdefault(group.name, []).append(time.perf_counter() - started)
        return result


class CountingLink:
    """The channels of a pipeline at one rank, as in a run, with a count of the bytes."""

    def __init__(self, ranks: Ranks):
        rank, last, about = ranks.rank, ranks.count - 1, (FORWARD, ranks.transfer_device, ranks.lanes)
        self.to_next = None if rank == last else SendChannel(ranks, rank + 1, *about)
        self.from_previous = None if rank == 0 else PrefetchingChannel(ranks, rank - 1, *about)
        self.found: Any = None
        self.bytes = 0

    def take(self) -> bool:
        """Wait for the next batch; False if there are no more."""
        if self.from_previous is not None:
            self.found = self.from_previous.receive()
            return self.found is not None
        return True

    def receive(self) -> Any:
        """The batch that `take` has received."""
        return self.found

    def send(self, tree: Any) -> None:
        """Send a tree to the next rank."""
        assert self.to_next is not None
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        self.to_next.send(tree)

    def close(self) -> None:
        """Announce the end to the next rank, and receive the same from the previous rank."""
        if self.to_next is not None:
            self.to_next.end()
        if self.from_previous is not None:
            for _ in self.from_previous.lanes[1:]:  # `take` has found the None of one lane
                self.from_previous.receive()


class CountedStage(PipelineStage):
    """A stage of torch's pipeline that counts the bytes it sends."""

    bytes = 0

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The sends of torch's stage."""
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The sends of torch's stage."""
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, sends: list[dist.P2POp]) -> list[dist.P2POp]:
        self.bytes += sum(send.tensor.nbytes for send in sends)
        return sends
