"""`layerwise bench scaling`: one process, our pipeline, data parallel and torch's backprop pipelines side by side."""

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from layerwise import models
from layerwise.core.cost import operations
from layerwise.core.cutting import partition
from layerwise.errors import LayerwiseError
from layerwise.measure.bench_problem import batch_of, network_of, options_of, parse_problem, write_figures
from layerwise.processes import cores
from layerwise.runs.progress import GridProgress
from layerwise.scaling.jobs import RankProcesses
from layerwise.scaling.options import ALONE, ScalingOptions, check_measurable
from layerwise.scaling.series import Series, quantiles
from layerwise.scaling.simulate import PARTS, Costs, grown, predicted
from layerwise.scaling.tables import against_rivals, measured_table, simulated_table


def measured(
    options: ScalingOptions, on_round: Callable[[int], None]
) -> tuple[dict[tuple[str, int], Series], dict[str, list[float]]]:
    """Run all rounds.

    Args:
        options: checked.
        on_round: called with the number of rounds that are done.

    Returns:
        A series per way and number of ranks; seconds of the blocks, see `simulate.Costs`.
    """
    counts = options.counts()
    jobs = [(way, ranks) for way in dict.fromkeys(options.ways) for ranks in ([1] if way in ALONE else counts)]
    jobs = [(way, ranks) for way, ranks in jobs if ranks > 1 or way in (*ALONE, "pipeline")]
    series = {job: Series(*job) for job in jobs}
    costs: list[dict[str, list[float]]] = []
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log.txt"
        log.touch()
        processes_by_count: dict[int, RankProcesses] = {}
        for ranks in sorted({ranks for _, ranks in jobs}):
            processes_by_count[ranks] = RankProcesses(ranks, options, log)
            stack.callback(processes_by_count[ranks].close)
        for processes in processes_by_count.values():  # these start in parallel
            processes.meet()
        for turn in range(options.rounds):
            # The order rotates, so that no way always runs after the same one.
            for way, ranks in jobs[turn % len(jobs) :] + jobs[: turn % len(jobs)]:
                warmup = options.warmup * (2 if turn == 0 else 1)
                task = {"do": "measure", "way": "rule" if way == "apart" else way}
                answers = processes_by_count[ranks].ask([task | {"warmup": warmup, "steps": options.steps}] * ranks)
                samples = options.batch_size * options.steps * (ranks if way == "apart" else 1)
                series[way, ranks].add(answers, samples)
            costs += processes_by_count[1].ask([{"do": "costs"}])
            on_round(turn + 1)
    # The costs of the first round are those of code that runs for the first time.
    costs = costs[1:] or costs
    medians = {
        name: [statistics.median(values) for values in zip(*(c[name] for c in costs), strict=True)] for name in costs[0]
    }
    return series, medians


def rows_of(options: ScalingOptions, series: dict[tuple[str, int], Series], blocks: int) -> Iterator[dict[str, Any]]:
    """One row per series, as it is printed and written."""
    base = series["rule", 1].rates
    for (way, ranks), found in series.items():
        rate, low, high = quantiles(found.rates)
        ratio, ratio_low, ratio_high = quantiles([a / b for a, b in zip(found.rates, base, strict=True)])
        yield {
            "way": way,
            "ranks": ranks,
            "rule": options.rule if way in ("rule", "apart", "pipeline", "data") else "backprop",
            "model": options.model,
            "depth": blocks,
            "batch_size": options.batch_size,
            "micro_batches": options.micro_batches if way in PARTS else None,
            "samples_per_second": rate,
            "samples_per_second_10": low,
            "samples_per_second_90": high,
            "seconds": options.batch_size / rate,
            "ratio": ratio,
            "ratio_10": ratio_low,
            "ratio_90": ratio_high,
            "bytes_per_step": found.bytes,
            "waiting": found.share("waiting"),
            "queued": found.share("queued"),
            "busy": found.share("busy"),
            "fill": statistics.median(found.fill),
            "rounds": options.rounds,
            "steps": options.steps,
            "threads": options.threads or 1,
            "torch": torch.__version__,
            "predicted": None,
        }


