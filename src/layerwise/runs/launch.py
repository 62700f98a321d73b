"""Options for several processes that share a run."""

from dataclasses import dataclass
from typing import Literal

from layerwise.core.ranges import check_ranges
from layerwise.errors import LayerwiseError
from layerwise.parsing import read_whole


@dataclass(frozen=True)
class ParallelOptions:
    """How the processes of one run share the work; none of it changes the result."""

    parallel: Literal["none", "pipeline", "data", "sharded"] = "none"
    """none | pipeline (blocks on several ranks, messages forward only) | data (all blocks on every rank, gradients
    averaged) | sharded (data, and each rank keeps a shard of every parameter); start it with torchrun."""
    stages: str | None = None
    """Groups of blocks per rank, such as 3,3 (default: balanced by the time of the blocks on the first rank)."""
    replicas: int = 1
    """Number of parallel pipelines, each on its share of every batch; they divide the ranks among them."""
    timeout: float = 300.0
    """Seconds after which a rank that does not answer counts as lost."""

    def __post_init__(self) -> None:
        check_ranges(timeout=self.timeout)
        if self.replicas < 1 or (self.replicas > 1 and self.parallel != "pipeline"):
            raise LayerwiseError(
                f"replicas is {self.replicas} with --parallel {self.parallel}; it is a number of pipelines, 1 or more, "
                "and goes with --parallel pipeline (with data and sharded every rank is one)."
            )
        if self.stages is not None and self.parallel != "pipeline":
            raise LayerwiseError(
                f"stages is {self.stages} with --parallel {self.parallel}; it divides the blocks among the ranks of "
                "--parallel pipeline, so leave it out."
            )
        self.counts()

    def counts(self) -> list[int] | None:
        """Groups per rank, where they are given."""
        if self.stages is None:
            return None
        try:
            return [read_whole(word) for word in self.stages.split(",")]
        except ValueError:
            raise LayerwiseError(
                f"stages is {self.stages!r}; give one number of groups per rank, such as 3,3."
            ) from None
