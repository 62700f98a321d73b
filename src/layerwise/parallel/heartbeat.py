"""Heartbeats of the ranks: if a collective fails, they show which rank has ended or hangs."""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.parallel.ranks import REPORT, Ranks
from layerwise.parallel.rendezvous import NoAnswer


class Heartbeat:
    """A thread that writes the number of collectives that this rank has entered to the ranks' store, twice a second.

    A collective that fails does not say which rank is at fault: a neighbour may have waited for another rank. A rank
    without a heartbeat has ended or was stopped. If all have one, the rank that has entered the fewest collectives
    hangs.

    Args:
        ranks: the processes of the job.
        members: the numbers of those that take part in the same collectives.
    """

    def __init__(self, ranks: Ranks, members: Sequence[int]):
        self.ranks, self.members = ranks, members
        ranks.suspect = self.suspect
        self.every = min(0.5, ranks.limit.total_seconds() / 8)
        self.entered = 0
        try:
            self.store = ranks.store.clone()
            self._beat(0)
        except RuntimeError as reason:
            raise ranks.store_lost(str(reason)) from reason
        threading.Thread(target=self._beats, daemon=True, name="heartbeat").start()

    def _beats(self) -> None:
        beat = 0
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
            while True:
                time.sleep(self.every)
                beat += 1
                self._beat(beat)

    def _beat(self, beat: int) -> None:
        self.store.set(f"heartbeat/{self.ranks.rank}", f"{beat} {self.entered}")

    @contextlib.contextmanager
    def watching(self) -> Any:
        """A context in which a collective that fails becomes one sentence about a rank."""
        self.entered += 1
        try:
            yield
        except RuntimeError as reason:
            raise self._lost(str(reason)) from reason

    def _lost(self, reason: str) -> LayerwiseError:
        general = (
            f"the ranks have lost one another ({reason.splitlines()[0]}); the run stops, and --resume continues it "
            "from its last checkpoint."
        )
        try:
            if self.ranks.announced():
                return LayerwiseError(self.ranks.announce(general))
            silent, entered = self._listen()
        except NoAnswer as silence:
            return self.ranks.store_lost(str(silence))
        except RuntimeError:  # the process that keeps the store has ended
            return LayerwiseError(general) if self.ranks.job.agent else self.ranks.store_lost(reason)
        late = [rank for rank in self.members if entered[rank] < self.entered]
        if not silent and not late:
            return LayerwiseError(self.ranks.announce(general))
        return self.ranks.lost_rank((silent or late)[0], reason)

    def suspect(self, peer: int) -> int:
        """Which rank is at fault if a message to or from `peer` fails: a silent rank, else the peer."""
        with contextlib.suppress(RuntimeError):
            if not self.ranks.announced():
                silent, _ = self._listen()
                return (silent or [peer])[0]
        return peer

    def _listen(self) -> tuple[list[int], dict[int, int]]:
        """The ranks without a heartbeat, and how many collectives each has entered."""
        others = [rank for rank in range(self.ranks.count) if rank != self.ranks.rank]
        before = self._read(others)
        time.sleep(3 * self.every)
        now = self._read(others)
        silent = [rank for rank in others if now[rank] == before[rank]]
        return silent, {rank: int(value.split()[1]) for rank, value in now.items()} | {self.ranks.rank: self.entered}

    def _read(self, ranks: list[int]) -> dict[int, str]:
        store = self.ranks.store.limited(REPORT)
        keys = {rank: f"heartbeat/{rank}" for rank in ranks}
        # A rank without a key has not started its heartbeat yet.
        return {rank: store.get([key])[0] if store.has(key) else "0 -1" for rank, key in keys.items()}
