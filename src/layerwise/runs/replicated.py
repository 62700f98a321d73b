"""`layerwise train --parallel data`: every rank trains all blocks on its share of each batch."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from layerwise.data import Batches
from layerwise.errors import LayerwiseError
from layerwise.parallel.ranks import Ranks, Refused
from layerwise.parallel.replicas import Replicas
from layerwise.runs.distributed import RankRun, check_can_share
from layerwise.runs.evaluation import mean_of, totals
from layerwise.runs.launch import ParallelOptions
from layerwise.runs.options import TrainOptions


class DataRun(RankRun):
    """One rank's part of a run. The first rank writes the folder.

    Gradients are averaged group by group while the next group runs forward. The ranks agree on the metrics
    of a log line, and on when to stop.
    """

    def __init__(self, ranks: Ranks, launch: ParallelOptions, options: TrainOptions, command: str, resume: Path | None):
        self.ranks, self.launch = ranks, launch
        self._signum_of_all = 0
        try:
            check_can_share(options, ranks.count, launch)
            self.replicas = self._replicas()
            super().__init__(options, command, self._begun(options, resume), replicas=self.replicas)
            folder = ranks.agree(None, {"the step of the checkpoint": self.learner.steps}, str(self.folder.resolve()))[
                0
            ]
            if not self.writes:
                self.folder = Path(folder)
        except Refused:
            raise
        except LayerwiseError as error:
            ranks.agree(str(error))  # which raises
        share = ranks.rank, ranks.count
        self.train_batches = self.train_batches.share(*share)
        self.val_batches = self.val_batches and self.val_batches.share(*share)
        self.test_batches = self.test_batches.share(*share)

    def _replicas(self) -> Replicas:
        return Replicas(self.ranks)

    @property
    def writes(self) -> bool:
        """The first rank writes."""
        return self.ranks.rank == 0

    def close(self) -> None:
        """End on all ranks together."""
        self.replicas.gather(None)
        dist.destroy_process_group()

    def _title(self) -> str:
        return f"{super()._title()} · {self.ranks.count} replicas"

    def _step(self, x: Tensor, y: Tensor) -> Any:
        agreed = self.replicas.largest(self._signals.received)
        metrics = super()._step(x, y)
        if self.learner.steps == 1 and self.flops is not None:
            self.flops *= self.ranks.count
        self._signum_of_all = agreed()
        return metrics

    def _stop(self) -> int:
        return self._signum_of_all

    def _of_all_blocks(self, values: dict[str, float]) -> dict[str, float]:
        return mean_of([(found, 1) for found in self.replicas.gather(values)])

    def _evaluate(self, batches: Batches | None) -> dict[str, float]:
        return mean_of(self.replicas.gather(self._totals(batches)), self.learner.task) if batches is not None else {}

    def _totals(self, batches: Batches) -> tuple[dict[str, float], int]:
        return totals(self.learner, batches)

    def _save(self) -> None:
        if self.learner.accumulated:
            self.learner.average()
        super()._save()

    def _write(self, state: dict[str, Any]) -> None:
        if self.writes:
            super()._write(state)

    def _finish(self, log: Any) -> dict[str, Any]:
        if self.writes:
            share = self.options.batch_size // self.ranks.count
            self.notes.append(
                f"trained by {self.ranks.count} replicas with {share} samples of each batch; memory is that of one"
            )
            return super()._finish(log)
        self._evaluate(self.test_batches)
        return {}
