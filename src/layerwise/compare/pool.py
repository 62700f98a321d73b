"""Runs tasks in parallel worker processes; a worker that dies loses only its own task."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerwise.files import open_to_append
from layerwise.processes import cores

OUTSIDE = 600 * 2**20
"""Bytes that a worker needs besides its tensors: Python, torch's code, scikit-learn."""


class WorkerPool:
    """Runs tasks of `layerwise.compare.worker` in `jobs` processes with one thread each.

    Args:
        jobs: number of processes.
        log: file for the workers' standard error outside a run.
        held: descriptor of an open file that the workers keep open too, so that its lock lasts until they exit.
    """

    def __init__(self, jobs: int, log: Path, held: int | None = None):
        self.jobs, self.log, self.held = jobs, log, held
        self._idle: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._all: list[subprocess.Popen[str]] = []
        self._closed = False

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill all workers at once, busy or not."""
        with self._lock:
            self._closed = True
            workers = list(self._all)
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()

    def run(
        self,
        tasks: Sequence[dict[str, Any]],
        done: Callable[[dict[str, Any], dict[str, Any]], None],
        jobs: int | None = None,
        begun: Callable[[dict[str, Any]], None] = lambda task: None,
    ) -> None:
        """Do all tasks; `begun(task)` and `done(task, answer)` are called one at a time, in the order of the events.

        Tasks start in the order given. The result of a task does not depend on the worker that does it.
        """
        waiting, failure = list(reversed(tasks)), []

        def serve() -> None:
            worker = None
            try:
                while True:
                    with self._lock:
                        if self._closed or failure or not waiting:
                            break
                        task = waiting.pop()
                        begun(task)
                    worker, reply = self._ask(worker, task)
                    with self._lock:
                        if self._closed:
                            return
                        done(task, reply)
            except BaseException as error:
                failure.append(error)
            finally:
                if worker is not None:
                    with self._lock:
                        self._idle.append(worker)

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(jobs or self.jobs, len(waiting)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # in short waits, so that Ctrl-C is noticed
                thread.join(0.1)
        if failure:
            raise failure[0]

    def _ask(
        self, worker: "subprocess.Popen[str] | None", task: dict[str, Any]
    ) -> "tuple[subprocess.Popen[str] | None, dict[str, Any]]":
        worker = worker or self._worker()
        assert worker.stdin is not None
        assert worker.stdout is not None
        line = ""
        with contextlib.suppress(OSError):
            worker.stdin.write(json.dumps(task) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        if line:
            reply = json.loads(line)
            if reply.get("kind") in ("memory", "error"):  # its state cannot be trusted any more
                self._end(worker)
                worker = None
            return worker, reply
        return None, {"kind": "killed", "reason": _epitaph(self._end(worker))}

    def _worker(self) -> "subprocess.Popen[str]":
        with self._lock:
            if self._idle:
                return self._idle.pop()
            with open_to_append(self.log, "remove it") as log:
                worker = subprocess.Popen(
                    [sys.executable, "-m", "layerwise.compare.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                    pass_fds=() if self.held is None else (self.held,),
                    start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
                )
            self._all.append(worker)
            return worker

    def _end(self, worker: "subprocess.Popen[str]") -> int:
        assert worker.stdin is not None
        with contextlib.suppress(OSError):
            worker.stdin.close()
        try:
            return worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()
            return worker.wait()


def _epitaph(code: int) -> str:
    """Why a worker died, as far as its exit code shows."""
    if code < 0:
        name = signal.Signals(-code).name
        guess = " (the system does so when memory runs out)" if -code == signal.SIGKILL else ""
        return f"the process was ended by {name}{guess}"
    return f"the process ended by itself with exit code {code}"


def free_memory() -> int | None:
    """Bytes of free memory, or None if the system does not report it (Linux does)."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        rows = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(row for row in rows if row.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        held = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(
            held.get("inactive_file", 0)
        )  # memory that can be reclaimed
        found.append(int((group / "memory.max").read_text()) - used)
    return min(found, default=None)


def default_jobs(tasks: int, peak_bytes: int, threads: int = 1, accelerator: bool = False) -> int:
    """The number of tasks of this peak memory to run in parallel: one per core, as memory allows, at least one.

    On an accelerator the default is one, since its free memory is not known beforehand.

    >>> default_jobs(tasks=1, peak_bytes=0)
    1
    """
    if accelerator:
        return 1
    free = free_memory()
    fits = tasks if free is None else int(0.8 * free / (OUTSIDE + 2 * peak_bytes))
    return max(1, min(tasks, cores() // threads, fits))
