"""Sends trees of tensors between ranks: asynchronously, in order, every wait with a time limit."""

import datetime
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from layerwise.parallel.ranks import LANES, Ranks
from layerwise.parallel.serialization import TensorSpec, decode, encode

DEPTH = LANES  # batches in flight from one rank to the next; as many more wait at the sender
# Tags: batches and figures to the next rank, the last rank's answer at the end, its output matrix, and
# what is sent back by one rank if heads follow the next block.
FORWARD, DONE, MATRIX, BACK = 0, 1, 2, 3
TAGS = 8  # from the tag of one lane to that of the next


@dataclass
class TreeBuffers:
    """Buffers for one tree. They are reused while the next trees have the same layout."""

    layout: bytes = b""
    tree: Any = None
    """The tree. Its tensors are views of the buffers."""
    flat: list[Tensor] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)
    """Unfinished sends that read the buffers."""

    def fit(self, layout: bytes, device: torch.device) -> None:
        """Make buffers for `layout`, unless these fit."""
        if layout == self.layout:
            return
        self.layout, self.flat = layout, []

        def buffer(leaf: Any) -> Any:
            if not isinstance(leaf, TensorSpec):
                return leaf
            size = torch.Size(leaf.shape).numel()
            self.flat.append(torch.empty(size, dtype=leaf.dtype, device=device))
            return self.flat[-1].as_strided(leaf.shape, leaf.stride)

        self.tree = tree_map(buffer, decode(layout))


class SendChannel:
    """The sending end of a channel to another rank. A header precedes a tree whose layout is new.

    Trees take the lanes in turn. gloo sends nothing before the receiver has requested it, so each lane carries one
    message at a time. Several lanes keep a connection with a long delay busy.

    Args:
        slots: trees that may be in transit at once.
    """

    def __init__(self, ranks: Ranks, peer: int, tag: int, device: torch.device, lanes: int = 1, slots: int = DEPTH):
        self.ranks, self.peer, self.tag, self.device = ranks, peer, tag, device
        self.slots = [TreeBuffers() for _ in range(slots)]
        self.count, self.layouts = 0, [b""] * lanes

    def send(self, tree: Any) -> None:
        """Copy a tree and start sending it; waits only while all slots are in use."""
        slot, lane = self.slots[self.count % len(self.slots)], self.count % len(self.layouts)
        self.count += 1
        self._wait(slot)
        layout = encode(tree)
        slot.fit(layout, self.device)
        for target, leaf in zip(tree_leaves(slot.tree), tree_leaves(tree), strict=True):
            if isinstance(leaf, Tensor):
                target.copy_(leaf.detach())
        header = b"" if layout == self.layouts[lane] else layout
        self.layouts[lane] = layout
        parts = [torch.tensor([len(header)], device="cpu")]
        if header:
            parts.append(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        parts += [flat for flat in slot.flat if flat.numel()]
        with self.ranks.watching(self.peer):
            # Each tensor is kept until it is sent.
            slot.works = [(dist.isend(part, self.peer, tag=self.tag + TAGS * lane), part) for part in parts]

    def end(self) -> None:
        """Send None on every lane, which ends the channel, and wait until it is sent."""
        for _ in self.layouts:
            self.send(None)
        self.drain()

    def drain(self) -> None:
        """Wait until everything is sent."""
        for slot in self.slots:
            self._wait(slot)

    def _wait(self, slot: TreeBuffers) -> None:
        for work, _ in slot.works:
            with self.ranks.watching(self.peer):
                work.wait(self.ranks.limit)
        slot.works = []


class ReceiveChannel:
    """The receiving end of a channel with one lane.

    Args:
        slots: number of trees whose tensors stay valid.
        limit: for every wait; that of the ranks if not given.
    """

    def __init__(
        self,
        ranks: Ranks,
        peer: int,
        tag: int,
        device: torch.device,
        slots: int = 1,
        limit: datetime.timedelta | None = None,
    ):
        self.ranks, self.peer, self.tag, self.device = ranks, peer, tag, device
        self.slots = [TreeBuffers() for _ in range(slots)]
        self.limit = limit or ranks.limit
        self.count, self.layout = 0, b""

    def receive(self) -> Any:
        """The next tree. Its tensors are overwritten after as many more trees as there are slots."""
        slot = self.slots[self.count % len(self.slots)]
        self.count += 1
        size = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._into(size)
        if int(size):
            header = torch.empty(int(size), dtype=torch.uint8, device="cpu")
            self._into(header)
            self.layout = header.numpy().tobytes()
        slot.fit(self.layout, self.device)
        for flat in slot.flat:
            if flat.numel():
                self._into(flat)
        return slot.tree

    def _into(self, flat: Tensor) -> None:
        with self.ranks.watching(self.peer):
            work = dist.irecv(flat, self.peer, tag=self.tag)
            assert work is not None
            work.wait(self.limit)


class PrefetchThread:
    """Reads a channel ahead, up to `ahead` trees that are not used yet. A None from the channel ends it."""

    def __init__(self, channel: ReceiveChannel, ahead: int):
        self.channel = channel
        self.room = threading.Semaphore(ahead)
        self.trees: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="receiver").start()

    def _read(self) -> None:
        tree: Any = ()
        while tree is not None:
            self.room.acquire()
            try:
                tree = self.channel.receive()
            except Exception as failure:  # raised when the tree is requested
                self.trees.put(failure)
                return
            self.trees.put(tree)


