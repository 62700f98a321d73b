"""Where the bytes of offloaded blocks lie while they are not on the device: in host memory, or in a file."""

import mmap
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.memory.mmap import Mapped, map_file, tensor_at, unnamed_file


class Store(Protocol):
    """Keeps the bytes of offloaded groups; `write` and `read` run in the thread that moves them."""

    def write(self, key: Hashable, length: int, chunks: Sequence[tuple[int, Tensor]]) -> None:
        """Keeps bytes of a group at their offsets."""
        ...

    def read(self, key: Hashable, length: int, into: Tensor) -> None:
        """Copies the first `length` bytes of a group to the device."""
        ...

    def view(self, key: Hashable, length: int) -> Tensor:
        """The first `length` bytes of a group, on the host."""
        ...


class HostStore:
    """Host memory, pinned where the device is an accelerator."""

    def __init__(self, device: torch.device):
        self._pinned = device.type == "cuda"
        self._bytes: dict[Hashable, Tensor] = {}

    def write(self, key: Hashable, length: int, chunks: Sequence[tuple[int, Tensor]]) -> None:
        """Copies from the device."""
        own = self._bytes.get(key)
        if own is None or len(own) < length:
            own = self._bytes[key] = torch.empty(length, dtype=torch.uint8, pin_memory=self._pinned)
        for offset, chunk in chunks:
            own[offset : offset + len(chunk)].copy_(chunk, non_blocking=True)
            if chunk.device.type == "cuda":
                chunk.record_stream(torch.cuda.current_stream(chunk.device))

    def read(self, key: Hashable, length: int, into: Tensor) -> None:
        """Copies to the device."""
        into[:length].copy_(self._bytes[key][:length], non_blocking=True)

    def view(self, key: Hashable, length: int) -> Tensor:
        """The host's bytes themselves, not a copy."""
        return self._bytes[key][:length]


class DiskStore:
    """One sparse file without a name: the system frees it however the process ends."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder = folder
        try:
            self._file = unnamed_file(folder, self)
        except OSError as reason:
            raise LayerwiseError(
                f"cannot offload blocks to {folder} ({reason.strerror}); choose another --offload-folder."
            ) from reason
        self._device = device
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._end = 0
        self._mapped: Mapped | None = None
        self._staging = torch.empty(0, dtype=torch.uint8)

    def write(self, key: Hashable, length: int, chunks: Sequence[tuple[int, Tensor]]) -> None:
        """Writes to the file."""
        place, room = self._places.get(key, (0, 0))
        if key not in self._places or length > room:
            room = 8 * length + 1  # for state that comes later; it takes no place on the disk before that
            room += -room % mmap.ALLOCATIONGRANULARITY
            place, self._end = self._end, self._end + room
            self._places[key] = place, room
            os.ftruncate(self._file, self._end)
        for offset, chunk in chunks:
            if chunk.device.type != "cpu":
                chunk = self._staged(len(chunk)).copy_(chunk)
            self._move(os.pwrite, view_of(chunk), place + offset)

    def read(self, key: Hashable, length: int, into: Tensor) -> None:
        """Reads from the file."""
        found = into[:length] if into.device.type == "cpu" else self._staged(length)
        self._move(lambda file, rest, at: os.preadv(file, [rest], at), view_of(found), self._places[key][0])
        if into.device.type != "cpu":
            into[:length].copy_(found)

    def view(self, key: Hashable, length: int) -> Tensor:
        """A mapping of the file: no byte is in memory before it is read."""
        if self._mapped is None or len(self._mapped) < self._end:
            self._mapped = map_file(self._file, self._end)
        return tensor_at(self._mapped, self._places[key][0], (length,))

    def _staged(self, length: int) -> Tensor:
        if len(self._staging) < length:
            self._staging = torch.empty(length, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return self._staging[:length]

    def _move(self, call: Any, rest: memoryview, at: int) -> None:
        """Repeat a call until all bytes are moved; the system may move fewer at a time."""
        try:
            while len(rest):
                moved = call(self._file, rest, at)
                if moved == 0:
                    raise OSError(0, "the scratch file has been cut short")
                rest, at = rest[moved:], at + moved
        except OSError as reason:
            raise LayerwiseError(
                f"could not offload blocks to {self.folder} ({reason.strerror}); free space and resume, or choose "
                "another --offload-folder."
            ) from reason


def view_of(found: Tensor) -> memoryview:
    """Bytes on the host, as files read and write them."""
    return found.numpy().data


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there.

    >>> nearest_folder(Path("no/such/folder"))
    PosixPath('.')
    """
    return path if path.is_dir() or path == path.parent else nearest_folder(path.parent)
