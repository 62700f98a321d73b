"""SIGTERM and Ctrl-C end a command as an exception, so that locks, workers and incomplete files are cleaned up."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

AGAIN = 0.02
"""Seconds after which a signal that has arrived inside an import is sent again."""
PATIENCE = 10.0
"""Seconds that a signal waits for the end of an import, which may never come."""


class Terminated(BaseException):
    """SIGTERM has arrived."""


class SignalsRaise:
    """A context in which SIGTERM raises `Terminated`, and Ctrl-C `KeyboardInterrupt`, but never inside an import.

    A module that is imported by half fails in ways of its own, or aborts where C++ imports it, so a signal waits for
    the end of an import, but no longer than `PATIENCE`. A rank of torchrun keeps the default of SIGTERM: it may be
    waiting for another rank inside a library, where no Python code handles the signal.
    """

    def __init__(self) -> None:
        self._usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            del self._usual[signal.SIGTERM]
        self._ours: list[int] = []
        self._arrived: dict[int, float] = {}
        """When a signal that waits has arrived first."""
        self._command: FrameType | None = None
        """Who has entered the context: what that was imported by does not count."""

    def __enter__(self) -> None:
        self._command = sys._getframe(1)
        if threading.current_thread() is not threading.main_thread():
            return
        for signum, before in self._usual.items():
            if signal.getsignal(signum) is before:
                signal.signal(signum, self._stop)
                self._ours.append(signum)

    def __exit__(self, *_: object) -> None:
        for signum in self._ours:
            signal.signal(signum, self._usual[signum])
        self._command = None

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        waited = time.monotonic() - self._arrived.setdefault(signum, time.monotonic())
        while waited < PATIENCE and frame is not None and frame is not self._command:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                again = threading.Timer(AGAIN, os.kill, (os.getpid(), signum))
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated
