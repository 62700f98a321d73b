"""Moves tensors that autograd saves for the backward pass to host memory or disk, and fetches them back in time."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from layerwise.core.groups import Unit
from layerwise.memory.stores import DiskStore, HostStore, Store

SMALLEST = 2**12  # bytes; smaller storages stay on the device
AHEAD = 2  # storages in flight at a time, in either direction


class NotMoved:
    """Replaces `ActivationOffload` if activations stay on the device."""

    def kept(self, units: Sequence[Unit]) -> AbstractContextManager[None]:
        """A context that has no effect."""
        return nullcontext()


class Moved:
    """A storage that is kept elsewhere, and fetched when autograd needs it."""

    def __init__(self, key: int, tensor: Tensor, storage: torch.UntypedStorage):
        self.key, self.device, self.length = key, storage.device, storage.nbytes()
        self.version = tensor._version
        self.origin = weakref.ref(storage)
        self.leaving: Tensor | None = tensor
        """The tensor itself, until its bytes are written."""
        self.here: Callable[[], torch.UntypedStorage | None] = lambda: None
        """The fetched bytes, as long as something refers to them."""
        self.coming: tuple[Tensor, Callable[[], object]] | None = None
        """Bytes being fetched, and a function that waits for them."""
        self.left: Callable[[], object] = lambda: None
        """Waits until the bytes are written; raises the error of a failed write."""
        self.fetched = False
        """Whether autograd has already fetched it once."""
        self.torn = False
        """Whether the bytes changed while they were written."""


class SavedTensor:
    """A saved tensor: its place in its storage."""

    def __init__(self, moved: Moved, tensor: Tensor):
        self.moved, self.dtype = moved, tensor.dtype
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """Rebuild the tensor from its bytes."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)  # pyright: ignore[reportArgumentType]


class ActivationOffload:
    """Moves the saved activations of a training step away, each storage once even if several tensors view it.

    A thread (for host memory of an accelerator: a stream) writes them while the forward pass continues. It reads them
    back in reverse order during the backward pass, so that few are on the device at a time. Parameters, buffers and
    small tensors stay. The file has no name, so that it is gone however the process ends. Its space is reserved, and it
    is written instead of mapped, so that a full disk raises an error with a sentence instead of a signal.

    Args:
        kind: host or disk. On the CPU, activations are in host memory anyway, so host moves nothing.
        folder: for the file, if `kind` is disk.
        device: where blocks run.

    Raises:
        LayerwiseError: the folder cannot be written to, or the disk is full.
    """

    def __init__(self, kind: Literal["host", "disk"], folder: Path, device: torch.device):
        self._idle = kind == "host" and device.type == "cpu"
        self._store: Store = HostStore(device) if kind == "host" else DiskStore(folder, device, reserve=True)
        self._mover = ThreadPoolExecutor(1, "layerwise-activations")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and kind == "host" else None
        self._moved: list[Moved] = []
        """Storages of the current step, in the order in which they were saved."""
        self._known: dict[int, Moved] = {}
        """The same by address of the storage; the address may belong to another storage by now."""
        self._leaving: deque[Callable[[], object]] = deque()
        """For each storage that is being written, a function that waits for it."""

    @contextmanager
    def kept(self, units: Sequence[Unit]) -> Iterator[None]:
        """A context in which tensors that autograd saves are kept elsewhere."""
        if self._idle:
            yield
            return
        stays = {t.untyped_storage()._cdata for unit in units for t in (*unit.parameters(), *unit.buffers())}

        def pack(tensor: Tensor) -> Tensor | SavedTensor:
            if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
                return tensor
            storage = tensor.untyped_storage()
            if storage.nbytes() < SMALLEST or storage._cdata in stays:
                return tensor
            return SavedTensor(self._send(tensor.detach(), storage), tensor)

        def unpack(packed: Tensor | SavedTensor) -> Tensor:
            return packed.of(self._fetch(packed.moved)) if isinstance(packed, SavedTensor) else packed

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield
        finally:
            self._moved, self._known = [], {}
            self._leaving.clear()
            self._mover.submit(int).result()  # writes in flight must not overlap with the next step's bytes

    def _send(self, tensor: Tensor, storage: torch.UntypedStorage) -> Moved:
        """Start to move a storage away, unless that has already been done."""
        known = self._known.get(storage._cdata)
        if known is not None and known.origin() is storage and known.version == tensor._version:
            return known
        moved = self._known[storage._cdata] = Moved(len(self._moved), tensor, storage)
        self._moved.append(moved)
        chunk = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if self._side is None:

            def write() -> None:
                self._store.write(moved.key, moved.length, [(0, chunk)])
                moved.torn = tensor._version != moved.version
                moved.leaving = None

            moved.left = self._mover.submit(write).result
        else:
            moved.left = self._on_side(lambda: self._store.write(moved.key, moved.length, [(0, chunk)]))
            moved.leaving = None
        self._leaving.append(moved.left)
        while len(self._leaving) > AHEAD:
            self._leaving.popleft()()
        return moved

    def _fetch(self, moved: Moved) -> torch.UntypedStorage:
        """Fetch the bytes of a storage, and start to fetch those saved before it."""
        storage, leaving = moved.here(), moved.leaving
        if leaving is not None:  # still being written
            storage, moved.torn = leaving.untyped_storage(), leaving._version != moved.version
        if storage is None:
            self._ask(moved)
        coming, moved.coming, moved.fetched = moved.coming, None, True
        for earlier in self._moved[max(moved.key - AHEAD, 0) : moved.key][::-1]:
            if not earlier.fetched and earlier.leaving is None:
                self._ask(earlier)
        if storage is None:
            assert coming is not None
            moved.left()
            coming[1]()
            storage = coming[0].untyped_storage()
            moved.here = weakref.ref(storage)
        if moved.torn:
            raise RuntimeError(
                "a tensor that the backward pass needs was changed by an in-place operation while it was written away"
            )
        return storage

    def _ask(self, moved: Moved) -> None:
        """Start to bring a storage back."""
        if moved.coming is not None:
            return
        into = torch.empty(moved.length, dtype=torch.uint8, device=moved.device)
        if self._side is None:
            wait = self._mover.submit(self._store.read, moved.key, moved.length, into).result
        else:
            wait = self._on_side(lambda: self._store.read(moved.key, moved.length, into))
            into.record_stream(self._side)
        moved.coming = into, wait

    def _on_side(self, work: Callable[[], None]) -> Callable[[], object]:
        """Queue work on the second stream after that of the first; returns a function that makes the first wait."""
        assert self._side is not None
        current = torch.cuda.current_stream(self._side.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            work()
            done = torch.cuda.Event()
            done.record(self._side)
        return lambda: current.wait_event(done)
