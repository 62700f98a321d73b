"""Starts the processes of a measurement, and gives them tasks."""

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError, short, why
from layerwise.files import open_to_append
from layerwise.scaling.options import ScalingOptions


class RankProcesses:
    """Processes that form one job, and wait for tasks between two measurements.

    Args:
        ranks: how many.
        options: of the benchmark.
        log: file for their standard error.
    """

    def __init__(self, ranks: int, options: ScalingOptions, log: Path):
        self.ranks, self.limit, self.log = ranks, options.timeout, log
        self.answers: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.processes: list[subprocess.Popen[str]] = []
        threads = options.threads or 1
        hosts = options.hosts or ("",)
        setup = asdict(options) | {"ranks": ranks, "threads": threads}
        try:
            for rank in range(ranks):
                self._start(rank, hosts[rank % len(hosts)], threads)
        except BaseException:
            self.close()
            raise
        self.setup = [setup | {"rank": rank} for rank in range(ranks)]

    def meet(self) -> None:
        """Wait until the processes have found one another, which is their first task."""
        # Rank 0 chooses a port at its own address and keeps it: a port that is free here may be taken a moment later.
        (found,) = self.ask([{"do": "listen", "address": self.setup[0]["address"]}])
        self.ask([setup | found for setup in self.setup])

    def _start(self, rank: int, host: str, threads: int) -> None:
        try:
            command = [*shlex.split(host), sys.executable, "-m", "layerwise.scaling.rank"]
        except ValueError as reason:
            raise LayerwiseError(f"--hosts holds {short(host)}, which is not a command ({reason}).") from reason
        with open_to_append(self.log, "remove it") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
                    start_new_session=True,  # Ctrl-C is for the parent; the processes exit when it does
                )
            except (OSError, ValueError) as reason:
                raise LayerwiseError(
                    f"cannot start {shlex.join(command)} ({why(reason)}); correct --hosts."
                ) from reason
        self.processes.append(process)

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.answers.put((rank, line))
            self.answers.put((rank, ""))

        threading.Thread(target=listen, daemon=True).start()

    def ask(self, tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give each of the first processes its task and wait for all answers.

        Raises:
            LayerwiseError: a process failed, died or has not answered within the limit.
        """
        for process, task in zip(self.processes, tasks, strict=False):
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # noticed below, by its silence
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
        found: dict[int, dict[str, Any]] = {}
        # Each process has the same limit for its own waits, and its report is better than none. So wait longer here.
        deadline = time.monotonic() + 2 * self.limit
        while len(found) < len(tasks):
            try:
                rank, line = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                silent = next(rank for rank in range(len(tasks)) if rank not in found)
                raise LayerwiseError(
                    f"process {silent} of {self.ranks} has not answered for {2 * self.limit:g} s; raise --timeout, or "
                    "measure less."
                ) from None
            answer = _read(line) if line else {"failure": f"the process has ended; {self._last_words()}"}
            if "failure" in answer:
                raise LayerwiseError(f"process {rank} of {self.ranks} failed: {answer['failure']}")
            found[rank] = answer
        return [found[rank] for rank in range(len(tasks))]

    def _last_words(self) -> str:
        lines = self.log.read_text().strip().splitlines()
        return f"it said: {lines[-1]}" if lines else "it said nothing."

    def close(self) -> None:
        """Kill all processes at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()


def _read(line: str) -> dict[str, Any]:
    """The answer in a line of a process, or the failure to give one."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(answer := json.loads(line), dict):
            return answer
    return {
        "failure": f"it printed {short(line.strip())}, not an answer; a command in --hosts must print nothing itself."
    }
