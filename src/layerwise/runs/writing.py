"""Replaces files in one step: readers see the old content or the new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors

from layerwise.errors import LayerwiseError, why
from layerwise.files import shown

FAILURES = (OSError, safetensors.SafetensorError)
"""Errors of a disk that is full or not writable."""


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a name to write to; the file then replaces `path` in one step: readers see the old file or the new one.

    Raises:
        LayerwiseError: the disk is full, the folder is not writable, or no file can have this name.
    """
    partial = None
    try:
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)  # it may be a link, which would be followed
        yield partial
        flush(partial)
        partial.replace(path)
    except (*FAILURES, ValueError) as reason:
        if partial is not None:
            with contextlib.suppress(OSError, ValueError):
                partial.unlink()
        raise LayerwiseError(
            f"could not write {shown(path)} ({why(reason)}); free space, or choose another place."
        ) from reason


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old content or the new one.

    Raises:
        LayerwiseError: the disk is full, the folder is not writable, or no file can have this name.
    """
    with replaced(path) as partial:
        partial.write_bytes(as_bytes(content))


def as_bytes(content: str | bytes) -> bytes:
    """Text as UTF-8; bytes of a file's name that are not UTF-8 stay as they are."""
    return content.encode(errors="surrogateescape") if isinstance(content, str) else content


def flush(path: Path) -> None:
    """Make the system write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
