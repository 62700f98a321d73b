"""`layerwise train --parallel sharded`: each rank has its share of each batch, and a shard of every parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.data import Batches
from layerwise.parallel.shards import Shards
from layerwise.runs.distributed import PartsRun
from layerwise.runs.replicated import DataRun


class ShardedRun(PartsRun, DataRun):
    """One rank's part of a run. The first rank writes the folder, all write the checkpoints."""

    def _replicas(self) -> Shards:
        return Shards(self.ranks)

    def _joined(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The state of the first rank: every tensor has the same name on all ranks."""
        return states[0]

    def _totals(self, batches: Batches) -> tuple[dict[str, float], int]:
        found = super()._totals(batches)
        # The last batch may have no sample for this rank, but the other ranks need its shards.
        if 0 < len(batches.source) % batches.batch_size <= self.ranks.rank:
            x = batches.source.blank().to(self.device)
            y = next(iter(self.test_batches.without_images().epoch(0)))[1][:1]
            self.learner.evaluate(x, y)
        return found
