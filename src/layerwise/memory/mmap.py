"""Memory-mapped tensors of a file, whose pages can be released at any time."""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise.errors import LayerwiseError


class Mapped(mmap.mmap):
    """A file in the address space: its pages are loaded when they are read, and dropped by `release_pages`."""


_live: "weakref.WeakSet[Mapped]" = weakref.WeakSet()


class ScratchFile:
    """A file without a name in a folder: the system frees it however the process ends.

    Args:
        folder: on the disk that holds the file.

    Raises:
        LayerwiseError: the folder is missing or not writable.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.length = 0
        """Bytes; unreserved and unwritten bytes take no space on the disk."""
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self.handle = os.dup(file.fileno())
        except (OSError, ValueError) as reason:
            raise self.failed(reason) from reason
        weakref.finalize(self, os.close, self.handle)

    def extend(self, length: int) -> int:
        """Lengthens the file by `length` bytes and returns the offset of the first of them.

        Raises:
            LayerwiseError: the file cannot be that long.
        """
        first = self.length
        try:
            os.ftruncate(self.handle, first + length)
        except (OSError, OverflowError) as reason:
            raise self.failed(reason) from reason
        self.length = first + length
        return first

    def reserve(self, offset: int, length: int) -> None:
        """Reserves these bytes on the disk, so that a later write to mapped memory cannot fail with SIGBUS.

        Raises:
            LayerwiseError: the disk is full.
        """
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.handle, offset, max(length, 1))
            else:
                for at in range(offset, offset + length, ZEROS):
                    write_fully(self.handle, memoryview(bytes(min(ZEROS, offset + length - at))), at)
        except OSError as reason:
            raise self.failed(reason) from reason

    def failed(self, reason: Exception) -> LayerwiseError:
        """The error for a failure of the system."""
        why = getattr(reason, "strerror", None) or reason
        return LayerwiseError(
            f"cannot offload blocks to {self.folder} ({why}); free space there, or choose another --offload-folder."
        )


ZEROS = 2**20  # bytes that are written at a time if the system cannot reserve space


def write_fully(handle: int, rest: memoryview, at: int) -> None:
    """Writes all bytes at an offset; the system may take fewer at a time."""
    while len(rest):
        written = os.pwrite(handle, rest, at)
        rest, at = rest[written:], at + written


def map_file(handle: int, length: int, offset: int = 0, own_changes: bool = False) -> Mapped:
    """Maps bytes of an open file into memory.

    Args:
        handle: of the file, open for reading and, unless `own_changes`, for writing.
        length: in bytes, 1 or more.
        offset: of the first byte, a multiple of `mmap.ALLOCATIONGRANULARITY`.
        own_changes: keep changes in memory, until `release_pages`, instead of writing them to the file.
    """
    access = mmap.ACCESS_COPY if own_changes else mmap.ACCESS_WRITE
    found = Mapped(handle, length, access=access, offset=offset)
    _live.add(found)
    return found


def tensor_at(mapped: Mapped, offset: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    """A contiguous tensor over the bytes from `offset`; the file stays mapped for as long as the tensor lives."""
    count = torch.Size(shape).numel()
    if count == 0:  # which torch.frombuffer refuses
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)


def release_pages() -> None:
    """Drops the pages of every mapped file from this process; a page that is read again is loaded again.

    They stay in the system's file cache, which frees them when it needs the memory.
    """
    for mapped in list(_live):
        mapped.madvise(mmap.MADV_DONTNEED)


LARGE = 2**16  # bytes; a smaller tensor is not worth separate pages
CHUNK = 2**30
FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class OnFile(TorchFunctionMode):
    """Puts large tensors that are created inside into a file without a name; no page of it stays in the process.

    So a model can be built that is larger than the memory. Its values are the same as without this context.

    Args:
        folder: on the disk that holds the file.

    Raises:
        LayerwiseError: the folder cannot be written to, or the disk is full.

    >>> with OnFile(Path(".")), torch.random.fork_rng():
    ...     weight = torch.nn.Linear(256, 256).weight
    >>> weight.shape
    torch.Size([256, 256])
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._file = ScratchFile(folder)
        self._mapped: Mapped | None = None
        self._start = self._used = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.keys() <= {"device", "dtype", "requires_grad"}:
            device = torch.device(kwargs.get("device") or torch.get_default_device())
            size = func(*args, **{**kwargs, "device": "meta"})  # so that no memory is used
            if device.type == "cpu" and size.nbytes >= LARGE:
                return self._place(size).requires_grad_(size.requires_grad)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.device.type == "cpu" and out.nbytes >= LARGE:
            if func in FACTORIES:
                out = self._place(out).copy_(out).requires_grad_(out.requires_grad)
            release_pages()
        return out

    def _place(self, tensor: Tensor) -> Tensor:
        """Room for a tensor in the file."""
        needed = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._mapped is None or self._used + needed > len(self._mapped):
            room = max(CHUNK, needed)
            self._start, self._used = self._file.extend(room), 0
            self._mapped = map_file(self._file.handle, room, self._start)
        self._file.reserve(self._start + self._used, needed)
        place = tensor_at(self._mapped, self._used, tuple(tensor.shape), tensor.dtype)
        self._used += needed
        return place


def into_memory(model: nn.Module) -> None:
    """Copies the tensors of a model made inside `OnFile` into ordinary memory; the file is freed.

    Args:
        model: its tensors on the meta device stay there.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()
