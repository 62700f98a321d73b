"""`layerwise bench scaling`: one process, our pipeline, data parallel and torch's backprop pipelines side by side."""

import contextlib
import json
import math
import os
import queue
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerwise import models
from layerwise.compare.pool import cores
from layerwise.core.cost import operations
from layerwise.core.cutting import partition
from layerwise.errors import LayerwiseError, suggestion
from layerwise.measure.bench_problem import Problem, batch_of, network_of, parse_problem, write_figures
from layerwise.parallel.replicas import check_shares
from layerwise.scaling.simulate import PARTS, Costs, Interconnect, grown, predicted

WAYS = ("rule", "backprop", "apart", "pipeline", "data", "ddp", *PARTS)
ALONE = ("rule", "backprop")
ABOUT = {
    "rule": "the rule in one process",
    "backprop": "backpropagation in one process",
    "apart": "the rule in processes that share nothing, each with a whole network: what the machine gives",
    "pipeline": "our forward-only pipeline",
    "data": "our data parallel: the rule with the batch shared among the ranks",
    "ddp": "backpropagation with the batch shared among the ranks (torch's DistributedDataParallel)",
    "gpipe": "torch's ScheduleGPipe",
    "1f1b": "torch's Schedule1F1B",
    "zb1p": "torch's ScheduleInterleavedZeroBubble, one stage per rank",
    "zbv": "torch's ScheduleZBVZeroBubble, two stages per rank",
}


@dataclass(frozen=True)
class ScalingOptions(Problem):
    """Throughput on several processes, interleaved: every round runs each way once, in turn.

    Ways: rule and backprop in one process; apart (processes that share nothing: what the machine gives); pipeline
    and data (ours); ddp (torch's DistributedDataParallel); torch's gpipe, 1f1b, zb1p and zbv (zero bubble). On the CPU.
    """

    rule: str = "sll"
    """Rule of one process, the pipeline and data parallel."""
    model: str = "vit"
    """mlp | vgg | resnet | vit."""
    depth: int | None = None
    """Number of blocks; the model's own default if not given."""
    ranks: str = "1,2,4"
    """Numbers of processes, separated by commas."""
    ways: tuple[str, ...] = WAYS
    """What to measure, out of rule backprop apart pipeline data ddp gpipe 1f1b zb1p zbv."""
    micro_batches: int = 4
    """Parts of a batch in torch's pipelines; ours needs none."""
    rounds: int = 5
    """Rounds that count."""
    steps: int = 5
    """Steps per round that count."""
    warmup: int = 2
    """Steps before them that do not; the first round of all has as many again."""
    timeout: float = 300.0
    """Seconds after which a process that does not answer counts as lost."""
    hosts: tuple[str, ...] = ()
    """Words to start the processes with, one host after another in turn, such as "ip netns exec one"."""
    address: str = "127.0.0.1"
    """Address at which the first process is found by the others."""
    simulate: int | None = None
    """Predict machines of up to so many ranks, for a network that grows with them."""
    latency: float = 0.0
    """Milliseconds, one way, between the ranks that are simulated (and the measured ones, where hosts are given)."""
    bandwidth: float = math.inf
    """Gbit/s between neighbouring ranks there."""

    def counts(self) -> list[int]:
        """Numbers of processes, from the smallest."""
        try:
            found = sorted({int(word) for word in self.ranks.split(",")})
        except ValueError:
            raise LayerwiseError(f"--ranks {self.ranks!r} is not a list such as 1,2,4.") from None
        if found[0] < 1:
            raise LayerwiseError(f"--ranks {self.ranks!r} holds {found[0]}; each must be 1 or more.")
        return found

    def interconnect(self) -> Interconnect:
        """The way between two ranks that is simulated."""
        return Interconnect(self.latency / 1e3, self.bandwidth * 1e9 / 8)


