"""Stores the bytes of offloaded blocks in host memory or in a file."""

import mmap
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from layerwise.memory.mmap import Mapped, ScratchFile, map_file, tensor_at, write_fully


class Store(Protocol):
    """Keeps the bytes of offloaded groups; `write` and `read` run in the thread that moves them."""

    def write(self, key: Hashable, length: int, chunks: Sequence[tuple[int, Tensor]]) -> None:
        """Stores bytes of a group at their offsets."""
        ...

    def read(self, key: Hashable, length: int, into: Tensor) -> None:
        """Copies the first `length` bytes of a group to the device."""
        ...

    def view(self, key: Hashable, length: int) -> Tensor:
        """The first `length` bytes of a group, on the host."""
        ...


class HostStore:
    """Host memory, pinned if the device is an accelerator."""

    def __init__(self, device: torch.device):
        self._pinned = device.type == "cuda"
        self._bytes: dict[Hashable, Tensor] = {}

    def write(self, key: Hashable, length: int, chunks: Sequence[tuple[int, Tensor]]) -> None:
        """Copies from the device."""
        own = self._bytes.get(key)
        if own is None or len(own) < length:
            own = self._bytes[key] = torch.empty(length, dtype=torch.uint8, pin_memory=self._pinned, device="cpu")
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
    """One sparse file without a name: the system frees it however the process ends.

    Args:
        folder: on the disk that holds the file.
        device: where the bytes come from.
        reserve: whether to reserve space for a group's bytes before any of them is written.
    """

    def __init__(self, folder: Path, device: torch.device, reserve: bool = False):
        self._reserve = reserve
        self._file = ScratchFile(folder)
        self._device = device
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._mapped: Mapped | None = None
        self._staging = torch.empty(0, dtype=torch.uint8, device="cpu")

    def write(self, key: Hashable, length: int, chunks: Sequence[tuple[int, Tensor]]) -> None:
        """Writes to the file."""
        place, room = self._places.get(key, (0, 0))
        if key not in self._places or length > room:
            room = 8 * length + 1  # for state that is created later; it takes no space on the disk before that
            room += -room % mmap.ALLOCATIONGRANULARITY
            place = self._file.extend(room)
            if self._reserve:
                self._file.reserve(place, length)
            self._places[key] = place, room
        for offset, chunk in chunks:
            if chunk.device.type != "cpu":
                chunk = self._staged(len(chunk)).copy_(chunk)
            try:
                write_fully(self._file.handle, view_of(chunk), place + offset)
            except OSError as reason:
                raise self._file.failed(reason) from reason

    def read(self, key: Hashable, length: int, into: Tensor) -> None:
        """Reads from the file."""
        found = into[:length] if into.device.type == "cpu" else self._staged(length)
        rest, at = view_of(found), self._places[key][0]
        try:
            while len(rest):
                count = os.preadv(self._file.handle, [rest], at)
                if count == 0:
                    raise OSError(0, "the scratch file has been cut short")
                rest, at = rest[count:], at + count
        except OSError as reason:
            raise self._file.failed(reason) from reason
        if into.device.type != "cpu":
            into[:length].copy_(found)

    def view(self, key: Hashable, length: int) -> Tensor:
        """A mapping of the file: no byte is in memory before it is read."""
        self._file.reserve(self._places[key][0], length)  # reading a hole may need space, too
        if self._mapped is None or len(self._mapped) < self._file.length:
            self._mapped = map_file(self._file.handle, self._file.length)
        return tensor_at(self._mapped, self._places[key][0], (length,))

    def _staged(self, length: int) -> Tensor:
        if len(self._staging) < length:
            self._staging = torch.empty(length, dtype=torch.uint8, pin_memory=self._device.type == "cuda", device="cpu")
        return self._staging[:length]


def view_of(found: Tensor) -> memoryview:
    """Bytes on the host, as files read and write them."""
    return found.numpy().data


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest existing one above it.

    >>> nearest_folder(Path("no/such/folder"))
    PosixPath('.')
    """
    return path if os.path.isdir(path) or path == path.parent else nearest_folder(path.parent)
