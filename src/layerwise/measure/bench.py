"""Measurements of rules side by side: exact memory by depth, interleaved time per step."""

import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise import models, rules
from layerwise.core.engine import Engine
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.memory.flops import FlopMeter
from layerwise.memory.malloc import keep_freed_memory
from layerwise.memory.meter import resident_peak
from layerwise.memory.mmap import OnFile
from layerwise.memory.offload import Where, window_of
from layerwise.memory.stores import DiskStore
from layerwise.parsing import parse
from layerwise.report.page import write_report
from layerwise.runs.building import pick_device
from layerwise.runs.checkpoint import write_atomically
from layerwise.runs.environment import environment

CLASSES = 10
CPU = torch.device("cpu")
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Problem:
    """What every benchmark trains, and where the figures go."""

    model_options: dict[str, float] = field(default_factory=dict)
    """Numbers for the model: --model-options width 256."""
    shape: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width of the random images."""
    batch_size: int = 64
    """Samples per batch."""
    optimizer: str = "adamw"
    """Optimizer of every rule."""
    threads: int | None = None
    """Threads of the CPU, of each process."""
    json: str | None = None
    """Write the figures to this file too."""
    out: str | None = None
    """Folder for the figures with command and machine, and report.html; that of a comparison gains a section."""


@dataclass(frozen=True)
class _Shared(Problem):
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the blocks (autocast)."""
    device: str = "auto"
    """cpu | cuda | cuda:N | auto."""


@dataclass(frozen=True)
class MemoryOptions(_Shared):
    """Exact peak bytes of one training step, by depth."""

    rule: tuple[str, ...] = ("sll", "local_ce", "backprop", "backprop_checkpoint", "backprop_offload")
    """Rules to measure."""
    model: tuple[str, ...] = ("mlp",)
    """Models to measure."""
    depths: str = "4,16,64,256"
    """Numbers of blocks, separated by commas."""
    offload: Where = "none"
    """none | host | disk: where blocks wait; each figure then comes from a process, whose resident peak is told."""
    offload_folder: str | None = None
    """Folder for the file of --offload disk; that of temporary files if not given."""


@dataclass(frozen=True)
class SpeedOptions(_Shared):
    """Time per training step, interleaved: every round runs each rule once, in turn."""

    rules: tuple[str, ...] = ("sll", "backprop", "backprop_checkpoint")
    """Rules to time; the ratios are to backprop where it is among them, else to the first."""
    model: str = "vit"
    """mlp | vgg | resnet | vit."""
    depth: int | None = None
    """Number of blocks; the model's own default if not given."""
    rounds: int = 10
    """Rounds that count."""
    warmup: int = 2
    """Rounds before them that do not."""


def memory_of(
    rule: str,
    model: str,
    depth: int,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    batch_size: int = 64,
    optimizer: str = "adamw",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "cpu",
    offload: Where = "none",
    offload_folder: str | None = None,
    **model_options: float,
) -> dict[str, Any]:
    """Peak memory of a training step.

    Args:
        rule: name of a rule.
        model: name of a model.
        depth: number of blocks.
        shape: channels, height, width.
        batch_size: samples per batch.
        optimizer: name of the optimizer.
        precision: precision of the blocks.
        device: where to run.
        offload: where the blocks wait that do not run: none, host or disk.
        offload_folder: for the file of disk; the system's folder for temporary files if not given.
        model_options: further dials of the model.

    Returns:
        `rule`, `model`, `depth`, `offload`, and in bytes `parameters`, `optimizer`, `gradients`, `activations`, `peak`.
        Of offloaded blocks, those count that are on the device.

    >>> row = memory_of("sll", "mlp", 2, shape=(1, 8, 8), batch_size=4, width=16)
    >>> row["parameters"]  # 65*16 + 17*16 + 17*10 weights and a fixed 10x16 projection
    6568
    """
    where = offload, offload_folder
    learner, x, y = _prepared(rule, model, depth, shape, batch_size, optimizer, precision, device, model_options, where)
    learner.step(x, y)
    _, use = learner.measured_step(x, y)
    return {"rule": rule, "model": model, "depth": depth, "offload": offload, **asdict(use)}


def _apart(task: dict[str, Any]) -> dict[str, Any]:
    """`memory_of` in a process of its own, whose largest resident size the row tells as `resident`."""
    command = [sys.executable, "-c", "from layerwise.measure import bench; bench.answer_apart()"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        raise LayerwiseError(
            f"the process that measured {task['rule']} at depth {task['depth']} has ended with exit code "
            f"{done.returncode} ({words[-1]}); choose smaller --depths, or find out what ended it."
        ) from None
    if "failure" in answer:
        raise LayerwiseError(answer["failure"])
    return answer


def answer_apart() -> None:
    """The other process: arguments of `memory_of` from standard input, the row to standard output, as JSON."""
    keep_freed_memory()
    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task.pop("threads"))
    try:
        answer = memory_of(**task)
        answer["resident"] = resident_peak()
    except LayerwiseError as error:
        answer = {"failure": str(error)}
    print(json.dumps(answer))


