"""A training run: epochs, schedule, evaluation, logs, checkpoints that continue to the same bits."""

import contextlib
import json
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise import data
from layerwise.core.devices import pick_device
from layerwise.core.tasks import metric_of
from layerwise.errors import LayerwiseError
from layerwise.files import kind_of, shown
from layerwise.learner.setup import ONE_PROCESS, WHOLE_NETWORK
from layerwise.memory.flops import FlopMeter
from layerwise.memory.meter import MemoryUse
from layerwise.models import OutsideModel
from layerwise.parallel.alone import OneProcess, WholeNetwork
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage
from layerwise.runs import checkpoint
from layerwise.runs.building import (
    TOKENIZER,
    DataSignature,
    build_learner,
    check_run_state,
    check_tokenizer,
    load_data,
    split_batches,
)
from layerwise.runs.environment import device_name, machine
from layerwise.runs.evaluation import chance, correct, evaluate
from layerwise.runs.fitting import check_alone_for_peak, note_of_peak, within_peak
from layerwise.runs.folders import (
    Claim,
    check_not_lost,
    check_unchanged,
    drop_replaced,
    new_folder,
    read_options,
    undo_replacement,
)
from layerwise.runs.generating import check_causal, sample_of, tokens_read
from layerwise.runs.interrupt import Interrupted, StopSignals
from layerwise.runs.log import FILE, Log, by_epoch, open_log, summary_writer
from layerwise.runs.options import TrainOptions, model_name, to_mapping
from layerwise.runs.progress import Progress
from layerwise.runs.writing import write_atomically

PREPARE = 2048  # training samples that a rule may look at before the first step
OF_THE_FOLDER = ("out", "overwrite", "offload_folder")  # options that say where a run lies, not what it is


