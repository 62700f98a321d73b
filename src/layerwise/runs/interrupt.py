"""Stops a run: Ctrl-C and SIGTERM wait for the end of the step."""

import contextlib
import signal
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop; everything is saved.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, signum: int, sentence: str):
        super().__init__(sentence)
        self.signum = signum


class StopSignals:
    """A context in which Ctrl-C and SIGTERM are recorded and handled at the end of a step; a second one acts at once.

    Attributes:
        received: number of the signal that has arrived, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        with contextlib.suppress(ValueError):  # signals can only be handled in the main thread
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: Any) -> None:
        self.received = signum
        signal.signal(signum, self._before[signum])
