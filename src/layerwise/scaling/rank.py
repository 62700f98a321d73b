"""A rank that measures: it trains one network in the ways that `layerwise bench scaling` compares.

It reads tasks from standard input, one JSON object per line, and answers each with one line on standard output. The
first task asks rank 0 for a port; the next one gives each rank its number. When standard input ends, because the parent
has died or has finished, the process exits at once.
"""

import contextlib
import copy
import itertools
import json
import os
import socket
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel

from layerwise.core.cost import balanced_ends, operations
from layerwise.core.cutting import partition
from layerwise.core.optim import decay_groups, optimizer_factory
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner, OneProcess
from layerwise.measure.bench_problem import LEARNING_RATE, batch_of, network_of
from layerwise.memory.malloc import keep_freed_memory
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.rendezvous import listen
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage
from layerwise.processes import lines_of_parent
from layerwise.scaling.counting import Clock, CountedStage, CountingLink, GroupTimes

SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "zb1p": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


Way = tuple[Callable[[], Any], Callable[[], float]]
"""One step of training, and the bytes sent so far."""


class Rank:
    """One process of a measurement.

    Args:
        task: `rank`, `ranks`, `address`, `port`, `timeout`, and the options of the benchmark.
        server: on rank 0, a socket that listens at the address and the port.
    """

    def __init__(self, task: dict[str, Any], server: socket.socket | None = None):
        names = {"rank": "RANK", "ranks": "WORLD_SIZE", "address": "MASTER_ADDR", "port": "MASTER_PORT"}
        os.environ.update({variable: str(task[name]) for name, variable in names.items()})
        torch.set_num_threads(task["threads"])
        self.task = task
        self.ranks = Ranks(task["timeout"], torch.device("cpu"), server)
        self.number, self.count = self.ranks.rank, self.ranks.count
        self.x, self.y = batch_of(task["shape"], task["batch_size"])
        self.made: dict[str, Any] = {}
        self.runs = 0

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of `make`, created at the first call: learners and schedules live as long as the process."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def _model(self) -> nn.Sequential:
        return network_of(self.task["model"], self.task["depth"], self.task["shape"], self.task["model_options"])

    def _learner(self, rule: str, stage: Stage | None = None, replicas: Replicas | OneProcess | None = None) -> Learner:
        options = {"optimizer": self.task["optimizer"], "lr": LEARNING_RATE}
        return Learner(self._model(), rule, example=self.x, stage=stage, replicas=replicas, **options)

    def _share(self) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the batch, if it is shared."""
        return self.x.chunk(self.count)[self.number], self.y.chunk(self.count)[self.number]

    def _ring(self, parameters: Sequence[nn.Parameter]) -> float:
        """Bytes that a ring sends per rank to average the gradients: estimated, as gloo does not report them."""
        return 2 * (self.count - 1) / self.count * sum(p.nbytes for p in parameters if p.requires_grad)

    def _optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer that a learner would create."""
        factory = optimizer_factory(self.task["optimizer"], lr=LEARNING_RATE, weight_decay=0.01)
        (optimizer,) = factory(decay_groups(parameters))
        return optimizer

    def measure(self, task: dict[str, Any]) -> dict[str, Any]:
        """Train `steps` steps in one way.

        Args:
            task: `way`, `steps`, and `warmup`, the steps before the clock starts.

        Returns:
            The result of `Clock.read` for the steps; `fill`, the seconds until this rank had finished its first batch;
            and `bytes`, which it sends per step.
        """
        dist.barrier()
        way, warmup, steps = task["way"], task["warmup"], task["steps"]
        if way == "pipeline":
            return self._pipeline(warmup, steps)
        makers: dict[str, Callable[[], Way]] = {
            "rule": lambda: self._whole(self.task["rule"]),
            "backprop": lambda: self._whole("backprop"),
            "data": self._data,
            "ddp": self._ddp,
        }
        step, sent = self._once(way, makers.get(way, lambda: self._schedule(way)))
        return self._steps(step, sent, warmup, steps)

    def _steps(self, step: Callable[[], Any], sent: Callable[[], float], warmup: int, steps: int) -> dict[str, Any]:
        started, fill = time.perf_counter(), 0.0
        for _ in range(warmup):
            step()
            fill = fill or time.perf_counter() - started
        before, clock = sent(), Clock()
        for _ in range(steps):
            step()
        return clock.read() | {"fill": fill, "bytes": (sent() - before) / steps}

    def _whole(self, rule: str) -> Way:
        """The whole network in this process."""
        learner = self._learner(rule, replicas=OneProcess())
        learner.engine = GroupTimes(learner.engine)
        self.made[f"learner {rule}"] = learner
        return lambda: learner.step(self.x, self.y), lambda: 0

    def _pipeline(self, warmup: int, steps: int) -> dict[str, Any]:
        """Our pipeline. Batches continue until the last rank has done its steps, so that no rank idles before that.

        Batches that are then still in transit are dropped.
        """
        learner = self._once("pipeline", lambda: self._learner(self.task["rule"], Stage(self.number, self.count)))
        stage = learner.stage
        stage.link = link = CountingLink(self.ranks)
        x = self.x if stage.first else self.x[:, :0]
        self.runs += 1
        key, enough = f"enough/{self.runs}", threading.Event()
        store = self.ranks.store.clone()  # for another thread

        def wait() -> None:
            with contextlib.suppress(RuntimeError):
                if not store.wait([key], self.ranks.limit.total_seconds()):
                    enough.set()

        if not stage.last:
            threading.Thread(target=wait, daemon=True).start()
        started, fill, clock, found, before = time.perf_counter(), 0.0, None, None, 0
        done = 0
        while not (stage.first and enough.is_set()) and link.take():
            if enough.is_set():
                continue
            if done == warmup:
                clock, before = Clock(), link.bytes
            learner.step(x, self.y)
            done += 1
            fill = fill or time.perf_counter() - started
            if clock is not None and done == warmup + steps:
                found = clock.read() | {"fill": fill, "bytes": (link.bytes - before) / steps}
                if stage.last:
                    enough.set()
                    store.set(key, "yes")
        link.close()
        assert found is not None
        return found

    def _data(self) -> Way:
        """Our data parallel: the rule with the batch shared among the ranks."""
        learner = self._learner(self.task["rule"], replicas=Replicas(self.ranks))
        self.made["learner data"] = learner
        x, y = self._share()
        size = self._ring([p for group in learner.groups for p in group.parameters])
        return lambda: learner.step(x, y), lambda: size * learner.steps

    def _ddp(self) -> Way:
        """Backpropagation with the batch shared among the ranks, by torch's DistributedDataParallel."""
        self.made["model ddp"] = network = self._model()
        model = DistributedDataParallel(network)
        parameters = list(model.parameters())
        optimizer = self._optimizer(parameters)
        x, y = self._share()
        size, steps = self._ring(parameters), itertools.count(1)

        def step() -> None:
            self.made["ddp steps"] = next(steps)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, lambda: size * self.made.get("ddp steps", 0)

    def _schedule(self, way: str) -> Way:
        """Backpropagation by one of torch's schedules over the same blocks."""
        model = self._model()
        parts = self.count * (2 if way == "zbv" else 1)
        costs = operations(partition(model), self.x[:1])
        bounds = list(itertools.pairwise([0, *balanced_ends(costs, parts)]))
        mine = [self.number] if parts == self.count else [self.number, parts - 1 - self.number]
        kind, micro = SCHEDULES[way], self.task["micro_batches"]
        modules = [nn.Sequential(*list(model.children())[slice(*span)]) for span in bounds]
        # If torch does not know the shapes, its ranks exchange them as pickles.
        shapes = [torch.empty_like(self.x.tensor_split(micro)[0], device="meta")]
        with torch.no_grad():
            for module in modules:
                shapes.append(copy.deepcopy(module).to("meta")(shapes[-1]))
        for shape in shapes[1:]:
            shape.requires_grad_()
        stages = [
            CountedStage(modules[i], i, parts, torch.device("cpu"), input_args=shapes[i], output_args=shapes[i + 1])
            for i in mine
        ]
        target = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        schedule: Any = kind(target, micro, loss_fn=F.cross_entropy)  # pyright: ignore[reportArgumentType]
        optimizer = self._optimizer([p for stage in stages for p in stage.submod.parameters()])
        self.made[f"model {way}"] = model
        first, last = 0 in mine, parts - 1 in mine

        def step() -> None:
            # No outputs are kept: a learner keeps none either.
            schedule.step(*([self.x] if first else []), target=self.y if last else None, return_outputs=False)
            optimizer.step()
            optimizer.zero_grad()

        return step, lambda: sum(stage.bytes for stage in stages)

    def costs(self, task: dict[str, Any]) -> dict[str, list[float]]:
        """Seconds of every block and the head, alone in this process: the input of the simulator.

        Returns:
            `rule`: one update of the rule, from the steps measured so far. `forward`, `backward`, and `input`, which is
            the part of `backward` for the input: of backpropagation, for one micro-batch. `optimizer`: one step of it.
        """
        learner = self.made[f"learner {self.task['rule']}"]
        found: dict[str, list[float]] = {"rule": []}
        for group in learner.groups:  # the first block counts for its whole group, the head included
            seconds = statistics.median(learner.engine.seconds[group.name])
            found["rule"] += [seconds, *[0.0] * (len(group.units) - 1)]
        model = self._once("model costs", self._model)
        children = list(model.children())
        optimizers = self._once("optimizers", lambda: [self._optimizer(list(c.parameters())) for c in children])
        h = self.x[: max(1, len(self.x) // self.task["micro_batches"])]
        y = self.y[: len(h)]
        for i, child in enumerate(children):
            h = h.detach().requires_grad_(i > 0)
            last, weights = i == len(children) - 1, list(child.parameters())

            def forward(child: nn.Module, h: Tensor, last: bool) -> Tensor:
                return F.cross_entropy(child(h), y) if last else child(h)

            out, seconds = timed_call(forward, child, h, last)
            found.setdefault("forward", []).append(seconds)
            above, partial = torch.ones_like(out), 0.0
            if i > 0:
                _, partial = timed_call(torch.autograd.grad, out, h, above)
                out = forward(child, h, last)
            found.setdefault("input", []).append(partial)
            grads, seconds = timed_call(torch.autograd.grad, out, [h, *weights] if i > 0 else weights, above)
            found.setdefault("backward", []).append(seconds)
            for weight, grad in zip(weights, grads[-len(weights) :], strict=True):
                weight.grad = grad
            _, seconds = timed_call(optimizers[i].step)
            found.setdefault("optimizer", []).append(seconds)
            optimizers[i].zero_grad()
            h = out.detach()
        return found

    def weights(self, task: dict[str, Any]) -> dict[str, list[float]]:
        """The parameters of one way's network by name, some of which other ranks may train; for tests."""
        way = task["way"]
        model = self.made.get(f"model {way}") or self.made[f"learner {way}"].network.model
        return {name: parameter.flatten().tolist() for name, parameter in model.named_parameters()}


def timed_call(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result of `work`, and its seconds."""
    started = time.perf_counter()
    result = work(*arguments)
    return result, time.perf_counter() - started


def main() -> None:
    """Answer tasks until standard input ends."""
    # Output of gloo and others must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    keep_freed_memory()
    tasks = lines_of_parent()
    rank: Rank | None = None
    server: socket.socket | None = None
    while True:
        task = json.loads(tasks.get())
        try:
            if task.get("do") == "listen":
                server = listen(task["address"], 0)
                answer = {"port": server.getsockname()[1]}
            elif rank is None:
                rank, answer = Rank(task, server), {}
            else:
                answer = getattr(rank, task["do"])(task)
        except LayerwiseError as error:
            answer = {"failure": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
