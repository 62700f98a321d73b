"""Trees of tensors between ranks: forward, asynchronous, in order, every wait with a time limit."""

import contextlib
import datetime
import os
import pickle
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_leaves, tree_map

from layerwise.errors import LayerwiseError

DEPTH = 4  # batches on the way from one rank to the next; as many more wait at the sender
FORWARD, DONE = 0, 1  # tags: batches and figures to the next rank, the last one's answer at the end
TAGS = 8  # from the tag of one lane to that of the next


class Refused(LayerwiseError):
    """The ranks have agreed not to begin, or not to go on.

    Attributes:
        teller: the rank that tells the user why.
    """

    def __init__(self, sentence: str, teller: int):
        super().__init__(sentence)
        self.teller = teller


@dataclass(frozen=True)
class TensorSpec:
    """In place of a tensor in the layout of a tree."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Spec of a dense copy; the order of the dimensions in memory stays, as kernels may depend on it."""
        dense = torch.empty_like(tensor, device="meta")
        return cls(tuple(dense.shape), dense.stride(), dense.dtype)


def layout_of(tree: Any) -> bytes:
    """A tree with forms in place of its tensors, as bytes."""
    return pickle.dumps(tree_map(lambda leaf: TensorSpec.of(leaf) if isinstance(leaf, Tensor) else leaf, tree))


@dataclass
class Slot:
    """Buffers for one tree, used again while trees of the same layout follow one another."""

    layout: bytes = b""
    tree: Any = None
    """The tree, with views of the buffers as its tensors."""
    flat: list[Tensor] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)
    """What is being sent out of them."""

    def fit(self, layout: bytes, device: torch.device) -> None:
        """Make buffers for `layout`, unless they are there."""
        if layout == self.layout:
            return
        self.layout, self.flat = layout, []

        def buffer(leaf: Any) -> Any:
            if not isinstance(leaf, TensorSpec):
                return leaf
            size = torch.Size(leaf.shape).numel()
            self.flat.append(torch.empty(size, dtype=leaf.dtype, device=device))
            return self.flat[-1].as_strided(leaf.shape, leaf.stride)

        self.tree = tree_map(buffer, pickle.loads(layout))


class Outlet:
    """The sending end of a way to another rank. A header goes ahead where the layout changes.

    Trees take the lanes in turn. gloo sends nothing before the receiver has said that it waits, so that each lane has
    one message on its way at a time; several lanes keep a long wire full.
    """

    def __init__(self, ranks: "Ranks", peer: int, tag: int, device: torch.device, lanes: int = 1):
        self.ranks, self.peer, self.tag, self.device = ranks, peer, tag, device
        self.slots = [Slot() for _ in range(DEPTH)]
        self.count, self.layouts = 0, [b""] * lanes

    def send(self, tree: Any) -> None:
        """Copy a tree and start sending it; waits only while `DEPTH` earlier ones are under way."""
        slot, lane = self.slots[self.count % DEPTH], self.count % len(self.layouts)
        self.count += 1
        self._wait(slot)
        layout = layout_of(tree)
        slot.fit(layout, self.device)
        for target, leaf in zip(tree_leaves(slot.tree), tree_leaves(tree), strict=True):
            if isinstance(leaf, Tensor):
                target.copy_(leaf.detach())
        header = b"" if layout == self.layouts[lane] else layout
        self.layouts[lane] = layout
        parts = [torch.tensor([len(header)])]
        if header:
            parts.append(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        parts += [flat for flat in slot.flat if flat.numel()]
        with self.ranks.watching(self.peer):
            # A work holds its tensor, which therefore lives until it has gone.
            slot.works = [(dist.isend(part, self.peer, tag=self.tag + TAGS * lane), part) for part in parts]

    def end(self) -> None:
        """Tell every lane that nothing more comes, and wait until that has gone."""
        for _ in self.layouts:
            self.send(None)
        self.drain()

    def drain(self) -> None:
        """Wait until everything has gone."""
        for slot in self.slots:
            self._wait(slot)

    def _wait(self, slot: Slot) -> None:
        for work, _ in slot.works:
            with self.ranks.watching(self.peer):
                work.wait(self.ranks.limit)
        slot.works = []


class Inlet:
    """The receiving end of a way with one lane.

    Args:
        slots: trees of which the tensors are kept.
        limit: for every wait; that of the ranks if not given.
    """

    def __init__(
        self,
        ranks: "Ranks",
        peer: int,
        tag: int,
        device: torch.device,
        slots: int = 1,
        limit: datetime.timedelta | None = None,
    ):
        self.ranks, self.peer, self.tag, self.device = ranks, peer, tag, device
        self.slots = [Slot() for _ in range(slots)]
        self.limit = limit or ranks.limit
        self.count, self.layout = 0, b""

    def receive(self) -> Any:
        """The next tree; its tensors are overwritten when as many more have come as there are slots."""
        slot = self.slots[self.count % len(self.slots)]
        self.count += 1
        size = torch.zeros(1, dtype=torch.int64)
        self._into(size)
        if int(size):
            header = torch.empty(int(size), dtype=torch.uint8)
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


class Lane:
    """An inlet that is read ahead by a thread, up to `ahead` trees that nobody has taken; None ends it."""

    def __init__(self, inlet: Inlet, ahead: int):
        self.inlet = inlet
        self.room = threading.Semaphore(ahead)
        self.found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="receiver").start()

    def _read(self) -> None:
        tree: Any = ()
        while tree is not None:
            self.room.acquire()
            try:
                tree = self.inlet.receive()
            except Exception as failure:  # told where the tree is asked for
                self.found.put(failure)
                return
            self.found.put(tree)