def check(options: ScalingOptions, blocks: int) -> None:
    """Raise LayerwiseError unless everything that is asked for can be measured."""
    for name, least in {"rounds": 1, "steps": 1, "warmup": 1, "micro_batches": 1}.items():
        if getattr(options, name) < least:
            raise LayerwiseError(f"{name.replace('_', '-')} is {getattr(options, name)}; use at least {least}.")
    if not options.timeout > 0:
        raise LayerwiseError(f"timeout is {options.timeout}; it is a number of seconds larger than 0.")
    if not options.latency >= 0 or not options.bandwidth > 0:
        raise LayerwiseError(
            f"latency is {options.latency} ms and bandwidth {options.bandwidth} Gbit/s; use 0 or more, and more than 0."
        )
    for way in options.ways:
        if way not in WAYS:
            raise LayerwiseError(f"unknown way {way!r}; {suggestion(way, list(WAYS))}.")
    if "rule" not in options.ways:
        raise LayerwiseError("the ways must hold rule, as what every other one is compared with.")
    most = max(options.counts())
    torchs = [way for way in options.ways if way in PARTS]
    if torchs and not most <= options.micro_batches <= options.batch_size:
        raise LayerwiseError(
            f"micro-batches is {options.micro_batches}; torch's pipelines need at least as many as ranks ({most}), and "
            f"no more than samples in a batch ({options.batch_size})."
        )
    for way in [way for way in (*torchs, "pipeline") if way in options.ways]:
        needed = most * PARTS.get(way, 1)
        if needed > blocks + 1:
            raise LayerwiseError(
                f"{way} on {most} ranks needs {needed} parts, and the network has {blocks} blocks and a head; choose a "
                "larger --depth, fewer --ranks, or other --ways."
            )
    for ranks in options.counts() if {"data", "ddp"} & {*options.ways} else ():
        check_shares(options.batch_size, ranks)
    if options.simulate is not None:
        if options.simulate < 2:
            raise LayerwiseError(f"simulate is {options.simulate}; it is a number of ranks, 2 or more.")
        if "pipeline" not in options.ways:
            raise LayerwiseError("to simulate, the pipeline must be among the ways: its messages are measured there.")