class PrefetchingChannel:
    """The receiving end of a channel with lanes. It is read ahead up to `DEPTH` trees; None on every lane ends it.

    The time limit applies when the next tree is requested. A single lane may wait longer, because its own next tree
    comes only after several steps of the peer.
    """

    def __init__(self, ranks: Ranks, peer: int, tag: int, device: torch.device, lanes: int = 1):
        ahead = DEPTH // lanes
        limit = 2 * DEPTH * ranks.limit
        # Slots for the trees that wait or are being filled, and for the one in use.
        channels = [ReceiveChannel(ranks, peer, tag + TAGS * lane, device, ahead + 1, limit) for lane in range(lanes)]
        self.ranks, self.peer = ranks, peer
        self.lanes = [PrefetchThread(channel, ahead) for channel in channels]
        self.count = 0

    def receive(self) -> Any:
        """The next tree. Its tensors are overwritten once the one after it is requested."""
        lane = self.lanes[self.count % len(self.lanes)]
        self.count += 1
        try:
            tree = lane.trees.get(timeout=self.ranks.limit.total_seconds())
        except queue.Empty:
            raise self.ranks.lost(self.peer, "timed out") from None
        if isinstance(tree, Exception):
            raise tree
        lane.room.release()
        return tree

    def end(self) -> None:
        """Take the None of every lane. After that nothing from the peer is in transit."""
        for _ in self.lanes:
            self.receive()


class MatrixChannel:
    """The channel of the output matrix from the last rank of a pipeline to its other ranks.

    It goes through the host even if batches go from device to device: NCCL has no tags, so the matrix would wait for
    the next batch.

    Args:
        ranks: the processes of the job.
        stage: of this rank; nothing is sent unless its `shares_matrix` is set.
        first: number of the pipeline's first rank.
    """

    def __init__(self, ranks: Ranks, stage: Any, first: int = 0):
        last, host = first + stage.ranks - 1, torch.device("cpu")
        others = range(first, last) if stage.shares_matrix else ()
        # The buffers are as large as the matrix, and no rank is more than one ahead.
        self.to_others = [SendChannel(ranks, rank, MATRIX, host, slots=1) for rank in others if stage.last]
        self.from_last = ReceiveChannel(ranks, last, MATRIX, host) if others and not stage.last else None

    def send(self, matrix: Tensor) -> None:
        """Send the matrix to all other ranks."""
        for channel in self.to_others:
            channel.send(matrix)

    def receive(self) -> Tensor:
        """The next matrix, on the host; it is overwritten once the one after it is requested."""
        assert self.from_last is not None
        return self.from_last.receive()

    def end(self) -> None:
        """Wait until all sends have arrived; versions that are no longer needed are dropped."""
        for channel in self.to_others:
            channel.end()
        while self.from_last is not None and self.from_last.receive() is not None:
            pass


class BackLink:
    """Sends lists of tensors against the direction of the batches, through the host; a channel is created when used.

    Args:
        ranks: the processes of the job.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self._sends, self._receives = ranks, None, None

    _sends: SendChannel | None
    _receives: ReceiveChannel | None

    def send_back(self, tensors: list[Tensor]) -> None:
        """Send a list of tensors to the previous rank."""
        self._sends = self._sends or SendChannel(self.ranks, self.ranks.rank - 1, BACK, torch.device("cpu"))
        self._sends.send(tensors)

    def receive_back(self) -> list[Tensor]:
        """The next list of tensors from the next rank, on this rank's device."""
        peer = self.ranks.rank + 1
        self._receives = self._receives or ReceiveChannel(self.ranks, peer, BACK, torch.device("cpu"))
        return [tensor.to(self.ranks.device) for tensor in self._receives.receive()]

    def end_back(self) -> None:
        """Wait until all sends have arrived."""
        if self._sends is not None:
            self._sends.drain()


class PipelineLink(BackLink):
    """The link of a `Stage` that is one rank of a pipeline: it receives from the previous rank and sends to the next.

    For your own training loop, in which all ranks call `Learner.step` equally often:

        ranks = Ranks(timeout=60, device=torch.device("cpu"))
        stage = Stage(ranks.rank, ranks.count)
        learner = Learner(model, "local_ce", cuts="layers.*", stage=stage, example=batch)
        with PipelineLink(ranks, stage, stage.blocks):
            for batch in batches:
                learner.step(batch)

    Args:
        ranks: the processes of the job: one per stage, or several pipelines side by side, one after the other.
        stage: of this rank; the link is given to it.
        blocks: what each rank of the job runs, for error sentences.
    """

    def __init__(self, ranks: Ranks, stage: Any, blocks: Sequence[str] = ()):
        super().__init__(ranks)
        ranks.blocks = list(blocks)
        rank, about = ranks.rank, (FORWARD, ranks.transfer_device, ranks.lanes)
        self.to_next = None if stage.last else SendChannel(ranks, rank + 1, *about)
        self.from_previous = None if stage.first else PrefetchingChannel(ranks, rank - 1, *about)
        self.matrix = MatrixChannel(ranks, stage, first=rank - stage.rank)
        self.receive_matrix, self.send_matrix = self.matrix.receive, self.matrix.send
        stage.link = self

    def receive(self) -> Any:
        """The next tree from the previous rank, on this rank's device."""
        assert self.from_previous is not None
        tree = self.from_previous.receive()
        if self.ranks.transfer_device == self.ranks.device:
            return tree
        return tree_map(lambda t: t.to(self.ranks.device) if isinstance(t, Tensor) else t, tree)

    def send(self, tree: Any) -> None:
        """Send a tree to the next rank."""
        assert self.to_next is not None
        self.to_next.send(tree)

    def end(self) -> None:
        """Wait until all sends have arrived; nothing can be sent any more."""
        self.matrix.end()
        self.end_back()
        if self.to_next is not None:
            self.to_next.end()
        if self.from_previous is not None:
            self.from_previous.end()

    def __enter__(self) -> "PipelineLink":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.end()
            dist.barrier(self.ranks.group)
            dist.destroy_process_group()
