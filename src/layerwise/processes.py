"""Processes that work for a parent: their tasks, and the cores of this machine."""

import contextlib
import os
import queue
import sys
import threading


def lines_of_parent() -> "queue.SimpleQueue[str]":
    """In a worker: the lines of standard input as they arrive. When it ends, the process exits, even in mid-task."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def cores() -> int:
    """Processor cores that this process may use."""
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
