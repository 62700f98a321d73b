"""`layerwise train --parallel pipeline`: a run whose blocks live on several ranks; messages go forward only."""

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from layerwise.data import Batches, Dataset
from layerwise.errors import LayerwiseError
from layerwise.learner.state import joined
from layerwise.memory.meter import MemoryUse
from layerwise.models import GraphModelOptions
from layerwise.parallel.replicas import Replicas, check_shares
from layerwise.parallel.stage import Stage
from layerwise.parallel.transport import DONE, FORWARD, Inlet, Outlet, Prefetched, Ranks, Refused, guarded
from layerwise.runs import checkpoint
from layerwise.runs.building import DataSignature, pick_device
from layerwise.runs.folders import folder_of_restarted, mark
from layerwise.runs.options import TrainOptions, model_name, to_mapping
from layerwise.runs.progress import Progress
from layerwise.runs.training import Interrupted, Run, mean_of, totals


@dataclass(frozen=True)
class ParallelOptions:
    """How the processes of one run share the work; none of it changes the result."""

    parallel: Literal["none", "pipeline", "data", "sharded"] = "none"
    """none | pipeline (blocks on several ranks, messages forward only) | data (all blocks on every rank, gradients
    averaged) | sharded (data, and parameters are shared out); start it with torchrun."""
    stages: str | None = None
    """Groups of blocks per rank, such as 3,3; balanced by the time that blocks take on the first rank if not given."""
    replicas: int = 1
    """Pipelines side by side, each on its share of every batch; they divide the ranks among them."""
    timeout: float = 300.0
    """Seconds after which a rank that does not answer counts as lost."""

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise LayerwiseError(f"timeout is {self.timeout}; it is a number of seconds larger than 0.")
        if self.replicas < 1 or (self.replicas > 1 and self.parallel != "pipeline"):
            raise LayerwiseError(
                f"replicas is {self.replicas} with --parallel {self.parallel}; it is a number of pipelines, 1 or more, "
                "and goes with --parallel pipeline (with data and sharded every rank is one)."
            )
        self.counts()

    def counts(self) -> list[int] | None:
        """Groups per rank, where they are given."""
        if self.stages is None:
            return None
        try:
            return [int(word) for word in self.stages.split(",")]
        except ValueError:
            raise LayerwiseError(
                f"stages is {self.stages!r}; give one number of groups per rank, such as 3,3."
            ) from None


@dataclass(frozen=True)
class TrainCommand(ParallelOptions, TrainOptions):
    """Train a network with a learning rule.

    Choose the rule and the model by name, `--rule sll --model vgg`; the options of both follow below.
    """


class RankRun(Run):
    """One rank's part of a run. One of the ranks writes the folder."""

    ranks: Ranks

    @property
    def writes(self) -> bool:
        """Whether this rank writes the folder, and speaks for all."""
        raise NotImplementedError

    def close(self) -> None:
        """The end, on all ranks together: nobody leaves before everything is written."""
        raise NotImplementedError

    def _begun(self, options: TrainOptions, resume: Path | None) -> Path | None:
        """The run to go on with: a restart goes on with what its job has begun, whose folder one rank knows."""
        if resume is not None:
            return resume
        found = folder_of_restarted(options) if self.writes else None
        words = self.ranks.agree(None, word=found and str(found.resolve()))
        return next((Path(word) for word in words if word), None)

    def _device(self) -> torch.device:
        return self.ranks.device

    def _open(self, resume: Path | None) -> Path:
        # Nothing is written before all ranks are ready for the same run.
        self.ranks.agree(None, {"data": digest(self.dataset), "options": to_mapping(self.options)})
        if self.writes:
            return super()._open(resume)
        return resume or Path(self.options.out or ".")

    def _new_folder(self) -> Path:
        folder = super()._new_folder()
        mark(folder)
        return folder

    def _progress(self, per_epoch: int) -> Progress:
        return Progress(self.total, per_epoch, self._title(), quiet=not self.writes)

    @contextlib.contextmanager
    def _logs(self) -> Iterator[Any]:
        if self.writes:
            with super()._logs() as log:
                yield log
        else:
            yield lambda values: None


