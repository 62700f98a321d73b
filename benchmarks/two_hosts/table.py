"""Write table.md out of raw/*.json: python table.py FOLDER OPTIONS."""

import json
import re
import statistics
import sys
from pathlib import Path

WAYS = {"pipeline": "our pipeline", "1f1b": "torch `Schedule1F1B`", "gpipe": "torch `ScheduleGPipe`"}


def main() -> None:
    """Median samples/s of every way at every wire, and what is left of that at no delay."""
    folder, options = Path(sys.argv[1]), sys.argv[2]
    rates: dict[tuple[float, float], dict[str, list[float]]] = {}
    for file in sorted((folder / "raw").glob("*.json")):
        found = re.fullmatch(r"delay([\d.]+)-rate([\d.]+)-round\d+", file.stem)
        assert found is not None
        wire = float(found[2]), float(found[1])
        for row in json.loads(file.read_text()):
            rates.setdefault(wire, {}).setdefault(row["way"], []).append(row["samples_per_second"])
            if row["predicted"] is not None:
                rates[wire].setdefault(f"{row['way']} simulated", []).append(row["predicted"])
    wires = sorted(rates, key=lambda wire: (-wire[0], wire[1]))
    rounds = len(next(iter(rates.values()))["pipeline"])
    median = {wire: {way: statistics.median(values) for way, values in row.items()} for wire, row in rates.items()}
    base = median[wires[0]]
    lines = [
        "# Two hosts: pipelines over a wire with delay",
        "",
        "Two ranks in two network namespaces of one machine, one thread each, and a wire with delay and limited "
        f"bandwidth between them (`link.py`). Median of {rounds} rounds, least .. most; in brackets what is left of "
        "the throughput of the first row, and what the simulator says.",
        "",
        f"Command: `bash benchmarks/two_hosts/run.sh`, which gives `layerwise bench scaling {options}`; machine: "
        f"{(folder / 'environment.txt').read_text().strip()}.",
        "",
        "| one way, ms | Mbit/s | " + " | ".join(f"{name}, samples/s" for name in WAYS.values()) + " |",
        "|---" * (2 + len(WAYS)) + "|",
    ]
    for wire in wires:
        rate, delay = wire
        cells = []
        for way in WAYS:
            values, kept = rates[wire][way], 100 * median[wire][way] / base[way]
            guess = 100 * median[wire][f"{way} simulated"] / base[f"{way} simulated"]
            spread = f"{min(values):.1f} .. {max(values):.1f}"
            cells.append(f"{median[wire][way]:.1f}, {spread} ({kept:.0f} %, simulated {guess:.0f} %)")
        lines.append(f"| {delay:g} | {rate:g} | " + " | ".join(cells) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