class RankProcesses:
    """Processes that form one job, and wait for tasks between two measurements.

    Args:
        ranks: how many.
        options: of the benchmark.
        log: file for what they write to standard error.
    """

    def __init__(self, ranks: int, options: ScalingOptions, log: Path):
        self.ranks, self.limit, self.log = ranks, options.timeout, log
        self.answers: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.processes: list[subprocess.Popen[str]] = []
        threads = options.threads or 1
        hosts = options.hosts or ("",)
        setup = asdict(options) | {"ranks": ranks, "threads": threads}
        try:
            for rank in range(ranks):
                self._start(rank, hosts[rank % len(hosts)], threads)
        except BaseException:
            self.close()
            raise
        self.setup = [setup | {"rank": rank} for rank in range(ranks)]

    def meet(self) -> None:
        """Wait until the processes have found one another; the first thing that they are asked."""
        # Rank 0 chooses a port at its own address, and keeps it: a port that is free here may be taken a moment later.
        (found,) = self.ask([{"do": "listen", "address": self.setup[0]["address"]}])
        self.ask([setup | found for setup in self.setup])

    def _start(self, rank: int, host: str, threads: int) -> None:
        command = [*shlex.split(host), sys.executable, "-m", "layerwise.scaling.rank"]
        with self.log.open("a") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
                    start_new_session=True,  # Ctrl-C is for the parent, whose end ends them too
                )
            except OSError as reason:
                raise LayerwiseError(f"cannot start {shlex.join(command)}: {reason.strerror}.") from reason
        self.processes.append(process)

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.answers.put((rank, line))
            self.answers.put((rank, ""))

        threading.Thread(target=listen, daemon=True).start()

    def ask(self, tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give each of the first processes its task and wait for all answers.

        Raises:
            LayerwiseError: one of them failed, died or has not answered within the limit.
        """
        for process, task in zip(self.processes, tasks, strict=False):
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # noticed below, by its silence
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
        found: dict[int, dict[str, Any]] = {}
        # Each process has the limit for every wait of its own; what it reports then is better than silence.
        deadline = time.monotonic() + 2 * self.limit
        while len(found) < len(tasks):
            try:
                rank, line = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                silent = next(rank for rank in range(len(tasks)) if rank not in found)
                raise LayerwiseError(
                    f"process {silent} of {self.ranks} has not answered for {2 * self.limit:g} s; raise --timeout, or "
                    "measure less."
                ) from None
            answer = json.loads(line) if line else {"failure": f"the process has ended; {self._last_words()}"}
            if "failure" in answer:
                raise LayerwiseError(f"process {rank} of {self.ranks} failed: {answer['failure']}")
            found[rank] = answer
        return [found[rank] for rank in range(len(tasks))]

    def _last_words(self) -> str:
        lines = self.log.read_text().strip().splitlines()
        return f"it said: {lines[-1]}" if lines else "it said nothing."

    def close(self) -> None:
        """End all processes at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass
class Series:
    """What was measured of one way at one number of ranks, round by round."""

    way: str
    ranks: int
    rates: list[float] = field(default_factory=list)
    """Samples per second."""
    shares: list[list[dict[str, float]]] = field(default_factory=list)
    """Per round and rank, shares of the time: `busy`, `queued`, `waiting`."""
    fill: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    """Sent by each rank per step."""

    def add(self, answers: Sequence[dict[str, float]], samples: int) -> None:
        """Take the answers of all ranks for one round; `samples` were trained."""
        # The last rank of our pipeline is what a user waits for; the ranks of all others end a step together.
        seconds = [answer["seconds"] for answer in answers]
        self.rates.append(samples / (seconds[-1] if self.way == "pipeline" else max(seconds)))
        self.fill.append(max(answer["fill"] for answer in answers))
        self.bytes = [answer["bytes"] for answer in answers]
        self.shares.append([])
        for answer in answers:
            share = {name: answer[name] / answer["seconds"] for name in ("busy", "queued")}
            self.shares[-1].append(share | {"waiting": max(0.0, 1.0 - sum(share.values()))})

    def share(self, name: str) -> list[float]:
        """Median share per rank."""
        return [statistics.median(turn[rank][name] for turn in self.shares) for rank in range(self.ranks)]


def measured(
    options: ScalingOptions, told: Callable[[str], None]
) -> tuple[dict[tuple[str, int], Series], dict[str, list[float]]]:
    """Run all rounds.

    Args:
        options: checked.
        told: is called with a line at the end of every round.

    Returns:
        A series per way and number of ranks; seconds of the blocks, see `simulate.Costs`.
    """
    counts = options.counts()
    jobs = [(way, ranks) for way in options.ways for ranks in ([1] if way in ALONE else counts)]
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
        for processes in processes_by_count.values():  # which start side by side
            processes.meet()
        for turn in range(options.rounds):
            started = time.monotonic()
            # The order rotates, so that no way always runs after the same one.
            for way, ranks in jobs[turn % len(jobs) :] + jobs[: turn % len(jobs)]:
                warmup = options.warmup * (2 if turn == 0 else 1)
                task = {"do": "measure", "way": "rule" if way == "apart" else way}
                answers = processes_by_count[ranks].ask([task | {"warmup": warmup, "steps": options.steps}] * ranks)
                samples = options.batch_size * options.steps * (ranks if way == "apart" else 1)
                series[way, ranks].add(answers, samples)
            costs += processes_by_count[1].ask([{"do": "costs"}])
            told(f"round {turn + 1} of {options.rounds}, {time.monotonic() - started:.0f} s")
    # The first round's are those of code that runs for the first time.
    costs = costs[1:] or costs
    medians = {
        name: [statistics.median(values) for values in zip(*(c[name] for c in costs), strict=True)] for name in costs[0]
    }
    return series, medians


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the values at 10 % and 90 %."""
    found = sorted(values)
    return statistics.median(found), found[len(found) // 10], found[-1 - len(found) // 10]


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
    """Speed of each of k processes that compute at once, from those that share nothing; by cores where unmeasured."""
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
    network = network_of(options.model, options.depth, options.shape, options.model_options)
    blocks = len(list(network.children())) - 1
    check(options, blocks)
    x, _ = batch_of(options.shape, options.batch_size)
    flops = operations(partition(network), x[:1])
    series, medians = measured(options, lambda line: print(f"layerwise: {line}", file=sys.stderr, flush=True))
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
    print("\n".join(table(rows)))
    print("\n" + "\n".join(summary(rows, series)))
    if options.simulate is not None:
        rows += simulated(options, rows, costs, flops, size)
        print("\n" + "\n".join(simulated_table(options, rows)))
    return write_figures(options, rows, "scaling", argv)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was measured, for a person to read."""
    yield (
        f"{'way':<10}{'ranks':>6}{'samples/s':>11}{'10 % .. 90 %':>18}{'ratio to rule':>15}{'10 % .. 90 %':>16}"
        f"{'MiB/step':>10}{'fill, s':>9}{'simulated':>11}{'error':>8}   waiting for others (for a core), % by rank"
    )
    for row in rows:
        guess = row["predicted"]
        error = "" if guess is None else f"{100 * (guess / row['samples_per_second'] - 1):+.0f} %"
        waits = [
            f"{100 * wait:.0f}" + (f" ({100 * queued:.0f})" if queued >= 0.005 else "")
            for wait, queued in zip(row["waiting"], row["queued"], strict=True)
        ]
        yield (
            f"{row['way']:<10}{row['ranks']:>6}{row['samples_per_second']:>11.1f}"
            f"{'{:.1f} .. {:.1f}'.format(row['samples_per_second_10'], row['samples_per_second_90']):>18}"
            f"{row['ratio']:>15.2f}{'{:.2f} .. {:.2f}'.format(row['ratio_10'], row['ratio_90']):>16}"
            f"{max(row['bytes_per_step']) / 2**20:>10.2f}{row['fill']:>9.2f}"
            f"{'' if guess is None else f'{guess:.1f}':>11}{error:>8}   {' '.join(waits)}"
        )


def summary(rows: Sequence[dict[str, Any]], series: dict[tuple[str, int], Series]) -> Iterator[str]:
    """Our pipeline against each rival, round by round."""
    yield "\n".join(f"{way}: {ABOUT[way]}" for way in dict.fromkeys(row["way"] for row in rows))
    for way, ranks in series:
        if way != "pipeline" or ranks == 1:
            continue
        rivals = []
        for rival in dict.fromkeys(row["way"] for row in rows):
            found = series.get((rival, 1 if rival in ALONE else ranks))
            if found is not None and rival != way:
                pairs = zip(series[way, ranks].rates, found.rates, strict=True)
                middle, low, high = quantiles([a / b for a, b in pairs])
                rivals.append(f"{middle:.2f} ({low:.2f} .. {high:.2f}) x {rival}")
        yield f"pipeline of {ranks} ranks: {', '.join(rivals)}"


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


def simulated_table(options: ScalingOptions, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was simulated, for a person to read."""
    found = [row for row in rows if "speedup" in row]
    yield (
        f"simulated: one rank per host, {options.latency:g} ms and {options.bandwidth:g} Gbit/s between two; "
        "samples/s, and how many times one process with the same rule"
    )
    ways = list(dict.fromkeys(row["way"] for row in found))
    yield f"{'ranks':>6}{'blocks':>8}{'micro-batches':>15}" + "".join(f"{way:>20}" for way in ways)
    for ranks in dict.fromkeys(row["ranks"] for row in found):
        here = {row["way"]: row for row in found if row["ranks"] == ranks}
        micro = max((row["micro_batches"] or 0 for row in here.values()), default=0)
        cells = [f"{here[w]['predicted']:.1f} ({here[w]['speedup']:.2f} x)" if w in here else "" for w in ways]
        depth = next(iter(here.values()))["depth"]
        yield f"{ranks:>6}{depth:>8}{micro or '':>15}" + "".join(f"{cell:>20}" for cell in cells)
