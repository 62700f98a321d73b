"""Write table.md out of raw/seed*.json."""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = {  # of the table: field, factor, digits
    "accuracy, %": ("accuracy", 100, 2),
    "divergence from the label, nats": ("label_kl", 1, 3),
    "telescoped bound, nats": ("bound", 1, 3),
    "within the bound, %": ("within_bound", 100, 1),
    "descent, %": ("descent", 100, 1),
    "consistency, nats": ("consistency", 1, 4),
    "entropy, nats": ("entropy", 1, 3),
}


def main() -> None:
    """A row per module, then a row per threshold of early exit."""
    found = [json.loads(file.read_text()) for file in sorted((HERE / "raw").glob("seed*.json"))]
    lines = [
        "# Beliefs of SID's cascade, module by module",
        "",
        "Fashion-MNIST, ten modules at half the authors' width, 1,000 steps, alpha 0.5, learning rate 1e-2; the "
        f"10,000 test images, mean ± standard deviation over {len(found)} seeds. Module 0 is the uniform belief. "
        "Descent is the share of samples whose loss at a module is no larger than that of the belief before; where "
        "that holds at all modules so far, the telescoped bound follows.",
        "",
        f"Command: `bash benchmarks/sid_beliefs/run.sh`. Machine: {(HERE / 'environment.txt').read_text().strip()}.",
        "",
        "| module | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for module in range(len(found[0]["modules"])):
        rows = [run["modules"][module] for run in found]
        cells = [spread([row[field] for row in rows if field in row], *how) for field, *how in COLUMNS.values()]
        lines.append(f"| {module} | " + " | ".join(cells) + " |")
    lines += ["", "| stop at probability | accuracy, % | modules used |", "|---|---|---|"]
    for exits in zip(*(run["early_exit"] for run in found), strict=True):
        accuracy, used = ([row[field] for row in exits] for field in ("accuracy", "modules_used"))
        lines.append(f"| {exits[0]['threshold']:g} | {spread(accuracy, 100, 2)} | {spread(used, 1, 2)} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


def spread(values: list[float], factor: float, digits: int) -> str:
    """Mean and standard deviation; empty where there is nothing."""
    if not values:
        return ""
    return f"{factor * statistics.mean(values):.{digits}f} ± {factor * statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