class Run:
    """One training run in one folder.

    The folder holds `config.json`, `metrics.jsonl`, `checkpoints/`, and at the end `result.json` and
    `model.safetensors` (the plain weights, for the model's own class).

    Args:
        options: what to train, and how.
        command: the command line, for the record.
        resume: folder of a run to continue; the options are then the run's own.
        stage: the part of the network that this process trains (default: all).
        replicas: the processes that train the same blocks on their share of every batch (default: none).

    Raises:
        LayerwiseError: any mistake in the options or the data; nothing is written then.
    """

    alone: ClassVar[bool] = True
    """Whether no other rank takes part."""

    def __init__(
        self,
        options: TrainOptions,
        command: str = "",
        resume: Path | None = None,
        stage: Stage | WholeNetwork = WHOLE_NETWORK,
        replicas: Replicas | OneProcess = ONE_PROCESS,
    ):
        self.options, self.command = options, command
        self.machines = [machine()]
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.device = self._device()
        self.dataset = load_data(options, resume)
        self.train_batches, self.val_batches, self.test_batches = split_batches(options, self.dataset, self.device)
        self.total = options.steps or options.epochs * len(self.train_batches)
        self.facts = DataSignature.of(self.dataset)
        self._agree(resume)
        if options.peak is not None and resume is None:  # a run that is continued has found its parts
            check_alone_for_peak(self.alone)
            options = within_peak(options, self.facts, self.device, self.train_batches, self.dataset.graph)
            self.options = options
        self.learner = build_learner(options, self.facts, self.device, self.total, stage, self.dataset.graph, replicas)
        # Labels that the rule cannot use, and data that cannot be read, are reported before anything is written.
        for part in (self.dataset.train, self.dataset.val, self.dataset.test):
            if part is not None:
                self.learner.check_labels(part.checked_labels)
        next(self._batches(0))
        if self.learner.prepares:
            self._prepare()
        self.seconds = 0.0
        self.samples = 0
        self.memory: MemoryUse | None = None
        self._measured: set[str] = set()
        self.flops: int | None = None
        self.last_val: dict[str, float] = {}
        self.notes = [*self.dataset.notes, *note_of_peak(options)]
        if rest := self.total % options.accumulate:
            self.notes.append(
                f"the last update is of {rest} batches, because --accumulate {options.accumulate} does not divide the "
                f"{self.total} steps"
            )
        if options.schedule == "constant" and options.warmup not in (0, TrainOptions.warmup):
            self.notes.append(f"--warmup {options.warmup:g} changes nothing, because the schedule is constant")
        if options.tensorboard:
            summary_writer()
        own = isinstance(options.model, OutsideModel)
        if own and self.alone and self.dataset.tokenizer is not None and len(self.dataset.classes) > 1:
            check_causal(self.learner, self.dataset.shape[2])
        self._signals = StopSignals()
        self._claim: Claim | None = None
        self._resumed = resume is not None
        try:
            self.folder = self._open(resume)
            if resume is not None:
                self._restore()
        except BaseException:
            self.release()
            raise

    def _prepare(self) -> None:
        """Show the rule training samples, without augmentation."""
        dataset, seed = self.dataset, self.train_batches.seed
        size = min(PREPARE, len(dataset.train))
        batches = data.Batches(dataset.train, size, seed=seed, mean=dataset.mean, std=dataset.std, device=self.device)
        self.learner.prepare(*next(batches.epoch(0)))

    def _open(self, resume: Path | None) -> Path:
        """Create and lock the folder of the run, and write its options."""
        if resume is not None:
            self._claim = Claim(resume)
        folder = resume or self._new_folder()
        try:
            tokenizer = self.dataset.tokenizer
            if resume is None and tokenizer is not None:  # first, so that every run that can be resumed has it
                write_atomically(folder / TOKENIZER, tokenizer.to_json())
            if kind_of(folder / "config.json") is None:
                write_atomically(folder / "config.json", json.dumps(to_mapping(self.options), indent=2) + "\n")
        except LayerwiseError:
            if resume is None and self.options.overwrite:
                undo_replacement(folder)
            raise
        if self.options.overwrite:
            self.notes += drop_replaced(folder)
        return folder

    def release(self) -> None:
        """Unlock the folder, so that other runs can use it; `train` does so at its end."""
        if self._claim is not None:
            self._claim.release()

    @classmethod
    def resumed(cls, folder: Path, command: str = "") -> "Run":
        """Continue the run in `folder`.

        Raises:
            LayerwiseError: the folder holds no run, its checkpoints are damaged, or another process works there.
        """
        return cls(read_options(folder), command, resume=folder)

    def train(self) -> dict[str, Any]:
        """Train to the end and return the contents of `result.json`.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
            LayerwiseError: a non-finite loss, a full disk.
        """
        try:
            return self._train()
        finally:
            self.release()

    def _train(self) -> dict[str, Any]:
        options = self.options
        per_epoch = len(self.train_batches)
        save_every, eval_every = options.save_every or per_epoch, options.eval_every or per_epoch
        with self._progress(per_epoch) as progress, self._signals, self._logs() as log:
            started, saved = time.perf_counter(), self.seconds
            for x, y in self._batches(self.learner.steps):
                metrics = self._step(x, y)
                step = self.learner.steps
                if step == self.total:
                    self.learner.flush()
                self.samples += metrics.samples
                self.seconds = saved + time.perf_counter() - started
                if step % options.log_every == 0 or step % eval_every == 0 or step == self.total:
                    values = self._of_all_blocks(metrics.read())
                    log({"step": step, "split": "train", "lr": self._rate(step - 1), **values})
                    progress.show(step, values, self.samples / self.seconds)
                if step % eval_every == 0 or step == self.total:
                    # Evaluation is not training time.
                    self.last_val = self._evaluate(self.val_batches)
                    if self.last_val:
                        log({"step": step, "split": "val", "seconds": self.seconds, **self.last_val})
                    progress.epoch(step, self.last_val, self.samples / self.seconds, self.memory)
                    started, saved = time.perf_counter(), self.seconds
                stop = self._stop()
                if step % save_every == 0 or step == self.total or stop:
                    self._save()
                if stop and step < self.total:
                    name = signal.Signals(stop).name
                    raise Interrupted(
                        stop,
                        f"stopped by {name} after step {step} of {self.total}; continue with: "
                        f"layerwise train --resume {shlex.quote(str(self.folder))}",
                    )
            return self._finish(log)

    def _step(self, x: Tensor, y: Tensor) -> Any:
        step = self.learner.steps
        meter = FlopMeter() if step == 0 else None
        with meter or contextlib.nullcontext():
            if self._measures(step):
                metrics, memory = self.learner.measured_step(x, y)
                self.memory = max(self.memory or memory, memory, key=lambda use: use.peak)
            else:
                metrics = self.learner.step(x, y)
        if meter is not None:
            self.flops = meter.total
        return metrics

    def _measures(self, step: int) -> bool:
        """Whether the memory of this step is measured; the largest measured step is reported.

        A step is measured when it ends an update, so that all accumulated gradients count, and after the first update,
        because optimizers create their state in it (a skipped update creates none). It is measured once for every set
        of groups that a rule joins or lets rest, and again when optimizers have made state since.
        """
        last = step == self.total - 1
        if not last and ((step + 1) % self.options.accumulate or step < self.options.accumulate):
            return False
        groups = [group for group in self.learner.groups_at(self.learner.updates) if group.optimizers]
        states = sum(len(optimizer.state) for group in groups for optimizer in group.optimizers)
        key = " ".join([*(group.name for group in groups), f"({states} with state)"])
        if key in self._measured:
            return False
        self._measured.add(key)
        return True

    def _batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches from `step` to the end; they depend only on the seed and the step."""
        per_epoch = len(self.train_batches)
        while step < self.total:
            for x, y in self.train_batches.epoch(step // per_epoch, step % per_epoch):
                yield x, y
                step += 1
                if step == self.total:
                    return

    def _rate(self, step: int) -> float:
        return self.options.lr * self.learner.schedule(step // self.options.accumulate)

    def _evaluate(self, batches: data.Batches | None) -> dict[str, float]:
        return self._of_all_blocks(evaluate(self.learner, batches)) if batches is not None else {}

    # Methods that a run on several ranks overrides.

    def _agree(self, resume: Path | None) -> None:
        """Compare with the other ranks everything that the learner is built from."""

    def _device(self) -> torch.device:
        return pick_device(self.options.device)

    def _progress(self, per_epoch: int) -> Progress:
        return Progress(self.total, per_epoch, self._title(), metric=metric_of(self.options.task))

    def _logs(self) -> AbstractContextManager[Log]:
        return open_log(self.folder, self.learner.steps, self.options.tensorboard)

    def _of_all_blocks(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def _new_folder(self) -> Path:
        self._claim = new_folder(self.options)
        return self._claim.folder

    def _write(self, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        checkpoint.save(self.folder / "checkpoints", self.learner.steps, state)

    def _weights(self) -> Mapping[str, Tensor]:
        """The trained weights, under the model's own names."""
        return self.learner.state_dict()["model"]

    def _stop(self) -> int:
        """Number of the signal that ends the run after this step, or 0."""
        return self._signals.received

    def _finish(self, log: Any) -> dict[str, Any]:
        test = self._evaluate(self.test_batches)
        log({"step": self.total, "split": "test", **test})
        memory = self.memory.mib() if self.memory else {}
        name = metric_of(self.options.task).name
        result = {
            "rule": self.options.rule.name,
            "model": model_name(self.options.model),
            "data": self.options.data,
            "label_noise": self.options.label_noise,
            "label_noise_kind": self.options.label_noise_kind if self.options.label_noise else None,
            "seed": self.options.seed,
            "epochs": self.total / len(self.train_batches),
            "steps": self.total,
            "task": self.options.task,
            "metric": name,
            f"test_{name}": test[f"head/{name}"],
            f"val_{name}": self.last_val.get(f"head/{name}"),
            "test_loss": test["head/loss"],
            "val_loss": self.last_val.get("head/loss"),
            "blocks": {k.removesuffix(f"/{name}"): v for k, v in test.items() if k.endswith(f"/{name}")},
            "train_seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds,
            "memory_mib": memory,
            "flops_per_step": self.flops,
            "skipped_steps": self.learner.skipped,
            "parameters": sum(p.numel() for p in self.learner.network.parameters()),
            "torch": torch.__version__,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "command": self.command,
            "notes": self.notes,
            "by_epoch": by_epoch(self.folder / FILE, len(self.train_batches), name),
            "test": test,
            "machines": self.machines,
            "options": {k: v for k, v in to_mapping(self.options).items() if k not in OF_THE_FOLDER},
        }
        if self.options.task == "classification":
            result["chance"] = chance(self.test_batches)
        if self.alone and self.dataset.tokenizer is not None:
            window = self.dataset.test.batch(torch.zeros(1, dtype=torch.int64, device="cpu"))[0][0]
            try:  # the run is trained: a network that reads windows of one length only has no sample, and its result
                reach = tokens_read(self.options.model, len(window))
                result["sample"] = sample_of(self.learner, self.dataset.tokenizer, window, reach)
            except LayerwiseError as reason:
                self.notes.append(f"there is no sample of text: {reason}")
        checkpoint.write_tensors(self.folder / "model.safetensors", self._weights(), self.facts.about_inputs)
        if self.alone and self.options.task == "classification":
            write_atomically(self.folder / "test_correct.npy", correct(self.learner, self.test_batches))
        write_atomically(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        return result

    def _save(self) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "samples": self.samples,
            "seconds": self.seconds,
            "val": self.last_val,
            "memory": vars(self.memory) if self.memory else None,
            "measured": sorted(self._measured),
            "flops": self.flops,
            "threads": torch.get_num_threads(),
            "options": to_mapping(self.options),
            "data": asdict(self.facts),
            "machines": self.machines,
        }
        self._write(state)

    def _restore(self) -> None:
        offloaded = self.options.offload != "none"
        state, damaged = checkpoint.load_latest(self.folder / "checkpoints", mapped=offloaded)
        self.notes += damaged
        if state is None:
            check_not_lost(self.folder, self.options.save_every or len(self.train_batches))
            self.notes.append("the run was resumed before its first checkpoint, so it started again at step 0")
        else:
            check_run_state(state, self.folder)
            if state["learner"]["steps"] > self.total:
                raise LayerwiseError(
                    f"the checkpoint in {shown(self.folder)} is of step {state['learner']['steps']}, and the run has "
                    f"{self.total}; take an older one, or start the run again."
                )
            check_unchanged(self.options, state["options"], self.folder)
            facts = DataSignature.in_state(state)
            if self.dataset.tokenizer is not None:
                check_tokenizer(self.folder, self.dataset.tokenizer, facts)
            facts.check(self.dataset)
            self.learner.load_state_dict(state["learner"])
            self.samples, self.seconds, self.last_val = state["samples"], state["seconds"], state["val"]
            self.memory = MemoryUse(**state["memory"]) if state.get("memory") else None
            self._measured = set(state.get("measured") or [])
            self.flops = state.get("flops")  # not in the checkpoints of version 0.1.0
            self.machines = [
                *(found for found in state.get("machines") or [] if found not in self.machines),
                *self.machines,
            ]
            if state["threads"] != torch.get_num_threads():
                self.notes.append(
                    f"resumed with {torch.get_num_threads()} threads instead of {state['threads']}, so the bits "
                    "may differ from an uninterrupted run"
                )

    def _title(self) -> str:
        o = self.options
        title = f"{o.rule.name} · {model_name(o.model)} · {o.data} · seed {o.seed} · {self.folder}"
        if not self._resumed:
            return title
        over = self.learner.steps == self.total
        return title + (" · finished already" if over else f" · continues after step {self.learner.steps}")
