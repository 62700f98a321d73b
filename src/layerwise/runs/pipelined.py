"""`layerwise train --parallel pipeline`: a run whose blocks are on several ranks; messages go forward only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from layerwise.core.pieces import ReadsOutputMatrix
from layerwise.data import Batches
from layerwise.errors import LayerwiseError
from layerwise.learner.setup import ONE_PROCESS
from layerwise.learner.state import joined
from layerwise.memory.meter import MemoryUse
from layerwise.parallel.alone import OneProcess
from layerwise.parallel.ranks import Ranks, Refused
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage
from layerwise.parallel.transport import DONE, PipelineLink, ReceiveChannel, SendChannel
from layerwise.runs.distributed import PartsRun, check_can_share
from layerwise.runs.evaluation import mean_of, totals
from layerwise.runs.launch import ParallelOptions
from layerwise.runs.options import TrainOptions


def replicas_of_stages(ranks: Ranks, count: int) -> Replicas | OneProcess:
    """The ranks that hold the same stage as this one, a column of the mesh of `count` pipelines."""
    if count == 1:
        return ONE_PROCESS
    mesh = torch.arange(ranks.count, device="cpu").view(count, -1)
    # We make the groups ourselves, because those that torch would make for the mesh have no time limit.

    def join() -> DeviceMesh:
        groups: list[Any] = [
            dist.new_subgroups_by_enumeration(members.tolist(), timeout=ranks.limit)[0] for members in (mesh.T, mesh)
        ]
        names = ("data", "pipeline")
        return DeviceMesh.from_group(groups, ranks.transfer_device.type, mesh, mesh_dim_names=names)

    device_mesh = ranks.collectively(join)
    return Replicas(ranks, device_mesh.get_group("data"))


class PipelineRun(PartsRun):
    """One rank's part of a run. The last rank, where the head is, writes the folder; all write the checkpoints.

    Everything is sent forward: batches, after them the metrics of the log, and the signal to stop, which the first
    rank gives. So a rank waits for later ranks only if the queue is full, and at checkpoints until all have
    written their parts.

    With replicas there are several pipelines, each a row of the mesh. Messages stay within the row; ranks
    that hold the same stage average its gradients. The last rank of the first pipeline writes the folder.
    """

    def __init__(self, ranks: Ranks, launch: ParallelOptions, options: TrainOptions, command: str, resume: Path | None):
        self.ranks, self.launch = ranks, launch
        self._signum_of_all = 0
        try:
            self.length, rest = divmod(ranks.count, launch.replicas)
            if rest or not self.length:
                raise LayerwiseError(
                    f"{ranks.count} ranks cannot form {launch.replicas} pipelines of equal length; start a multiple of "
                    f"{launch.replicas} ranks (--nproc-per-node {launch.replicas * (self.length + 1)})."
                )
            self.row, number = divmod(ranks.rank, self.length)
            self.stage = Stage(
                number, self.length, launch.counts(), self._of_the_first, options.batch_size // launch.replicas
            )
            if launch.replicas > 1:
                check_can_share(options, launch.replicas, launch)
            self.replicas = replicas_of_stages(ranks, launch.replicas)
            super().__init__(options, command, self._begun(options, resume), self.stage, self.replicas)
            words = ranks.agree(None, {"the step of the checkpoint": self.learner.steps}, str(self.folder.resolve()))
            if not self.writes:
                self.folder = Path(words[self.length - 1])
        except Refused:
            raise
        except LayerwiseError as error:
            self.ranks.agree(str(error))  # which raises
        self.link = PipelineLink(ranks, self.stage, self.stage.blocks * launch.replicas)
        share = self.row, self.replicas.count
        self.train_batches = self.train_batches.share(*share)
        self.val_batches = self.val_batches and self.val_batches.share(*share)
        self.test_batches = self.test_batches.share(*share)
        if not self.stage.first:
            self.train_batches = self.train_batches.without_images()
            self.val_batches = self.val_batches and self.val_batches.without_images()
            self.test_batches = self.test_batches.without_images()
            data = self.dataset
            self.dataset = replace(
                data,
                train=data.train.without_images(),
                val=data.val and data.val.without_images(),
                test=data.test.without_images(),
            )

    def _of_the_first(self, numbers: list[float]) -> list[float]:
        return self.ranks.agree(None, word=numbers)[0]

    # Methods that differ from a run in one process.

    @property
    def writes(self) -> bool:
        """The last rank of the first pipeline writes, because it has the head."""
        return self.stage.last and self.row == 0

    def _restore(self) -> None:
        super()._restore()
        if not self.stage.last:
            self.memory = self.flops = None  # the last rank has those of all

    def _title(self) -> str:
        return f"{super()._title()} · {self._how_many()}: {', '.join(self.stage.blocks)}"

    def _how_many(self) -> str:
        return f"{self.length} ranks" if self.replicas.count == 1 else f"{self.replicas.count} x {self.length} ranks"

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        agreed = self._pass_signal() if self.stage.first else lambda: 0
        metrics = super()._step(x, y)
        if self.learner.steps == 1 and self.flops is not None:
            self.flops *= self.replicas.count
        self._signum_of_all = agreed()
        return metrics

    def _pass_signal(self) -> Callable[[], int]:
        """Send the signal to stop along with the batch; return a function that gives that of the next batch."""
        agreed = self.replicas.largest(self._signals.received)
        # Several pipelines stop after the same batch: by the signal that they agreed on during the batch before it.
        self.stage.stop = agreed() if self.replicas.count == 1 else self._signum_of_all
        return agreed

    def _stop(self) -> int:
        return self.stage.stop

    def _of_all_blocks(self, values: dict[str, float]) -> dict[str, float]:
        return self._mean(values, 1)

    def _evaluate(self, batches: Batches | None) -> dict[str, float]:
        return self._mean(*totals(self.learner, batches)) if batches is not None else {}

    def _mean(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """Means of all blocks over all pipelines, on the last rank of each; elsewhere those of the blocks so far."""
        if not self.stage.first:
            sums = {**self.link.receive(), **sums}
        if not self.stage.last:
            self.link.send(sums)
        return mean_of(self._gathered((sums, count)), self.learner.task)

    def _gathered(self, value: Any) -> list[Any]:
        """Gather the values of the last rank of each pipeline; other ranks get only their own."""
        return self.replicas.gather(value) if self.stage.last else [value]

    def _save(self) -> None:
        if self.learner.accumulated:
            self.learner.average()
        # The costs are sent forward, too: the last rank writes them once.
        if not self.stage.first:
            flops, memory = self.link.receive()
            self.flops = sum(found) if (found := [n for n in (flops, self.flops) if n is not None]) else None
            # Each rank is a device of its own: the largest counts.
            uses = [MemoryUse(**memory)] if memory else []
            self.memory = max(uses + ([self.memory] if self.memory else []), key=lambda use: use.peak, default=None)
        if not self.stage.last:
            self.link.send((self.flops, self.memory and asdict(self.memory)))
            self.flops = self.memory = None
        uses = [MemoryUse(**use) for use in self._gathered(self.memory and asdict(self.memory)) if use is not None]
        self.memory = max(uses, key=lambda use: use.peak, default=None)
        super()._save()

    def _joined(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The state of the last stage with the learners of all stages; other pipelines hold the same."""
        first = states[: self.length]
        return {**first[-1], "learner": joined([state["learner"] for state in first])}

    def _finish(self, log: Any) -> dict[str, Any]:
        if self.writes:
            pipelines = "a pipeline" if self.replicas.count == 1 else f"{self.replicas.count} pipelines"
            self.notes.append(
                f"trained by {pipelines} of {self.length} ranks ({', '.join(self.stage.blocks)}); memory is that "
                "of the rank with the largest peak"
            )
            if self.stage.shares_matrix:
                self.notes.append(self._of_the_matrix())
            if self.stage.sent_back:
                self.notes.append(
                    f"per update {self.stage.sent_back:,} bytes of next blocks' parameters go back to the heads that "
                    "follow them"
                )
            return super()._finish(log)
        self._evaluate(self.test_batches)
        return {}

    def _of_the_matrix(self) -> str:
        """Traffic of the output matrix."""
        layer, rule = self.learner.network.output_layer, self.options.rule
        assert layer is not None
        assert isinstance(rule, ReadsOutputMatrix)
        every, others = rule.matrix_refresh() or 1, self.length - 1
        shape = " x ".join(map(str, layer.weight.shape))
        when = "after every step" if every == 1 else f"every {every} steps"
        return (
            f"the output matrix ({shape}) is sent from the last rank to {others} other{'s' * (others > 1)} {when}: "
            f"{layer.weight.nbytes * others / every:,.0f} bytes per step"
        )

    def close(self) -> None:
        """End on all ranks together: none exits before the last rank has written everything."""
        self.link.end()
        first, last, host = self.row * self.length, (self.row + 1) * self.length - 1, torch.device("cpu")
        if not self.stage.last:
            ReceiveChannel(self.ranks, last, DONE, host).receive()
        else:
            self._gathered(None)
            done = [SendChannel(self.ranks, rank, DONE, host) for rank in range(first, last)]
            for channel in done:
                channel.send(None)
            for channel in done:
                channel.drain()
        dist.destroy_process_group()
