"""Worker processes: the tasks from their parent, and the cores of this machine."""

import contextlib
import os
import queue
import sys
import threading


def lines_of_parent() -> "queue.SimpleQueue[str]":
    """In a worker: yield the lines of standard input. When the input ends, the process exits, even during a task."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def cores() -> int:
    """Number of processor cores that this process may use."""
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
