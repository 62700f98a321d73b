"""`layerwise bench speed`: time per training step, with the rules interleaved."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwise.core.devices import synchronize
from layerwise.core.engine import Engine
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.measure.bench_options import SpeedOptions
from layerwise.measure.bench_problem import parse_problem, prepared, write_figures
from layerwise.memory.flops import FlopMeter
from layerwise.runs.progress import GridProgress
from layerwise.terminal import table, terminal_width

PARTS = ("forward", "backward", "optimizer", "other")


class TimedEngine(Engine):
    """Adds up the seconds that each part of a step takes.

    `forward`: the blocks and the rule's signals; `backward`: inside the groups, including recomputation;
    `optimizer`: check, clip, step and free. On an accelerator each part is synchronised, which removes overlap, so we
    report shares, not times.
    """

    def __init__(self, engine: Engine):
        super().__init__(engine.rule, engine.task, engine.execution, engine.resident)
        self.accumulation = engine.accumulation
        self.seconds: dict[str, float] = dict.fromkeys(PARTS[:3], 0.0)

    def _timed(self, part: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        synchronize(self.execution.device)
        started = time.perf_counter()
        result = work(*arguments, **named)
        synchronize(self.execution.device)
        self.seconds[part] += time.perf_counter() - started
        return result

    def forward(self, *arguments: Any, **named: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._timed("forward", super().forward, *arguments, **named)

    def _backward(self, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._timed("backward", super()._backward, *arguments)

    def _step(self, *arguments: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._timed("optimizer", super()._step, *arguments)


def shares_of(learner: Learner, x: Tensor, y: Tensor, steps: int = 3) -> dict[str, float]:
    """Measure the share of a step's time that goes to each of `PARTS`; the shares add up to 1.

    `other` is the rest: the rule's `begin`, checks of the batch, seeds.
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
    """Count the floating-point operations of one training step (matrix products and convolutions, as torch does)."""
    with FlopMeter() as meter:
        learner.step(x, y)
    return meter.total


def speed_of(
    learners: dict[str, tuple[Learner, Tensor, Tensor]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda turn: None,
) -> dict[str, list[float]]:
    """Measure the seconds of every step. Rules are interleaved, so a slow moment of the machine affects all of them.

    Args:
        learners: per name a learner and its batch.
        rounds: rounds that are measured.
        warmup: rounds before the measured ones.
        clock: seconds so far; `time.process_time` if other work shares the cores, which then counts less.
        on_round: called before every round with its number.
    """
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    names = list(learners)
    for turn in range(warmup + rounds):
        on_round(turn)
        # The order rotates, so that no rule always runs after the same one.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            learner, x, y = learners[name]
            started = clock()
            learner.step(x, y)
            synchronize(learner.device)
            if turn >= warmup:
                seconds[name].append(clock() - started)
    return seconds


def speed_command(argv: list[str]) -> int:
    """`layerwise bench speed`."""
    options = parse_problem(SpeedOptions, argv, "bench speed")
    if options.rounds < 1 or options.warmup < 0:
        raise LayerwiseError(f"rounds is {options.rounds} and warmup {options.warmup}; use at least 1 and 0.")
    learners = {
        rule: prepared(
            rule,
            options.model,
            options.depth,
            options.shape,
            options.batch_size,
            options.optimizer,
            options.precision,
            options.device,
            options.model_options,
            micro=options.micro,
            classes=options.classes,
        )
        for rule in options.rule
    }
    rounds = options.rounds + options.warmup
    with GridProgress(rounds, rounds, f"bench speed: {rounds} rounds of {len(learners)} rules", live=False) as progress:
        seconds = speed_of(learners, options.rounds, options.warmup, on_round=progress.reached)
    base = "backprop" if "backprop" in seconds else options.rule[0]
    names = ("rule", "ms/step", "samples/s", f"ratio to {base}", "10 % .. 90 %", "GFLOP", f"{' / '.join(PARTS)}, %")
    lines: list[tuple[str, ...]] = [names]
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
        lines.append(
            (
                rule,
                f"{1000 * median:.2f}",
                f"{row['samples_per_second']:.0f}",
                f"{row['ratio']:.3f}",
                f"{low:.3f} .. {high:.3f}",
                f"{row['flops'] / 1e9:.2f}",
                " / ".join(f"{100 * row['shares'][part]:.0f}" for part in PARTS),
            )
        )
    if options.json != "-":
        print(table(lines, terminal_width(), right=1))
    return write_figures(options, rows, "speed", argv)
