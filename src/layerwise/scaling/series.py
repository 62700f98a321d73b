"""Measurements of one way, round by round."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Series:
    """Measurements of one way at one number of ranks, round by round."""

    way: str
    ranks: int
    rates: list[float] = field(default_factory=list)
    """Samples per second."""
    shares: list[list[dict[str, float]]] = field(default_factory=list)
    """Per round and rank, shares of the time: `busy`, `queued`, `waiting`."""
    fill: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    """Sent by each rank per step."""

    def add(self, answers: Sequence[dict[str, float]], samples: int) -> None:
        """Add the answers of all ranks for one round, in which `samples` were trained."""
        # In our pipeline a user waits for the last rank; in all other ways the ranks end a step together.
        seconds = [answer["seconds"] for answer in answers]
        self.rates.append(samples / (seconds[-1] if self.way == "pipeline" else max(seconds)))
        self.fill.append(max(answer["fill"] for answer in answers))
        self.bytes = [answer["bytes"] for answer in answers]
        self.shares.append([])
        for answer in answers:
            share = {name: answer[name] / answer["seconds"] for name in ("busy", "queued")}
            self.shares[-1].append(share | {"waiting": max(0.0, 1.0 - sum(share.values()))})

    def share(self, name: str) -> list[float]:
        """Median share per rank."""
        return [statistics.median(turn[rank][name] for turn in self.shares) for rank in range(self.ranks)]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the values at 10 % and 90 %."""
    found = sorted(values)
    return statistics.median(found), found[len(found) // 10], found[-1 - len(found) // 10]
