"""Tensors whose bytes are those of a file, and whose pages can be given back at any time."""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Mapped(mmap.mmap):
    """A file in the address space: its pages come when they are read, and go with `release_pages`."""


_live: "weakref.WeakSet[Mapped]" = weakref.WeakSet()


def unnamed_file(folder: Path, owner: object) -> int:
    """A new file without a name, open for as long as `owner` lives: the system takes it back however that ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        handle = os.dup(file.fileno())
    weakref.finalize(owner, os.close, handle)
    return handle


def map_file(handle: int, length: int, offset: int = 0, own_changes: bool = False) -> Mapped:
    """Bytes of an open file.

    Args:
        handle: of the file, open for reading and, unless changes are one's own, for writing.
        length: in bytes, 1 or more.
        offset: of the first byte, a multiple of `mmap.ALLOCATIONGRANULARITY`.
        own_changes: keep changes in memory, and until `release_pages` only, instead of making them to the file.
    """
    access = mmap.ACCESS_COPY if own_changes else mmap.ACCESS_WRITE
    found = Mapped(handle, length, access=access, offset=offset)
    _live.add(found)
    return found


def tensor_at(mapped: Mapped, offset: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    """A contiguous tensor over the bytes from `offset`; the file stays mapped for as long as the tensor lives."""
    count = torch.Size(shape).numel()
    if count == 0:  # which torch.frombuffer refuses
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)


def release_pages() -> None:
    """Take the pages of every mapped file out of this process; what is read again comes again.

    They stay in the system's cache of files, from where the system takes them when it needs the memory.
    """
    for mapped in list(_live):
        mapped.madvise(mmap.MADV_DONTNEED)


LARGE = 2**16  # bytes; a smaller tensor is not worth a page of its own
CHUNK = 2**30
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class OnFile(TorchFunctionMode):
    """Large tensors that are made inside lie in a file without a name, and none of their pages stays in the process.

    So a model can be built that is larger than the memory. Its values are those that it would have anyway.

    Args:
        folder: on the disk that is to hold them.

    >>> with OnFile(Path(".")), torch.random.fork_rng():
    ...     weight = torch.nn.Linear(256, 256).weight
    >>> weight.shape
    torch.Size([256, 256])
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._file = unnamed_file(folder, self)
        self._mapped: Mapped | None = None
        self._used = self._length = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu" and out.nbytes >= LARGE:
            if func in FACTORIES:
                out = self._placed(out)
            release_pages()
        return out

    def _placed(self, tensor: Tensor) -> Tensor:
        """The same tensor on the file."""
        needed = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._mapped is None or self._used + needed > len(self._mapped):
            room = max(CHUNK, needed)
            os.ftruncate(self._file, self._length + room)  # sparse: what is not written takes no place on the disk
            self._mapped = map_file(self._file, room, self._length)
            self._used, self._length = 0, self._length + room
        place = tensor_at(self._mapped, self._used, tuple(tensor.shape), tensor.dtype)
        self._used += needed
        return place.copy_(tensor).requires_grad_(tensor.requires_grad)