def _prepared(
    rule: str,
    model: str,
    depth: int | None,
    shape: tuple[int, int, int],
    batch_size: int,
    optimizer: str,
    precision: Literal["fp32", "bf16", "fp16"],
    device: str,
    model_options: dict[str, float],
    offload_to: tuple[Where, str | None] = ("none", None),
) -> tuple[Learner, Tensor, Tensor]:
    where = pick_device(device)
    offload, folder = offload_to[0], Path(offload_to[1] or tempfile.gettempdir())
    with OnFile(folder) if offload == "disk" else contextlib.nullcontext():  # as in a run: never all of it in memory
        network = network_of(model, depth, shape, model_options)
    x, y = (tensor.to(where) for tensor in batch_of(shape, batch_size))
    how: dict[str, Any] = {"device": where, "offload": offload, "offload_folder": folder}
    return Learner(network, rule, optimizer=optimizer, precision=precision, lr=LEARNING_RATE, example=x, **how), x, y


def network_of(model: str, depth: int | None, shape: Sequence[int], model_options: dict[str, float]) -> nn.Sequential:
    """The network that is measured: the same weights in every process."""
    with preserved_generators(CPU):
        seed_generators(derive_seed(0, "bench"), CPU)
        channels, height, width = shape
        return models.create(model, (channels, height, width), CLASSES, **_dials(model_options, depth))


def batch_of(shape: Sequence[int], batch_size: int) -> tuple[Tensor, Tensor]:
    """Random images `(B, C, H, W)` and labels `(B,)`: the same in every process."""
    with preserved_generators(CPU):
        seed_generators(derive_seed(0, "bench batch"), CPU)
        return torch.randn(batch_size, *shape), torch.randint(CLASSES, (batch_size,))


def _dials(model_options: dict[str, float], depth: int | None) -> dict[str, Any]:
    """Options of the model as it takes them: the command line gives every number as a float."""
    dials: dict[str, Any] = {k: int(v) if float(v).is_integer() else v for k, v in model_options.items()}
    return dials if depth is None else dials | {"depth": depth}


def memory_command(argv: list[str]) -> int:
    """`layerwise bench memory`."""
    options = parse_problem(MemoryOptions, argv, "bench memory")
    try:
        depths = [int(depth) for depth in options.depths.split(",")]
    except ValueError as reason:
        raise LayerwiseError(f"--depths {options.depths!r} is not a list such as 4,16,64.") from reason
    for model in options.model:
        for depth in depths:
            with torch.device("meta"):  # a mistake is told before the first measurement
                network = models.create(model, options.shape, CLASSES, **_dials(options.model_options, depth))
            for rule in options.rule if options.offload != "none" else ():
                window_of(rules.create(rule), len(network.block_names))
    if options.offload == "disk":
        DiskStore(Path(options.offload_folder or tempfile.gettempdir()), CPU)  # refuses a folder that it cannot use
    rows = []
    columns = COLUMNS if options.offload == "none" else (*COLUMNS, "resident")
    print(f"{'rule':<20}{'model':<8}{'depth':>6}" + "".join(f"{name:>14}" for name in columns) + "   (MiB)")
    for model in options.model:
        for rule in options.rule:
            for depth in depths:
                task = {
                    "rule": rule,
                    "model": model,
                    "depth": depth,
                    "shape": options.shape,
                    "batch_size": options.batch_size,
                    "optimizer": options.optimizer,
                    "precision": options.precision,
                    "device": options.device,
                    "offload": options.offload,
                    "offload_folder": options.offload_folder,
                    **options.model_options,
                }
                apart = options.offload != "none"
                row = _apart(task | {"threads": torch.get_num_threads()}) if apart else memory_of(**task)
                rows.append(row)
                figures = "".join(f"{'-' if row[n] is None else f'{row[n] / 2**20:.3f}':>14}" for n in columns)
                print(f"{rule:<20}{model:<8}{depth:>6}{figures}", flush=True)
    return write_figures(options, rows, "memory", argv)


COLUMNS = ("parameters", "optimizer", "gradients", "activations", "peak")


PARTS = ("forward", "backward", "optimizer", "other")


