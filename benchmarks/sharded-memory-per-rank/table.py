"""Throughput, and memory of a rank, with sharded parameters."""

import statistics

from evidence import spread, table, wrapped

WAYS = {"none": "one process", "data": "`--parallel data`, two ranks", "sharded": "`--parallel sharded`, two ranks"}
PARTS = ("parameters", "optimizer", "gradients", "activations", "peak")


def runs(lines, way):
    return [line for line in lines if line["name"].startswith(f"{way}-")]


def figures(lines):
    found = {}
    for way in WAYS:
        members = runs(lines, way)
        held = members[0]["memory_mib"]
        found[f"{way}_state"] = f"{held['parameters'] + held['optimizer']:.1f}"
        found[f"{way}_rate"] = f"{statistics.mean(run['samples_per_second'] for run in members):.0f}"
    return found


def small(lines):
    body = []
    for way, words in WAYS.items():
        members = runs(lines, way)
        rate = spread([run["samples_per_second"] for run in members], digits=1)
        body.append([words, rate, *(f"{members[0]['memory_mib'][part]:.1f}" for part in PARTS)])
    return table(["way", "samples/s", *PARTS], body)


def tables(lines):
    text = wrapped(
        "ViT of 12 blocks, width 192, `local_ce`, batch 64 of all ranks together, one thread per rank; three runs of "
        "40 steps each, in turn. Memory is exact, MiB, that of one rank."
    )
    return [*text, "", *small(lines)]
