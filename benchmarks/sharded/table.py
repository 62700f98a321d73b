"""Write table.md out of raw/*.json."""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
WAYS = {"none": "one process", "data": "`--parallel data`, two ranks", "sharded": "`--parallel sharded`, two ranks"}


def main() -> None:
    """A row per way: samples per second, and the bytes of one rank."""
    lines = [
        "# Sharded parameters: throughput, and memory of a rank",
        "",
        "ViT of 12 blocks, width 192, `local_ce`, batch 64 of all ranks together, one thread per rank; three runs of "
        "40 steps each, in turn. Memory is exact, MiB.",
        "",
        f"Command: `bash benchmarks/sharded/run.sh`. Machine: {(HERE / 'environment.txt').read_text().strip()}.",
        "",
        "| way | samples/s | parameters | optimizer | gradients | activations | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, words in WAYS.items():
        found = [json.loads(file.read_text()) for file in sorted((HERE / "raw").glob(f"{way}-*.json"))]
        rates = [run["samples_per_second"] for run in found]
        held = found[0]["memory_mib"]
        cells = [f"{held[name]:.1f}" for name in ("parameters", "optimizer", "gradients", "activations", "peak")]
        rate = f"{statistics.mean(rates):.1f} ± {statistics.stdev(rates):.1f}"
        lines.append(f"| {words} | {rate} | " + " | ".join(cells) + " |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
