"""Brings a rule of a comparison under a peak of memory, and times it against plain backpropagation."""

import statistics
import time
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise import data
from layerwise.core.devices import pick_device, synchronize
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.measure.bench_speed import flops_of, speed_of
from layerwise.measure.energy import EnergyMeter, domains
from layerwise.memory.fitting import Fit
from layerwise.rules.backprop import Backprop
from layerwise.rules.backprop_checkpoint import BackpropCheckpoint, Policy
from layerwise.runs import building
from layerwise.runs.fitting import fit_run, warnings_collected
from layerwise.runs.options import TrainOptions

OF_RULE = ("policy", "group")
"""Fields of a rule that may be changed to reach the peak, besides `micro` and `blocks`."""
ENERGY_SECONDS = 1.0
"""Seconds over which energy is read: its counters move in steps of a millisecond."""


@dataclass(frozen=True)
class PeakProblem:
    """Data and device, the same for all settings of a row."""

    facts: building.DataSignature
    dataset: data.Dataset
    batches: data.Batches
    device: torch.device

    @classmethod
    def of(cls, options: TrainOptions) -> "PeakProblem":
        """The problem of a run."""
        device = pick_device(options.device)
        dataset = building.load_data(options)
        return cls(
            building.DataSignature.of(dataset), dataset, building.split_batches(options, dataset, device)[0], device
        )

    def learner(self, options: TrainOptions) -> Learner:
        """A new learner; no schedule ends while its steps are measured."""
        return building.build_learner(options, self.facts, self.device, 10**6, graph=self.dataset.graph)

    def fit(self, options: TrainOptions, peak: int) -> tuple[Fit, tuple[str, ...]]:
        """The smallest number of parts within the peak, and the warnings."""
        return fit_run(options, self.facts, self.device, self.batches, self.dataset.graph, peak)


def ways_of(options: TrainOptions, settled: Sequence[str] = ()) -> list[list[TrainOptions]]:
    """The ways in which a row may save memory besides parts of the batch; those that change what is learned come last.

    Args:
        options: of the row, as given.
        settled: options that the row was given with; a policy among them stays as it is.

    Returns:
        Lists of options; a list is tried if no way in the earlier ones comes under the peak. The first holds the row as
        given and, for `backprop_checkpoint`, its other policies. The next ones have fewer blocks in a group, and then
        more blocks, if blocks were joined.

    >>> [way.rule.policy for way in ways_of(TrainOptions(rule=BackpropCheckpoint()))[0]]
    ['all', 'matmul', 'attention']
    """
    rule = options.rule
    found = [[options]]
    if isinstance(rule, BackpropCheckpoint) and "policy" not in settled:
        others = [policy for policy in typing.get_args(Policy) if policy != rule.policy]
        found[0] += [changed(options, {"policy": policy}) for policy in others]
    group = getattr(rule, "group", 1)
    while group > 1:
        group //= 2
        found.append([changed(options, {"group": group})])
    if options.blocks is not None and not isinstance(rule, Backprop):
        found += [[changed(found[-1][0], {"blocks": options.blocks * 2**k})] for k in range(1, 8)]
        found.append([changed(found[-1][0], {"blocks": None})])
    return found


def changes(asked: TrainOptions, found: TrainOptions) -> dict[str, Any]:
    """The differences between a row as given and within the peak, by name."""
    before, after = (_settings(options) for options in (asked, found))
    return {name: value for name, value in after.items() if value != before[name]}


def changed(options: TrainOptions, settings: dict[str, Any]) -> TrainOptions:
    """The inverse of `changes`.

    >>> changed(TrainOptions(), {"micro": 4}).micro
    4
    """
    of_rule = {name: value for name, value in settings.items() if name in OF_RULE}
    rest = {name: value for name, value in settings.items() if name not in OF_RULE}
    return replace(options, rule=replace(options.rule, **of_rule), **rest)


def _settings(options: TrainOptions) -> dict[str, Any]:
    found = {"micro": options.micro, "blocks": options.blocks}
    return found | {name: getattr(options.rule, name) for name in OF_RULE if hasattr(options.rule, name)}


