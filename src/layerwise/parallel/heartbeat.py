"""Signs of life: where a collective fails, they tell which rank has ended or hangs."""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.parallel.transport import Ranks


class Heartbeat:
    """A thread that writes twice a second to the ranks' store how far this rank has come.

    A collective that fails does not tell whose fault it is: a neighbour may have waited for somebody else. The
    rank whose thread is silent has ended or was stopped; if none is, the one that has come least far hangs.

    Args:
        ranks: the processes of the job.
        members: the numbers of those that take part in the same collectives.
    """

    def __init__(self, ranks: Ranks, members: Sequence[int]):
        self.ranks, self.members = ranks, members
        ranks.suspect = self.suspect
        self.every = min(0.5, ranks.limit.total_seconds() / 8)
        self.entered = 0
        # A client of its own, as a client serves one call at a time; torch's stubs do not know `clone`.
        self.store = ranks.store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._beat(0)
        threading.Thread(target=self._beats, daemon=True, name="pulse").start()

    def _beats(self) -> None:
        beat = 0
        with contextlib.suppress(RuntimeError):  # whoever keeps the store is gone
            while True:
                time.sleep(self.every)
                beat += 1
                self._beat(beat)

    def _beat(self, beat: int) -> None:
        self.store.set(f"pulse/{self.ranks.rank}", f"{beat} {self.entered}")

    @contextlib.contextmanager
    def watching(self) -> Any:
        """A context in which a collective that fails becomes one sentence about a rank."""
        self.entered += 1
        try:
            yield
        except RuntimeError as reason:
            raise self._lost(str(reason)) from reason

    def _lost(self, reason: str) -> LayerwiseError:
        general = f"the ranks have lost one another ({reason.splitlines()[0]}); go on from the last checkpoint."
        try:
            if self.ranks.store.check(["failure"]):
                return LayerwiseError(self.ranks.told(general))
            silent, entered = self._listen()
        except RuntimeError:  # whoever keeps the store may be gone too
            return LayerwiseError(general)
        late = [rank for rank in self.members if entered[rank] < self.entered]
        if not silent and not late:
            return LayerwiseError(self.ranks.told(general))
        return self.ranks.gone((silent or late)[0], reason)

    def suspect(self, peer: int) -> int:
        """Who is to blame where a message to or from `peer` fails: a rank that is silent, else the peer."""
        with contextlib.suppress(RuntimeError):
            if not self.ranks.store.check(["failure"]):
                silent, _ = self._listen()
                return (silent or [peer])[0]
        return peer

    def _listen(self) -> tuple[list[int], dict[int, int]]:
        """The ranks that give no sign of life, and how far each has come."""
        others = [rank for rank in range(self.ranks.count) if rank != self.ranks.rank]
        before = self._read(others)
        time.sleep(3 * self.every)
        now = self._read(others)
        silent = [rank for rank in others if now[rank] == before[rank]]
        return silent, {rank: int(value.split()[1]) for rank, value in now.items()} | {self.ranks.rank: self.entered}

    def _read(self, ranks: list[int]) -> dict[int, str]:
        found = self.ranks.store.multi_get([f"pulse/{rank}" for rank in ranks])
        return {rank: value.decode() for rank, value in zip(ranks, found, strict=True)}