class TimedEngine(Engine):
    """An engine that adds up the seconds of its parts.

    `forward`: the blocks and the rule's signals; `backward`: inside the groups, with what is computed again there;
    `optimizer`: check, clip, step and free. On an accelerator every part is waited for, which costs what would have
    overlapped, so that shares are told and not times.
    """

    def __init__(self, engine: Engine):
        super().__init__(engine.rule, engine.task, engine.execution, engine.resident)
        self.accumulation = engine.accumulation
        self.seconds: dict[str, float] = dict.fromkeys(PARTS[:3], 0.0)

    def _timed(self, part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        synchronize(self.execution.device)
        started = time.perf_counter()
        result = work(*arguments)
        synchronize(self.execution.device)
        self.seconds[part] += time.perf_counter() - started
        return result

    def forward(self, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._timed("forward", super().forward, *arguments)

    def _backward(self, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._timed("backward", super()._backward, *arguments)

    def _step(self, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._timed("optimizer", super()._step, *arguments)


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares_of(learner: Learner, x: Tensor, y: Tensor, steps: int = 3) -> dict[str, float]:
    """Shares of a step's time that go to each of `PARTS`; they add up to 1.

    `other` is what is neither: the rule's `begin`, checks of the batch, seeds.
    """
    plain = learner.engine
    learner.engine = timed = TimedEngine(plain)
    try:
        started = time.perf_counter()
        for _ in range(steps):
            learner.step(x, y)
        synchronize(learner.device)
        whole = time.perf_counter() - started
    finally:
        learner.engine = plain
    shares = {part: seconds / whole for part, seconds in timed.seconds.items()}
    return shares | {"other": 1.0 - sum(shares.values())}


def flops_of(learner: Learner, x: Tensor, y: Tensor) -> int:
    """Floating-point operations of one training step, as torch counts them (matrix products and convolutions)."""
    with FlopMeter() as meter:
        learner.step(x, y)
    return meter.total


def speed_of(learners: dict[str, tuple[Learner, Tensor, Tensor]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of every step, rules interleaved so that a slow moment of the machine hits all of them alike.

    Args:
        learners: per name a learner and its batch.
        rounds: rounds that count.
        warmup: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    names = list(learners)
    for turn in range(warmup + rounds):
        # The order rotates, so that no rule always runs behind the same one.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            learner, x, y = learners[name]
            started = time.perf_counter()
            learner.step(x, y)
            synchronize(learner.device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def speed_command(argv: list[str]) -> int:
    """`layerwise bench speed`."""
    options = parse_problem(SpeedOptions, argv, "bench speed")
    if options.rounds < 1 or options.warmup < 0:
        raise LayerwiseError(f"rounds is {options.rounds} and warmup {options.warmup}; use at least 1 and 0.")
    learners = {
        rule: _prepared(
            rule,
            options.model,
            options.depth,
            options.shape,
            options.batch_size,
            options.optimizer,
            options.precision,
            options.device,
            options.model_options,
        )
        for rule in options.rules
    }
    seconds = speed_of(learners, options.rounds, options.warmup)
    base = "backprop" if "backprop" in seconds else options.rules[0]
    print(
        f"{'rule':<22}{'ms/step':>10}{'samples/s':>12}{'ratio to ' + base:>24}{'10 % .. 90 %':>20}{'GFLOP':>10}"
        "   forward / backward / optimizer / other, %"
    )
    rows = []
    for rule, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds[base], strict=True))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        median = statistics.median(times)
        row = {
            "rule": rule,
            "model": options.model,
            "depth": len(learners[rule][0].network.blocks),
            "batch_size": options.batch_size,
            "seconds": median,
            "samples_per_second": options.batch_size / median,
            "ratio": statistics.median(ratios),
            "ratio_10": low,
            "ratio_90": high,
            "baseline": base,
            "rounds": options.rounds,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "flops": flops_of(*learners[rule]),
            "shares": shares_of(*learners[rule]),
        }
        rows.append(row)
        print(
            f"{rule:<22}{1000 * median:>10.2f}{row['samples_per_second']:>12.0f}{row['ratio']:>24.3f}"
            f"{f'{low:.3f} .. {high:.3f}':>20}{row['flops'] / 1e9:>10.2f}   "
            + " / ".join(f"{100 * row['shares'][part]:.0f}" for part in PARTS)
        )
    return write_figures(options, rows, "speed", argv)


def parse_problem(cls: type, argv: Sequence[str], command: str) -> Any:
    """Options of a benchmark; what they name exists, and what they write to can be written."""
    options = parse(cls, argv, command)
    if options.threads is not None:
        if options.threads < 1:
            raise LayerwiseError(f"threads is {options.threads}; it must be 1 or more.")
        torch.set_num_threads(options.threads)
    if options.json is not None and not Path(options.json).parent.is_dir():
        raise LayerwiseError(f"cannot write {options.json}: there is no folder {Path(options.json).parent}.")
    if options.out is not None:
        try:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise LayerwiseError(
                f"cannot write to {options.out} ({reason.strerror}); choose another --out."
            ) from reason
    if min(options.shape) < 1 or options.batch_size < 1:
        raise LayerwiseError("shape and batch size must be 1 or more.")
    names = options.rules if isinstance(options, SpeedOptions) else options.rule
    for name in [names] if isinstance(names, str) else names:
        rules.get(name)
    return options


def write_figures(options: Any, rows: list[dict[str, Any]], kind: str, argv: Sequence[str]) -> int:
    """Write the files that the options ask for; returns the exit code."""
    if options.json is not None:
        write_atomically(Path(options.json), json.dumps(rows, indent=2) + "\n")
    if options.out is not None:
        command = shlex.join(["layerwise", "bench", kind, *argv])
        found = {"command": command, "environment": environment(), "rows": rows}
        write_atomically(Path(options.out) / f"{kind}.json", json.dumps(found, indent=2) + "\n")
        print(f"report: {write_report(Path(options.out))}")
    return 0