class PartsRun(RankRun):
    """A run whose ranks write every checkpoint together, each its own part."""

    def _write(self, state: dict[str, Any]) -> None:
        from layerwise.runs import distributed_checkpoint  # here, as torch's share of it takes a second to import

        with self.ranks.together() as written:
            folder = self.folder / "checkpoints"
            distributed_checkpoint.save(folder, self.learner.steps, state, self._joined, self.ranks.group, written)

    def _joined(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The state of the run out of those of all ranks."""
        raise NotImplementedError

    def _weights(self) -> Mapping[str, torch.Tensor]:
        state, _ = checkpoint.load_latest(self.folder / "checkpoints")  # written behind the last step
        assert state is not None
        return state["learner"]["model"]


def check_can_share(options: TrainOptions, count: int, how: ParallelOptions) -> None:
    """Raise LayerwiseError unless `count` replicas can share each batch of a run."""
    check_shares(options.batch_size, count)
    if isinstance(options.model, GraphModelOptions):
        with_replicas = f"--parallel {how.parallel}" + (f" --replicas {count}" if how.replicas > 1 else "")
        raise LayerwiseError(
            f"a graph is one sample and has no shares, so {model_name(options.model)} cannot be trained with "
            f"{with_replicas}; train it in one process."
        )


def replicas_of_stages(ranks: Ranks, count: int) -> Replicas:
    """The ranks that hold the same stage as this one, a column of the mesh of `count` pipelines."""
    mesh = torch.arange(ranks.count).view(count, -1)
    # Groups of our own, as those that torch would make for the mesh have no time limit.
    groups: list[Any] = [
        dist.new_subgroups_by_enumeration(members.tolist(), timeout=ranks.limit)[0] for members in (mesh.T, mesh)
    ]
    names = ("data", "pipeline")
    device_mesh = DeviceMesh.from_group(groups, ranks.wire.type, mesh, mesh_dim_names=names)
    return Replicas(ranks, device_mesh.get_group("data"))


class PipelineRun(PartsRun):
    """One rank's part of a run. The last rank, where the head is, writes the folder; all write the checkpoints.

    Everything travels forward: batches, the figures of the log behind them, and the word to stop, which is the first
    rank's. So no rank waits for one that comes after it, but for room in the queue and, at checkpoints, until all
    have written their parts.

    With replicas, several pipelines stand side by side, a row of the mesh each. Messages stay within the row; ranks
    that hold the same stage average its gradients. The last rank of the first pipeline writes the folder.
    """

    def __init__(self, ranks: Ranks, how: ParallelOptions, options: TrainOptions, command: str, resume: Path | None):
        self.ranks, self.replicas = ranks, None
        self._signum_of_all = 0
        try:
            self.length, rest = divmod(ranks.count, how.replicas)
            if rest or not self.length:
                raise LayerwiseError(
                    f"{ranks.count} ranks cannot form {how.replicas} pipelines of equal length; start a multiple of "
                    f"{how.replicas} ranks (--nproc-per-node {how.replicas * (self.length + 1)})."
                )
            self.row, number = divmod(ranks.rank, self.length)
            self.stage = Stage(
                number, self.length, how.counts(), self._of_the_first, options.batch_size // how.replicas
            )
            if how.replicas > 1:
                check_can_share(options, how.replicas, how)
                self.replicas = replicas_of_stages(ranks, how.replicas)
            super().__init__(options, command, self._begun(options, resume), self.stage, self.replicas)
            words = ranks.agree(None, {"checkpoint": self.learner.steps}, str(self.folder.resolve()))
            if not self.writes:
                self.folder = Path(words[self.length - 1])
        except Refused:
            raise
        except LayerwiseError as error:
            self.ranks.agree(str(error))  # which raises
        self._connect()
        if self.replicas is not None:
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

    def _connect(self) -> None:
        rank, wire, lanes = self.ranks.rank, self.ranks.wire, self.ranks.lanes
        self.ranks.blocks = self.stage.blocks * (self.ranks.count // self.length)
        self.outlet = None if self.stage.last else Outlet(self.ranks, rank + 1, FORWARD, wire, lanes)
        self.inlet = None if self.stage.first else Prefetched(self.ranks, rank - 1, FORWARD, wire, lanes)
        self.stage.link = self

    # The stage's link.

    def receive(self) -> Any:
        """The next tree from the rank before, on this rank's device."""
        assert self.inlet is not None
        tree = self.inlet.receive()
        if self.ranks.wire == self.device:
            return tree
        return tree_map_only(torch.Tensor, lambda t: t.to(self.device), tree)

    def send(self, tree: Any) -> None:
        """Hand a tree to the next rank."""
        assert self.outlet is not None
        self.outlet.send(tree)

    # What differs from a run in one process.

    @property
    def writes(self) -> bool:
        """The last rank of the first pipeline does, where the head is."""
        return self.stage.last and self.row == 0

    def _restore(self) -> None:
        super()._restore()
        if not self.stage.last:
            self.memory = self.flops = None  # the last rank's are those of all

    def _title(self) -> str:
        return f"{super()._title()} · {self._how_many()}: {', '.join(self.stage.blocks)}"

    def _how_many(self) -> str:
        return f"{self.length} ranks" if self.replicas is None else f"{self.replicas.count} x {self.length} ranks"

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        agreed = None
        if self.stage.first:
            self.stage.stop = self._signum
            if self.replicas is not None:
                # All pipelines stop behind the same batch, so the word is what they had agreed on before it.
                self.stage.stop = self._signum_of_all
                agreed = self.replicas.largest(self._signum)
        metrics = super()._step(x, y)
        if self.replicas is not None and self.learner.steps == 1 and self.flops is not None:
            self.flops *= self.replicas.count
        if agreed is not None:
            self._signum_of_all = agreed()
        return metrics

    def _stop(self) -> int:
        return self.stage.stop

    def _of_all_blocks(self, values: dict[str, float]) -> dict[str, float]:
        return self._mean(values, 1)

    def _evaluate(self, batches: Batches | None) -> dict[str, float]:
        return self._mean(*totals(self.learner, batches)) if batches is not None else {}

    def _mean(self, sums: dict[str, float], count: int) -> dict[str, float]:
        """Means of all blocks over all pipelines, at the last rank of each; elsewhere those of the blocks so far."""
        if not self.stage.first:
            sums = {**self.receive(), **sums}
        if not self.stage.last:
            self.send(sums)
        return mean_of(self._gathered((sums, count)))

    def _gathered(self, value: Any) -> list[Any]:
        """What the last ranks of all pipelines give; elsewhere this rank's alone."""
        return self.replicas.gather(value) if self.replicas is not None and self.stage.last else [value]

    def _save(self) -> None:
        if self.replicas is not None and self.learner.steps % self.options.accumulate:
            self.learner.average()
        # What the work has cost goes forward, too, and is the last rank's to tell, once.
        if not self.stage.first:
            flops, memory = self.receive()
            self.flops = sum(found) if (found := [n for n in (flops, self.flops) if n is not None]) else None
            # A rank is a device of its own: what counts is the fullest.
            uses = [MemoryUse(**memory)] if memory else []
            self.memory = max(uses + ([self.memory] if self.memory else []), key=lambda use: use.peak, default=None)
        if not self.stage.last:
            self.send((self.flops, self.memory and asdict(self.memory)))
            self.flops = self.memory = None
        uses = [use for use in self._gathered(self.memory) if use is not None]
        self.memory = max(uses, key=lambda use: use.peak, default=None)
        super()._save()

    def _joined(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The last stage's, with the whole learner; other pipelines hold the same."""
        first = states[: self.length]
        return {**first[-1], "learner": joined([state["learner"] for state in first])}

    def _finish(self, log: Any) -> dict[str, Any]:
        if self.writes:
            pipelines = "a pipeline" if self.replicas is None else f"{self.replicas.count} pipelines"
            self.notes.append(
                f"trained by {pipelines} of {self.length} ranks ({', '.join(self.stage.blocks)}); memory is that "
                "of the rank with the largest peak"
            )
            return super()._finish(log)
        self._evaluate(self.test_batches)
        return {}

    def close(self) -> None:
        """The end, on all ranks together: nobody leaves before the last rank has written everything."""
        others = range(self.ranks.rank - self.stage.rank, self.ranks.rank)
        if self.outlet is not None:
            self.outlet.end()
            Inlet(self.ranks, (self.row + 1) * self.length - 1, DONE, torch.device("cpu")).receive()
        if self.inlet is not None:
            self.inlet.end()
        if self.stage.last:
            self._gathered(None)
            done = [Outlet(self.ranks, rank, DONE, torch.device("cpu")) for rank in others]
            for outlet in done:
                outlet.send(None)
            for outlet in done:
                outlet.drain()
        dist.destroy_process_group()


def pick_own_device(name: str) -> torch.device:
    """The device of this rank: cuda and auto mean the one with the rank's number on its machine."""
    device = pick_device(name)
    if device.type == "cuda":
        if ":" not in name:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def digest(dataset: Dataset) -> str:
    """What tells one data set from another: its facts and every label."""
    found = hashlib.blake2b(repr(DataSignature.of(dataset)).encode())
    for part in (dataset.train, dataset.val, dataset.test):
        if part is not None:
            found.update(part.labels.cpu().numpy().tobytes())
    return found.hexdigest()


def train(
    kind: Callable[[Ranks, ParallelOptions, TrainOptions, str, Path | None], RankRun],
    how: ParallelOptions,
    options: TrainOptions,
    command: str,
    resume: Path | None,
    show: Callable[[Any, Path], None],
) -> int:
    """One rank of `layerwise train --parallel ...`; returns the exit code.

    Where it fails, the process ends here: a thread may wait for a rank that is gone, and nobody is to wait for that.

    Args:
        kind: of the run.
        how: of the ranks.
        options: of the run.
        command: for the record.
        resume: folder of a run to go on with.
        show: prints the result of a finished run.
    """
    ranks = Ranks(how.timeout, pick_own_device(options.device))

    def work() -> int:
        run = kind(ranks, how, options, command, resume)
        try:
            result = run.train()
        except Interrupted as stop:
            if run.writes:
                print(f"layerwise: {stop}", file=sys.stderr)
            run.close()
            return 128 + stop.signum
        run.close()
        if run.writes:
            show(result, run.folder)
        return 0

    try:
        return guarded(ranks, work)
    except LayerwiseError as error:
        if not isinstance(error, Refused) or error.teller == ranks.rank:
            print(f"layerwise: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("layerwise: stopped.", file=sys.stderr)
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
