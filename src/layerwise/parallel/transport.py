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

DEPTH = 4  # batches under way between two ranks, at most
FORWARD, STATE, DONE = 0, 1, 2  # tags: batches and figures to the next rank, state to the last, its answer at the end


class Refused(LayerwiseError):
    """The ranks have agreed not to begin.

    Attributes:
        teller: the rank that tells the user why.
    """

    def __init__(self, sentence: str, teller: int):
        super().__init__(sentence)
        self.teller = teller


@dataclass(frozen=True)
class Form:
    """In place of a tensor in the layout of a tree."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """Form of a dense copy; the order of the dimensions in memory stays, as kernels may depend on it."""
        dense = torch.empty_like(tensor, device="meta")
        return cls(tuple(dense.shape), dense.stride(), dense.dtype)


def layout_of(tree: Any) -> bytes:
    """A tree with forms in place of its tensors, as bytes."""
    return pickle.dumps(tree_map(lambda leaf: Form.of(leaf) if isinstance(leaf, Tensor) else leaf, tree))


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
            if not isinstance(leaf, Form):
                return leaf
            size = torch.Size(leaf.shape).numel()
            self.flat.append(torch.empty(size, dtype=leaf.dtype, device=device))
            return self.flat[-1].as_strided(leaf.shape, leaf.stride)

        self.tree = tree_map(buffer, pickle.loads(layout))


class Outlet:
    """The sending end of a way to another rank. A header goes ahead where the layout changes."""

    def __init__(self, ranks: "Ranks", peer: int, tag: int, device: torch.device):
        self.ranks, self.peer, self.tag, self.device = ranks, peer, tag, device
        self.slots = [Slot() for _ in range(DEPTH)]
        self.count, self.layout = 0, b""

    def send(self, tree: Any) -> None:
        """Copy a tree and start sending it; waits only while `DEPTH` earlier ones are under way."""
        slot = self.slots[self.count % DEPTH]
        self.count += 1
        self._wait(slot)
        layout = layout_of(tree)
        slot.fit(layout, self.device)
        for target, leaf in zip(tree_leaves(slot.tree), tree_leaves(tree), strict=True):
            if isinstance(leaf, Tensor):
                target.copy_(leaf.detach())
        header = b"" if layout == self.layout else layout
        self.layout = layout
        parts = [torch.tensor([len(header)])]
        if header:
            parts.append(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        parts += [flat for flat in slot.flat if flat.numel()]
        with self.ranks.watching(self.peer):
            # A work holds its tensor, which therefore lives until it has gone.
            slot.works = [(dist.isend(part, self.peer, tag=self.tag), part) for part in parts]

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
    """The receiving end."""

    def __init__(self, ranks: "Ranks", peer: int, tag: int, device: torch.device, slots: int = 1):
        self.ranks, self.peer, self.tag, self.device = ranks, peer, tag, device
        self.slots = [Slot() for _ in range(slots)]
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
            work.wait(self.ranks.limit)


class Prefetched:
    """An inlet that is read ahead by a thread, up to `DEPTH` trees; None, sent as the last tree, ends it."""

    def __init__(self, inlet: Inlet):
        inlet.slots = [Slot() for _ in range(DEPTH + 2)]  # those waiting, one in use, one being filled
        self.inlet = inlet
        self.found: queue.Queue[Any] = queue.Queue(DEPTH)
        self.thread = threading.Thread(target=self._read, daemon=True, name="receiver")
        self.thread.start()

    def _read(self) -> None:
        tree: Any = ()
        while tree is not None:
            try:
                tree = self.inlet.receive()
            except Exception as failure:  # told where the tree is asked for
                self.found.put(failure)
                return
            self.found.put(tree)

    def receive(self) -> Any:
        """The next tree."""
        ranks = self.inlet.ranks
        try:
            tree = self.found.get(timeout=2 * ranks.limit.total_seconds())
        except queue.Empty:  # the thread has a limit of its own, so this is the second net
            raise ranks.lost(self.inlet.peer, "timed out") from None
        if isinstance(tree, Exception):
            raise tree
        return tree


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
            self.store, self.rank, self.count = next(rendezvous("env://", timeout=self.limit))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.count,
                timeout=self.limit,
            )
        except (RuntimeError, ValueError, TimeoutError) as reason:
            raise LayerwiseError(
                f"the ranks did not find one another within {timeout:g} s ({str(reason).splitlines()[0]}); check that "
                "all of them were started and that the address and port of the first can be reached."
            ) from reason
        self.device = device
        self.wire = device if nccl else torch.device("cpu")
        self.agreed = 0
        self.blocks: list[str] = []
        """What each rank holds, for error sentences."""

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

    def lost(self, peer: int, reason: str) -> LayerwiseError:
        """What is wrong with `peer`, or what was told of another rank before."""
        if "timed out" in reason.lower():
            about = f"has not answered {self.name(self.rank)} for {self.limit.total_seconds():g} s"
        else:
            about = f"has ended, as {self.name(self.rank)} noticed"
        return LayerwiseError(
            self.told(f"{self.name(peer)} {about}; the run stops, and goes on from its last checkpoint with --resume.")
        )

    def told(self, sentence: str) -> str:
        """Tell all ranks why the job ends; gives back what was told first."""
        with contextlib.suppress(RuntimeError):  # whoever keeps the store may be gone too
            return self.store.compare_set("failure", "", sentence).decode()
        return sentence

    def agree(self, error: str | None, facts: Any = None) -> None:
        """Go on only if all ranks do, with the same facts.

        Args:
            error: what is wrong here.
            facts: name to what must be the same everywhere.

        Raises:
            Refused: on all ranks, with the sentence of the lowest one that has one.
        """
        # Through the store, which outlives a rank that ends at once.
        self.agreed += 1
        keys = [f"agreed/{self.agreed}/{rank}" for rank in range(self.count)]
        try:
            self.store.set(keys[self.rank], pickle.dumps((error, facts)).hex())
            self.store.wait(keys, self.limit)
            found = [pickle.loads(bytes.fromhex(self.store.get(key).decode())) for key in keys]
        except RuntimeError as reason:
            sentence = f"a rank was not ready within {self.limit.total_seconds():g} s, so the run has not begun."
            raise LayerwiseError(self.told(sentence)) from reason
        errors = [(rank, sentence) for rank, (sentence, _) in enumerate(found) if sentence is not None]
        if not errors:
            for rank, (_, other) in enumerate(found):
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
