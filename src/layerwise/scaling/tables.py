"""Tables of `layerwise bench scaling`."""

from collections.abc import Iterator, Sequence
from typing import Any

from layerwise.scaling.options import ALONE, ScalingOptions
from layerwise.scaling.series import Series, quantiles
from layerwise.terminal import table, terminal_width

ABOUT = {
    "rule": "the rule in one process",
    "backprop": "backpropagation in one process",
    "apart": "the rule in independent processes, each with a whole network: the limit of the machine",
    "pipeline": "our forward-only pipeline",
    "data": "our data parallel: the rule with the batch shared among the ranks",
    "ddp": "backpropagation with the batch shared among the ranks (torch's DistributedDataParallel)",
    "gpipe": "torch's ScheduleGPipe",
    "1f1b": "torch's Schedule1F1B",
    "zb1p": "torch's ScheduleInterleavedZeroBubble, one stage per rank",
    "zbv": "torch's ScheduleZBVZeroBubble, two stages per rank",
}


HEAD = (
    *("way", "ranks", "samples/s", "10 % .. 90 %", "ratio to rule", "its 10 % .. 90 %", "MiB/step", "fill, s"),
    *("simulated", "error", "waiting for others (for a core), % by rank"),
)


def measured_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table of measurements."""
    lines = [HEAD]
    for row in rows:
        guess = row["predicted"]
        waits = [
            f"{100 * wait:.0f}" + (f" ({100 * queued:.0f})" if queued >= 0.005 else "")
            for wait, queued in zip(row["waiting"], row["queued"], strict=True)
        ]
        lines.append(
            (
                row["way"],
                str(row["ranks"]),
                f"{row['samples_per_second']:.1f}",
                f"{row['samples_per_second_10']:.1f} .. {row['samples_per_second_90']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['ratio_10']:.2f} .. {row['ratio_90']:.2f}",
                f"{max(row['bytes_per_step']) / 2**20:.2f}",
                f"{row['fill']:.2f}",
                "" if guess is None else f"{guess:.1f}",
                "" if guess is None else f"{100 * (guess / row['samples_per_second'] - 1):+.0f} %",
                " ".join(waits),
            )
        )
    yield table(lines, terminal_width(), right=1)


def against_rivals(rows: Sequence[dict[str, Any]], series: dict[tuple[str, int], Series]) -> Iterator[str]:
    """Our pipeline against each baseline, round by round."""
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


def simulated_table(options: ScalingOptions, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table of simulations."""
    found = [row for row in rows if "speedup" in row]
    yield (
        f"simulated: one rank per host, {options.latency:g} ms and {options.bandwidth:g} Gbit/s between two; "
        "samples/s, and how many times one process with the same rule"
    )
    ways = list(dict.fromkeys(row["way"] for row in found))
    lines = [("ranks", "blocks", "micro-batches", *ways)]
    for ranks in dict.fromkeys(row["ranks"] for row in found):
        here = {row["way"]: row for row in found if row["ranks"] == ranks}
        micro = max((row["micro_batches"] or 0 for row in here.values()), default=0)
        cells = [f"{here[w]['predicted']:.1f} ({here[w]['speedup']:.2f} x)" if w in here else "" for w in ways]
        lines.append((str(ranks), str(next(iter(here.values()))["depth"]), str(micro or ""), *cells))
    yield table(lines, terminal_width(), right=0)
