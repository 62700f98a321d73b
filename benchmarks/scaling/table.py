"""Write table.md and environment.txt out of raw/scaling.json."""

import json
from pathlib import Path

from layerwise.runs.environment import in_words

HERE = Path(__file__).parent


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def main() -> None:
    """What was measured, and what was simulated."""
    found = json.loads((HERE / "raw" / "scaling.json").read_text())
    machine = in_words(found["environment"])
    (HERE / "environment.txt").write_text(machine + "\n")
    measured = [row for row in found["rows"] if "samples_per_second" in row]
    simulated = [row for row in found["rows"] if "speedup" in row]
    first = measured[0]
    lines = [
        "# Throughput on several processes",
        "",
        f"{first['model']} of {first['depth']} blocks, batch {first['batch_size']}, threads per rank: "
        f"{first['threads']}; median of {first['rounds']} interleaved rounds of {first['steps']} steps (10 % .. 90 %). "
        "Throughput is that of the steady state; *fill* is the time until the last rank has its first batch done, "
        "which torch's pipelines pay in every step and ours once. *simulated* is what the simulator makes of the "
        "blocks' times in one process.",
        "",
        f"Command: `{found['command']}` (`bash benchmarks/scaling/run.sh`); machine: {machine}.",
        "",
        *table(
            [
                "way",
                "rule",
                "ranks",
                "samples/s",
                "ratio to rule",
                "MiB sent per step, by rank",
                "waiting, % by rank",
                "fill, s",
                "simulated",
            ],
            [
                [
                    row["way"],
                    f"`{row['rule']}`",
                    str(row["ranks"]),
                    f"{row['samples_per_second']:.1f} ({row['samples_per_second_10']:.1f} .. "
                    f"{row['samples_per_second_90']:.1f})",
                    f"{row['ratio']:.2f} ({row['ratio_10']:.2f} .. {row['ratio_90']:.2f})",
                    " ".join(f"{size / 2**20:.1f}" for size in row["bytes_per_step"]),
                    " ".join(f"{100 * share:.0f}" for share in row["waiting"]),
                    f"{row['fill']:.2f}",
                    ""
                    if row["predicted"] is None
                    else f"{row['predicted']:.1f} ({100 * (row['predicted'] / row['samples_per_second'] - 1):+.0f} %)",
                ]
                for row in measured
            ],
        ),
    ]
    if simulated:
        ways = list(dict.fromkeys(row["way"] for row in simulated))
        body = []
        for ranks in dict.fromkeys(row["ranks"] for row in simulated):
            here = {row["way"]: row for row in simulated if row["ranks"] == ranks}
            cells = [f"{here[w]['predicted']:.1f} ({here[w]['speedup']:.1f})" if w in here else "" for w in ways]
            body.append([str(ranks), str(next(iter(here.values()))["depth"]), *cells])
        lines += [
            "",
            f"Simulated: one rank per host, {simulated[0]['latency_ms']:g} ms and "
            f"{simulated[0]['gbit_per_second'] or 'any'} Gbit/s between two neighbours, a network that grows with "
            "the ranks; samples/s, and in brackets how many times one process with the same rule. Micro-batches: as "
            "many as ranks, at least those measured.",
            "",
            *table(["ranks", "blocks", *ways], body),
        ]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
