"""Write table.md out of raw/*.json; with --environment also environment.txt, which names machine and versions."""

import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from layerwise.runs.environment import environment, in_words

HERE = Path(__file__).parent


def spread(values: list[float]) -> str:
    """Mean and standard deviation of shares, in %."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    """A row per shards and rule."""
    if "--environment" in sys.argv[1:]:
        packages = ", ".join(f"{name} {version(name)}" for name in ("flwr", "ray"))
        (HERE / "environment.txt").write_text(f"{in_words(environment())}, {packages}\n")
    runs = [json.loads(file.read_text()) for file in sorted((HERE / "raw").glob("*.json"))]
    by_name = {(run["options"]["alpha"], run["options"]["rule"], run["options"]["seed"]): run for run in runs}
    seeds = sorted({seed for _, _, seed in by_name})
    first = runs[0]["options"]
    last = first["rounds"]
    rounds = list(dict.fromkeys([1, 2, last]))
    lines = [
        "# Federated averaging over clients with local losses",
        "",
        f"FedAvg (Flower) over {first['clients']} clients, {first['train_samples']:,} training images of MNIST in all; "
        f"MLP {first['depth']}x{first['width']}, {first['precision']}, batch {first['batch_size']}, "
        f"{first['local_epochs']} local epochs per round; AdamW at {first['lr']:g} (tuned for no rule), which begins "
        "anew in every round. Shards: IID, or skewed by a Dirichlet distribution over clients with alpha = 0.5. "
        "Accuracy is that of the averaged network on the 10,000 test images by the rule's own predictor, mean ± "
        f"standard deviation over {len(seeds)} seeds; *- backprop* is the mean of the differences seed by seed. Bytes "
        "and memory are those of one client, exact; memory is that of a training step.",
        "",
        "Command: `bash benchmarks/federated/run.sh`.",
        "",
        "| shards | rule | " + " | ".join(f"round {number}, %" for number in rounds) + " | - backprop, points | "
        "down, MiB/round | up, MiB/round | peak, MiB | of it gradients + activations |",
        "|" + "---|" * (7 + len(rounds)),
    ]
    for alpha, rule in dict.fromkeys((alpha, rule) for alpha, rule, _ in sorted(by_name)):
        found = [by_name[alpha, rule, seed]["rounds"] for seed in seeds]
        ends = [rows[last]["accuracy"] for rows in found]
        base = [by_name[alpha, "backprop", seed]["rounds"][last]["accuracy"] for seed in seeds]
        gap = 100 * statistics.mean(a - b for a, b in zip(ends, base, strict=True))
        cells = [f"alpha {alpha:g}" if alpha else "IID", f"`{rule}`"]
        cells += [spread([rows[number]["accuracy"] for rows in found]) for number in rounds]
        cells.append("" if rule == "backprop" else f"{gap:+.1f}")
        for name in ("bytes-down", "bytes-up", "memory", "work"):
            cells.append(f"{max(row[name] for rows in found for row in rows[1:]) / 2**20:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Machine:", "", "```", (HERE / "environment.txt").read_text().strip(), "```", ""]
    (HERE / "table.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
