"""Runs of several processes: their options, their common base, and how one rank is started."""

import contextlib
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.core.devices import pick_device
from layerwise.errors import LayerwiseError, report_error, say
from layerwise.models import GraphModelOptions
from layerwise.parallel.ranks import Ranks, Refused, guarded
from layerwise.parallel.rendezvous import NoAnswer
from layerwise.parallel.replicas import check_shares
from layerwise.parsing import environment_number
from layerwise.runs import checkpoint, distributed_checkpoint
from layerwise.runs.agreement import facts_of_checkpoint, facts_of_data, facts_of_options
from layerwise.runs.folders import folder_of_restarted, mark
from layerwise.runs.interrupt import Interrupted
from layerwise.runs.launch import ParallelOptions
from layerwise.runs.log import Log
from layerwise.runs.options import TrainOptions, model_name
from layerwise.runs.progress import Progress
from layerwise.runs.training import Run


@dataclass(frozen=True)
class TrainCommand(ParallelOptions, TrainOptions):
    """Train a network with a learning rule.

    Choose the rule and the model by name, `--rule sll --model vgg`; the options of both follow below.
    """


class RankRun(Run, ABC):
    """One rank's part of a run. One of the ranks writes the folder.

    Attributes:
        ranks: the processes of the run.
        launch: how they share the work.
    """

    alone = False
    ranks: Ranks
    launch: ParallelOptions

    @property
    @abstractmethod
    def writes(self) -> bool:
        """Whether this rank writes the folder, and prints for all ranks."""

    @abstractmethod
    def close(self) -> None:
        """End on all ranks together: none exits before everything is written."""

    def _begun(self, options: TrainOptions, resume: Path | None) -> Path | None:
        """The run to continue: a restart continues the run of its job, whose folder one rank knows."""
        if resume is not None:
            return resume
        found = folder_of_restarted(options) if self.writes else None
        words = self.ranks.agree(None, word=found and str(found.resolve()))
        return next((Path(word) for word in words if word), None)

    def _device(self) -> torch.device:
        return self.ranks.device

    def _agree(self, resume: Path | None) -> None:
        try:
            facts = facts_of_data(self.dataset) | facts_of_checkpoint(resume)
        except OSError as reason:
            raise LayerwiseError(f"the samples of {self.options.data} cannot be read ({reason}).") from reason
        self.ranks.agree(None, facts)

    def _open(self, resume: Path | None) -> Path:
        # Nothing is written before all ranks are ready for the same run.
        self.ranks.agree(None)
        if self.writes:
            return super()._open(resume)
        return resume or Path(self.options.out or ".")

    def _new_folder(self) -> Path:
        folder = super()._new_folder()
        mark(folder)
        return folder

    def _progress(self, per_epoch: int) -> Progress:
        return Progress(self.total, per_epoch, self._title(), silent=not self.writes)

    def _logs(self) -> AbstractContextManager[Log]:
        return super()._logs() if self.writes else contextlib.nullcontext(lambda values: None)


class PartsRun(RankRun):
    """A run whose ranks write every checkpoint together, each one part."""

    def _write(self, state: dict[str, Any]) -> None:
        with self.ranks.together() as written:
            folder = self.folder / "checkpoints"
            distributed_checkpoint.save(folder, self.learner.steps, state, self._joined, self.ranks.group, written)

    @abstractmethod
    def _joined(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Join the states of all ranks to that of the run."""

    def _weights(self) -> Mapping[str, torch.Tensor]:
        state, _ = checkpoint.load_latest(self.folder / "checkpoints")  # written after the last step
        assert state is not None
        return state["learner"]["model"]


def check_can_share(options: TrainOptions, count: int, launch: ParallelOptions) -> None:
    """Raise LayerwiseError unless `count` replicas can share each batch of a run."""
    check_shares(options.batch_size, count)
    if isinstance(options.model, GraphModelOptions):
        with_replicas = f"--parallel {launch.parallel}" + (f" --replicas {count}" if launch.replicas > 1 else "")
        raise LayerwiseError(
            f"a graph is one sample and has no shares, so {model_name(options.model)} cannot be trained with "
            f"{with_replicas}; train it in one process."
        )


def pick_own_device(name: str) -> torch.device:
    """The device of this rank: cuda and auto mean the one with the rank's number on its machine."""
    device = pick_device(name)
    if device.type == "cuda":
        if ":" not in name:
            device = torch.device("cuda", environment_number("LOCAL_RANK") % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def train_rank(
    kind: Callable[[Ranks, ParallelOptions, TrainOptions, str, Path | None], RankRun],
    launch: ParallelOptions,
    options: TrainOptions,
    command: str,
    resume: Path | None,
    show: Callable[[Any, Path], None],
) -> int:
    """One rank of `layerwise train --parallel ...`; returns the exit code.

    On failure the process exits at once, because a thread may be blocked on a dead rank.

    Args:
        kind: of the run.
        launch: how the ranks share the work.
        options: of the run.
        command: for the record.
        resume: folder of a run to continue.
        show: prints the result of a finished run.
    """
    try:
        ranks = Ranks(launch.timeout, pick_own_device(options.device))
    except LayerwiseError as error:
        if isinstance(error.__cause__, NoAnswer):
            _leave(report_error(error))
        raise

    def work() -> int:
        ranks.agree(None, facts_of_options(options, asdict(launch), ranks.device, resume is not None))
        run = kind(ranks, launch, options, command, resume)
        try:
            result = run.train()
        except Interrupted as stop:
            if run.writes:
                say(str(stop))
            run.close()
            return 128 + stop.signum
        run.close()
        if run.writes:
            show(result, run.folder)
        return 0

    try:
        return guarded(ranks, work)
    except KeyboardInterrupt:
        say("stopped.")
        code = 128 + signal.SIGINT
    except Exception as error:
        code = report_error(error, silent=isinstance(error, Refused) and error.teller not in (None, ranks.rank))
    return _leave(code)


def _leave(code: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
