"""Options of `layerwise bench scaling`, and checks whether they can be measured."""

import math
from dataclasses import dataclass

from layerwise.core.ranges import NonNegativeFloat, check, check_ranges
from layerwise.errors import LayerwiseError, unknown
from layerwise.measure.bench_options import Problem
from layerwise.parsing import read_whole

PARTS = {"gpipe": 1, "1f1b": 1, "zb1p": 1, "zbv": 2}
"""Schedules of backpropagation, and how many parts of the network each rank holds."""

WAYS = ("rule", "backprop", "apart", "pipeline", "data", "ddp", *PARTS)
ALONE = ("rule", "backprop")
SLOWEST = 1e9
"""Largest simulated delay in milliseconds, and seconds per Gbit: beyond it the figures are no longer numbers."""
MOST_SIMULATED = 2**10
"""Largest number of ranks that are simulated: 256 take a quarter of a minute per way, and 4 times as many 30 times as
long."""


@dataclass(frozen=True)
class Interconnect:
    """The link between any two neighbouring ranks: messages in one direction follow one another."""

    latency: float = 0.0
    """Seconds until the first byte arrives."""
    bandwidth: float = math.inf
    """Bytes per second."""


@dataclass(frozen=True)
class ScalingOptions(Problem):
    """Measure the throughput of several processes; in every round each way takes its turn once.

    Ways: rule and backprop in one process; apart (processes that share nothing: what the machine gives); pipeline
    and data (ours); ddp (torch's DistributedDataParallel); torch's gpipe, 1f1b, zb1p and zbv (zero bubble). On the CPU.
    """

    rule: str = "sll"
    """Rule that one process, our pipeline and our data parallelism train."""
    model: str = "vit"
    """mlp | vgg | resnet | vit."""
    depth: int | None = None
    """Number of blocks (default: that of the model)."""
    ranks: str = "1,2,4"
    """Numbers of processes to measure, separated by commas."""
    ways: tuple[str, ...] = WAYS
    """What to measure: rule backprop apart pipeline data ddp gpipe 1f1b zb1p zbv."""
    micro_batches: int = 4
    """Micro-batches of torch's pipelines; ours needs none."""
    rounds: int = 5
    """Number of measured rounds."""
    steps: int = 5
    """Measured steps of each way in a round."""
    warmup: int = 2
    """Warm-up steps before them, twice as many in the first round."""
    timeout: float = 300.0
    """Seconds after which a process that does not answer counts as lost."""
    hosts: tuple[str, ...] = ()
    """Commands that start a process on each host, such as "ssh one" "ssh two"; the ranks take them in turn."""
    address: str = "127.0.0.1"
    """Address of the first process, where the others find it."""
    simulate: int | None = None
    """Also simulate up to this many ranks, one per host, with a network that grows with them."""
    latency: float = 0.0
    """Simulated delay between two ranks in milliseconds, one way; with --hosts also for the ranks that are measured."""
    bandwidth: float = math.inf
    """Simulated bandwidth between two ranks in Gbit/s; with --hosts also for the ranks that are measured."""

    def counts(self) -> list[int]:
        """Numbers of processes, from the smallest."""
        try:
            found = sorted({read_whole(word) for word in self.ranks.split(",")})
        except ValueError:
            raise LayerwiseError(f"--ranks {self.ranks!r} is not a list such as 1,2,4.") from None
        if found[0] < 1:
            raise LayerwiseError(f"--ranks {self.ranks!r} holds {found[0]}; each must be 1 or more.")
        return found

    def interconnect(self) -> Interconnect:
        """The simulated link between two ranks."""
        return Interconnect(self.latency / 1e3, self.bandwidth * 1e9 / 8)


def check_measurable(options: ScalingOptions, blocks: int) -> None:
    """Raise LayerwiseError unless all ways can be measured."""
    for name, least in {"rounds": 1, "steps": 1, "warmup": 1, "micro_batches": 1}.items():
        if getattr(options, name) < least:
            raise LayerwiseError(f"{name.replace('_', '-')} is {getattr(options, name)}; use at least {least}.")
    check_ranges(timeout=options.timeout)
    check("latency", options.latency, NonNegativeFloat)
    if options.latency > SLOWEST:
        raise LayerwiseError(f"latency is {options.latency} ms; use {SLOWEST:g} at most.")
    if not options.bandwidth >= 1 / SLOWEST:  # infinity is a link without cost
        raise LayerwiseError(f"bandwidth is {options.bandwidth} Gbit/s; use more than 0, at least {1 / SLOWEST:g}.")
    for way in options.ways:
        if way not in WAYS:
            raise unknown("way", way, WAYS)
    if "rule" not in options.ways:
        raise LayerwiseError("the ways must include rule, with which every other one is compared.")
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
    from layerwise.parallel.replicas import (
        check_shares,
    )  # imported here, so that the help of the command needs no torch

    for ranks in options.counts() if {"data", "ddp"} & {*options.ways} else ():
        check_shares(options.batch_size, ranks)
    if options.simulate is not None:
        if not 2 <= options.simulate <= MOST_SIMULATED:
            raise LayerwiseError(f"simulate is {options.simulate}; give a number of ranks from 2 to {MOST_SIMULATED}.")
        if "pipeline" not in options.ways:
            raise LayerwiseError("to simulate, the pipeline must be among the ways: its messages are measured there.")