def contention(series: dict[tuple[str, int], Series]) -> Callable[[int], float]:
    """Speed of each of k processes that compute at once, from those that share nothing; by cores if unmeasured."""
    one = statistics.median(series["rule", 1].rates)
    known = {1: 1.0} | {
        ranks: statistics.median(found.rates) / one for (way, ranks), found in series.items() if way == "apart"
    }
    if len(known) == 1:
        return lambda running: min(1.0, cores() / running)

    def speed(running: int) -> float:
        below = max(ranks for ranks in known if ranks <= running)
        above = min((ranks for ranks in known if ranks >= running), default=below)
        share = (running - below) / (above - below) if above > below else 0.0
        return (known[below] + share * (known[above] - known[below])) / running

    return speed


def scaling_command(argv: list[str]) -> int:
    """`layerwise bench scaling`."""
    options: ScalingOptions = parse_problem(ScalingOptions, argv, "bench scaling")
    if models.outside.is_outside(options.model):
        raise LayerwiseError(
            f"bench scaling divides the models of the zoo ({', '.join(models.names())}), not {options.model!r}; choose "
            "one of them."
        )
    if options_of(options.model, options.depth, options.model_options).tokens:
        raise LayerwiseError(
            f"bench scaling runs on random images, and {options.model} takes tokens; choose another model, such as vit."
        )
    network = network_of(options.model, options.depth, options.shape, options.model_options)
    blocks = len(list(network.children())) - 1
    check_measurable(options, blocks)
    x, _ = batch_of(options.shape, options.batch_size)
    flops = operations(partition(network), x[:1])
    with GridProgress(
        options.rounds, options.rounds, f"bench scaling: {options.rounds} rounds", live=False
    ) as progress:
        series, medians = measured(options, progress.reached)
    rows = list(rows_of(options, series, blocks))
    costs = Costs(**medians, micro_batches=options.micro_batches)
    sizes = [row["bytes_per_step"][0] for row in rows if row["way"] == "pipeline" and row["ranks"] > 1]
    size, interconnect = max(sizes, default=0.0), options.interconnect() if options.hosts else None
    for row in rows:
        if row["way"] in (*PARTS, "pipeline"):
            seconds = predicted(
                row["way"], row["ranks"], costs, flops, size, options.micro_batches, interconnect, contention(series)
            )
            row["predicted"] = options.batch_size / seconds
    tables = [list(measured_table(rows)), list(against_rivals(rows, series))]
    if options.simulate is not None:
        rows += simulated(options, rows, costs, flops, size)
        tables.append(list(simulated_table(options, rows)))
    if options.json != "-":
        print("\n\n".join("\n".join(lines) for lines in tables))
    return write_figures(options, rows, "scaling", argv)


def simulated(
    options: ScalingOptions, rows: Sequence[dict[str, Any]], costs: Costs, flops: Sequence[int], size: float
) -> list[dict[str, Any]]:
    """Rows for machines with one rank per host, and a network that grows with them."""
    assert options.simulate is not None
    per_rank = max(1, (len(flops) - 1) // max(options.counts()))
    found, ranks = [], 2
    while ranks <= options.simulate:
        blocks = max(ranks * per_rank, len(flops) - 1)
        grown_costs, grown_flops = costs.grown(blocks), grown(flops, blocks)
        for way in dict.fromkeys(row["way"] for row in rows if row["predicted"] is not None):
            micro = max(options.micro_batches, ranks)
            if way in PARTS and (micro > options.batch_size or PARTS[way] * ranks > blocks + 1):
                continue
            seconds = predicted(way, ranks, grown_costs, grown_flops, size, micro, options.interconnect())
            alone = sum(grown_costs.rule) if way == "pipeline" else grown_costs.backprop()
            found.append(
                {
                    "way": way,
                    "ranks": ranks,
                    "rule": options.rule if way == "pipeline" else "backprop",
                    "model": options.model,
                    "depth": blocks,
                    "batch_size": options.batch_size,
                    "micro_batches": micro if way in PARTS else None,
                    "predicted": options.batch_size / seconds,
                    "speedup": alone / seconds,
                    "latency_ms": options.latency,
                    "gbit_per_second": None if math.isinf(options.bandwidth) else options.bandwidth,
                }
            )
        ranks *= 2
    return found