class Prefetched:
    """The receiving end of a way with lanes, read ahead up to `DEPTH` trees; None, sent on every lane, ends it.

    Its time limit is that of the peer's silence, which shows where the next tree is asked for: a lane waits for its
    own next tree through several steps of the peer.
    """

    def __init__(self, ranks: "Ranks", peer: int, tag: int, device: torch.device, lanes: int = 1):
        ahead = DEPTH // lanes
        limit = 2 * DEPTH * ranks.limit
        # Slots: those that wait or are being filled, and one in use.
        inlets = [Inlet(ranks, peer, tag + TAGS * lane, device, ahead + 1, limit) for lane in range(lanes)]
        self.ranks, self.peer = ranks, peer
        self.lanes = [Lane(inlet, ahead) for inlet in inlets]
        self.count = 0

    def receive(self) -> Any:
        """The next tree; its tensors are overwritten after the one that follows has been asked for."""
        lane = self.lanes[self.count % len(self.lanes)]
        self.count += 1
        try:
            tree = lane.found.get(timeout=self.ranks.limit.total_seconds())
        except queue.Empty:
            raise self.ranks.lost(self.peer, "timed out") from None
        if isinstance(tree, Exception):
            raise tree
        lane.room.release()
        return tree

    def end(self) -> None:
        """Take the None of every lane, after which nothing of the peer's is on its way."""
        for _ in self.lanes:
            self.receive()


