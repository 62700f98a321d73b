"""Runs commands in processes forked from this one, so that torch is imported once, and reports their outcome."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from layerwise.cli.main import main

LEGAL = {0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes that the command line promises; 1 is a comparison in which a run failed."""


@dataclass
class Attempt:
    """A command that has ended, or has been ended."""

    words: Sequence[str]
    code: int | None
    """Exit code; negative for a signal; None where it had to be killed at its limit."""
    out: str
    err: str
    seconds: float

    def faults(self, killed: bool = False) -> list[str]:
        """Which promises it broke."""
        if killed:
            return []
        found = []
        if self.code is None:
            found.append("did not end within its limit")
        elif self.code < 0:
            found.append(f"ended by {signal.Signals(-self.code).name}")
        elif self.code not in LEGAL:
            found.append(f"exit code {self.code}")
        if "Traceback (most recent call last)" in self.err + self.out:
            found.append("a traceback")
        checked = self.words[0] == "validate" and re.search(r"^FAIL  ", self.out, re.MULTILINE)  # its finding
        if self.code == 2 and not checked and not re.search(r"^(layerwise|usage)", self.err, re.MULTILINE):
            found.append("exit code 2 without a sentence")
        if self.code == 2 and "please report" in self.err:
            found.append("an error that nobody has foreseen")
        return found


@dataclass
class Tally:
    """Figures of a campaign."""

    name: str
    promise: str
    attempts: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, what: str, faults: Sequence[str]) -> None:
        """Count an attempt; a broken promise is printed at once."""
        self.attempts += 1
        for fault in faults:
            self.broken.append(f"{what}: {fault}")
            print(f"  BROKEN  {what}: {fault}", flush=True)


def fork(
    work: Callable[[], int | None], folder: Path, name: str = "0", environment: dict[str, str] | None = None
) -> int:
    """Run `work` in a child with a session of its own; its output goes to `out<name>`, `err<name>` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("out", "err"):
        (folder / f"{file}{name}").touch()  # a child that is killed before it comes to that has said nothing
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        os.environ |= environment or {}
        for number, file in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{file}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work() or 0
    except BaseException as reason:  # what Python itself would print: the campaign sees it as a traceback
        import traceback

        traceback.print_exc()
        code = reason.code if isinstance(reason, SystemExit) and isinstance(reason.code, int) else 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, limit: float, kills: bool = True) -> int | None:
    """Exit code of a child, negative for a signal; None where it has not ended in time (it is killed then)."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    if not kills:
        return None
    kill(pid)
    os.waitpid(pid, 0)
    return None


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal to a child and all of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def command(words: Sequence[str], folder: Path, limit: float = 60.0, kill_after: float | None = None) -> Attempt:
    """Run a command of the command line; kill it after some seconds, if asked for.

    At its limit, a command that says nothing new for as long again hangs; one that is at work (somebody may ask for
    a thousand runs) is stopped as a user stops it, and has to end.
    """
    begun = time.monotonic()
    pid = fork(lambda: main(list(words)), folder)
    if kill_after is None:
        code = wait(pid, limit, kills=False)
        said = -1
        while code is None and (now := sum((folder / file).stat().st_size for file in ("out0", "err0"))) > said:
            if said >= 0:
                kill(pid, signal.SIGTERM)
            said = now
            code = wait(pid, limit, kills=False)
        if code is None:
            kill(pid)
            os.waitpid(pid, 0)
    else:
        until = time.monotonic() + kill_after
        code = None
        while code is None and time.monotonic() < until:
            done, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.002)
        if code is None:
            kill(pid)
            os.waitpid(pid, 0)
            code = -signal.SIGKILL
    out, err = ((folder / f"{file}0").read_text(errors="replace") for file in ("out", "err"))
    return Attempt(words, code, out, err, time.monotonic() - begun)


def listing(folder: Path) -> set[str]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
