"""Keeps freed host memory in the process, ready for the next block."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed memory instead of giving it back to the system.

    A rule that frees a block's graph before the next block runs asks for the same large buffers again and again. By
    default glibc takes each of them fresh from the system, which then clears every page. After this call, the process
    keeps its peak memory until it ends; no result changes.

    The command line calls it. In your own program, call it once, before training.

    Returns:
        Whether it was done: only on Linux with glibc.

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