class Ranks:
    """The processes of a job: who this one is, and what became of the others.

    Args:
        timeout: seconds after which a rank that does not answer counts as lost.
        device: of this rank.

    Raises:
        LayerwiseError: not started by torchrun, or the ranks do not find one another within the limit.
    """

    def __init__(self, timeout: float, device: torch.device):
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise LayerwiseError(
                    "--parallel needs several processes; start it with torchrun --nproc-per-node N -m layerwise train "
                    "--parallel ..."
                )
        self.limit = datetime.timedelta(seconds=timeout)
        # NCCL refuses two ranks on one device; messages then go over the host.
        nccl = device.type == "cuda" and dist.is_nccl_available() and local_ranks() <= torch.cuda.device_count()
        try:
            store, self.rank, self.count = next(rendezvous("env://", timeout=self.limit))
            # torchrun keeps its store over restarts, with what the ranks of earlier attempts have left in it.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = dist.PrefixStore(f"attempt/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.count,
                timeout=self.limit,
            )
            group = dist.new_group(backend="gloo", timeout=self.limit)
        except (RuntimeError, ValueError, TimeoutError) as reason:
            raise LayerwiseError(not_met(str(reason), timeout)) from reason
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        """For what all ranks do together, on the host."""
        self.device = device
        self.wire = device if nccl else torch.device("cpu")
        self.lanes = 1 if nccl else DEPTH  # NCCL has no tags, and streams of its own
        self.agreed = self.meetings = 0
        self.blocks: list[str] = []
        """What each rank holds, for error sentences."""

    def suspect(self, peer: int) -> int:
        """Who is to blame where a message to or from `peer` fails; a pulse, which knows more, replaces this."""
        return peer

    def name(self, rank: int) -> str:
        """A rank in words."""
        return f"rank {rank} ({self.blocks[rank]})" if self.blocks else f"rank {rank}"

    @contextlib.contextmanager
    def watching(self, peer: int) -> Any:
        """A context in which a failure to talk to `peer` becomes one sentence."""
        try:
            yield
        except RuntimeError as reason:
            raise self.lost(peer, str(reason)) from reason

    @contextlib.contextmanager
    def together(self) -> Any:
        """A context in which all ranks do one thing; where one of them does not come, or stays in it, it is named.

        It gives a function, to be called when this rank has done its own share.
        """
        self.meetings += 1
        number = self.meetings

        def mark(what: str) -> None:
            self.store.set(f"{what}/{number}/{self.rank}", "yes")

        try:
            mark("here")
            yield lambda: mark("done")
        except RuntimeError as reason:
            missing: list[int] = []
            with contextlib.suppress(RuntimeError):
                for what in ("here", "done"):
                    keys = [f"{what}/{number}/{rank}" for rank in range(self.count)]
                    missing = missing or [i for i, key in enumerate(keys) if not self.store.check([key])]
            others = [self.name(rank) for rank in missing or [0] if rank != self.rank]
            raise self._gone(" or ".join(others) or "a rank", str(reason)) from reason

    def lost(self, peer: int, reason: str) -> LayerwiseError:
        """What is wrong with `peer`, or with another rank that it waits for, or what was told before."""
        return self.gone(self.suspect(peer), reason)

    def gone(self, rank: int, reason: str) -> LayerwiseError:
        """What is wrong with a rank, or what was told of another one before."""
        return self._gone(self.name(rank), reason)

    def _gone(self, who: str, reason: str) -> LayerwiseError:
        if "timed out" in reason.lower():
            about = f"has not answered {self.name(self.rank)} for {self.limit.total_seconds():g} s"
        else:
            about = f"has ended, as {self.name(self.rank)} noticed"
        return LayerwiseError(
            self.told(f"{who} {about}; the run stops, and goes on from its last checkpoint with --resume.")
        )

    def told(self, sentence: str) -> str:
        """Tell all ranks why the job ends; gives back what was told first."""
        with contextlib.suppress(RuntimeError):  # whoever keeps the store may be gone too
            return self.store.compare_set("failure", "", sentence).decode()
        return sentence

    def agree(self, error: str | None, facts: Any = None, word: Any = None) -> list[Any]:
        """Go on only if all ranks do, with the same facts.

        Args:
            error: what is wrong here.
            facts: name to what must be the same everywhere.
            word: what this rank tells the others.

        Returns:
            The words of all ranks.

        Raises:
            Refused: on all ranks, with the sentence of the lowest one that has one.
        """
        # Through the store, which outlives a rank that ends at once.
        self.agreed += 1
        keys = [f"agreed/{self.agreed}/{rank}" for rank in range(self.count)]
        try:
            self.store.set(keys[self.rank], pickle.dumps((error, facts, word)).hex())
            self.store.wait(keys, self.limit)
            found = [pickle.loads(bytes.fromhex(self.store.get(key).decode())) for key in keys]
        except RuntimeError as reason:
            sentence = f"a rank was not ready within {self.limit.total_seconds():g} s, so the run has not begun."
            raise LayerwiseError(self.told(sentence)) from reason
        errors = [(rank, sentence) for rank, (sentence, _, _) in enumerate(found) if sentence is not None]
        if not errors:
            for rank, (_, other, _) in enumerate(found):
                wrong = [name for name, value in (found[0][1] or {}).items() if other[name] != value]
                if wrong:
                    errors = [
                        (
                            0,
                            f"rank {rank} has other {wrong[0]} than rank 0; give all ranks the same command and data.",
                        )
                    ]
                    break
        if errors:
            rank, sentence = errors[0]
            raise Refused(sentence, teller=rank)
        return [word for _, _, word in found]


def not_met(reason: str, timeout: float) -> str:
    """Why the ranks have not met, in a sentence."""
    if "EADDRINUSE" in reason or "address already in use" in reason.lower():
        return (
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is in use, so the ranks cannot meet "
            "there; choose another one (torchrun --master-port), or start torchrun with --standalone."
        )
    return (
        f"the ranks did not find one another within {timeout:g} s ({reason.splitlines()[0]}); check that all of them "
        "were started and that the address and port of the first can be reached."
    )


def local_ranks() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def guarded(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Do the work of a rank; where it fails, the other ranks are told which rank and why."""
    try:
        return work()
    except Refused:
        raise
    except LayerwiseError as error:
        ranks.told(f"{ranks.name(ranks.rank)} has stopped: {error}")
        raise
    except Exception as error:
        ranks.told(f"{ranks.name(ranks.rank)} has stopped: {type(error).__name__}: {error}")
        raise
