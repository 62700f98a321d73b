"""Keeps freed host memory in the process, ready for the next block."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed memory instead of giving it back to the system.

    A rule that frees a block's graph before the next block runs asks for the same large buffers again and again. By
    default glibc takes each of them fresh from the system, which then clears every page. Afterwards the process holds
    its peak until it ends; no result changes.

    Called by the command line; call it once, before training, in a program of your own.

    Returns:
        Whether it was done: on Linux with glibc, nowhere else.

    >>> keep_freed_memory() in (True, False)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
