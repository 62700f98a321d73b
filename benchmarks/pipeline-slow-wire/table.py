"""Throughput of pipelines of two ranks over a wire with delay."""

import re
import statistics

from evidence import table, wrapped

WAYS = {"pipeline": "our pipeline", "1f1b": "torch `Schedule1F1B`", "gpipe": "torch `ScheduleGPipe`"}


def rates(lines):
    """(Mbit/s, ms one way) to way to samples/s, round by round; `WAY simulated` too."""
    found = {}
    for line in lines:
        name = re.fullmatch(r"delay([\d.]+)-rate([\d.]+)-round\d+", line["name"])
        wire = float(name[2]), float(name[1])
        for row in line["rows"]:
            found.setdefault(wire, {}).setdefault(row["way"], []).append(row["samples_per_second"])
            if row["predicted"] is not None:
                found[wire].setdefault(f"{row['way']} simulated", []).append(row["predicted"])
    return dict(sorted(found.items(), key=lambda item: (-item[0][0], item[0][1])))


def medians(found):
    return {wire: {way: statistics.median(values) for way, values in row.items()} for wire, row in found.items()}


def figures(lines):
    median = medians(rates(lines))
    base = next(iter(median.values()))
    slow = median[max(wire for wire in median if wire[0] == 1000)]
    return {way: f"{100 * slow[way] / base[way]:.0f}" for way in WAYS}


def small(lines):
    median = medians(rates(lines))
    base = next(iter(median.values()))
    body = []
    for (rate, delay), row in median.items():
        cells = [f"{row[way]:.1f} ({100 * row[way] / base[way]:.0f} %)" for way in WAYS]
        body.append([f"{delay:g}", f"{rate:g}", *cells])
    return table(["one way, ms", "Mbit/s", *(f"{name}, samples/s" for name in WAYS.values())], body)


def tables(lines):
    found = rates(lines)
    median = medians(found)
    base = next(iter(median.values()))
    rounds = len(next(iter(found.values()))["pipeline"])
    body = []
    for (rate, delay), row in found.items():
        here, cells = median[rate, delay], []
        for way in WAYS:
            guess = 100 * here[f"{way} simulated"] / base[f"{way} simulated"]
            range_ = f"{min(row[way]):.1f} .. {max(row[way]):.1f}"
            cells.append(f"{here[way]:.1f}, {range_} ({100 * here[way] / base[way]:.0f} %, simulated {guess:.0f} %)")
        body.append([f"{delay:g}", f"{rate:g}", *cells])
    text = wrapped(
        "Two ranks in two network namespaces of one machine, one thread each, and a wire with delay and limited "
        f"bandwidth between them (`link.py`). The network is a ViT of 12 blocks, batch 64. Median of {rounds} rounds, "
        "least .. most; in brackets what is left of the throughput of the first row, and what the simulator says."
    )
    head = ["one way, ms", "Mbit/s", *(f"{name}, samples/s" for name in WAYS.values())]
    return [*text, "", f"Each measurement: `{lines[0]['command']}`.", "", *table(head, body)]