def bring_under(
    options: TrainOptions, baseline: TrainOptions, peak: int, settled: Sequence[str], rounds: int = 7
) -> dict[str, Any]:
    """Search for the cheapest setting of a row that stays within a peak.

    Every way of `ways_of` gets the fewest parts that bring it under the peak. Those that stay within it are timed, in
    turns with plain backpropagation in one process, and the fastest is used.

    Args:
        options: of the row, as given.
        baseline: plain backpropagation of the same network and data.
        peak: bytes of activations + gradients.
        settled: options that stay as they were given.
        rounds: steps of each that are timed.

    Returns:
        A `PeakFit`, as the record of the comparison stores it.
    """
    problem = PeakProblem.of(options)
    tried: list[tuple[TrainOptions, Fit, tuple[str, ...]]] = []
    reached: list[tuple[TrainOptions, Fit, tuple[str, ...]]] = []
    for ways in ways_of(options, settled):
        for way in ways:
            try:
                fit, notes = problem.fit(way, peak)
            except LayerwiseError:
                if not tried:
                    raise
                continue  # this network does not allow it, for example more blocks than there are
            tried.append((replace(way, micro=fit.micro), fit, notes))
        reached = [found for found in tried if found[1].reached]
        if reached:
            break
    row: dict[str, Any] = {"peak": peak, "held_as_asked": tried[0][1].tried[0][1], "reached": bool(reached)}
    if not reached:
        least, fit, _ = min(tried, key=lambda found: found[1].held)
        why = next((fit.why for _, fit, _ in tried if fit.why), "")
        return row | {"held": fit.held, "changes": changes(options, least), "notes": [], "why": why}
    figures = timed(problem, options, [way for way, _, _ in reached], baseline, rounds)
    best = min(range(len(reached)), key=lambda i: figures["ways"][i]["seconds_per_step"])
    way, fit, notes = reached[best]
    row |= {"held": fit.held, "changes": changes(options, way), "notes": list(notes), "why": ""}
    return row | figures["ways"][best] | {"ratio_as_asked": figures["as_asked"]}


def timed(
    problem: PeakProblem, asked: TrainOptions, ways: Sequence[TrainOptions], baseline: TrainOptions, rounds: int
) -> dict[str, Any]:
    """Time steps of a row as given, of its settings, and of plain backpropagation, in turns.

    Returns:
        `as_asked`: seconds as a multiple of plain backpropagation's. `ways`: for each, this `ratio`,
        `seconds_per_step`, `flops_per_step`, and `joules_per_sample` if the system reports energy. A ratio is None if
        plain backpropagation cannot train the network.
    """
    with warnings_collected():
        return _timed(problem, asked, ways, baseline, rounds)


def _timed(
    problem: PeakProblem, asked: TrainOptions, ways: Sequence[TrainOptions], baseline: TrainOptions, rounds: int
) -> dict[str, Any]:
    x, y = next(iter(problem.batches.epoch(0)))
    learners = {f"way {i}": problem.learner(way) for i, way in enumerate(ways)}
    if asked not in ways:
        learners["asked"] = problem.learner(asked)
    same = next((name for name, options in zip(learners, ways, strict=False) if options == baseline), None)
    if same is None and asked == baseline and "asked" in learners:
        same = "asked"
    if same is None:
        try:
            learners["baseline"] = problem.learner(baseline)
            learners["baseline"].step(x, y)
            same = "baseline"
        except LayerwiseError:
            learners.pop("baseline", None)
    seconds = speed_of({name: (learner, x, y) for name, learner in learners.items()}, rounds, warmup=2)

    def ratio(name: str) -> float | None:
        if same is None:
            return None
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[same], strict=True))

    found = []
    for i in range(len(ways)):
        name = f"way {i}"
        row: dict[str, Any] = {"ratio": ratio(name), "seconds_per_step": statistics.median(seconds[name])}
        row["flops_per_step"] = flops_of(learners[name], x, y)
        if domains():
            row["joules_per_sample"] = joules_per_sample(learners[name], x, y)
        found.append(row)
    own = f"way {list(ways).index(asked)}" if asked in ways else "asked"
    return {"as_asked": ratio(own), "ways": found}


def joules_per_sample(learner: Learner, x: Any, y: Any) -> float | None:
    """Energy of the processors per sample of a step; it includes everything else that runs on them."""
    meter, started, steps = EnergyMeter(), time.perf_counter(), 0
    while time.perf_counter() - started < ENERGY_SECONDS:
        learner.step(x, y)
        synchronize(learner.device)
        steps += 1
    used = meter.joules()
    return None if used is None else used / (steps * len(y))
