"""Run a grid of training runs that is written down in a folder, and write its table there.

    python benchmarks/grid.py benchmarks/mnist_mlp --jobs 2

The folder holds `grid.toml`: options common to all runs, and the rules to compare. Every rule is tuned over the
same learning rates, on the validation split, with seed `tune_seed`; the test split is looked at only by the final
runs. With `descent = true` the table tells how often SID's local objective fell. A run that is finished is not run
again, so the command can be stopped and repeated. Raw results go to `raw/<run>/result.json`, the table to
`table.md`, its numbers to `results.csv`, the machine to `environment.txt`.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import tempfile
import tomllib
from pathlib import Path

import torch

from layerwise.compare import grid_runs as cells
from layerwise.compare.pool import Pool
from layerwise.runs import arguments
from layerwise.runs.environment import processor

DESCENT = "Descent: share of test samples whose local objective is no larger than before the module, mean over modules."


def main() -> None:
    """Tune, run the seeds, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    arguments = parser.parse_args()
    folder = arguments.folder
    grid = tomllib.loads((folder / "grid.toml").read_text())
    if not arguments.table:
        (folder / "environment.txt").write_text(environment(arguments.jobs))
        run(folder, grid, tuning_cells(grid), arguments.jobs)
    best = {name: tuned_rate(folder, grid, name) for name in grid["rules"]}
    if not arguments.table:
        finals = [(name, best[name], seed, False) for seed in grid["seeds"] for name in grid["rules"]]
        run(folder, grid, finals, arguments.jobs)
    write_table(folder, grid, best)


def tuning_cells(grid: dict) -> list[tuple[str, float, int, bool]]:
    """Rule, learning rate, seed, whether it is a tuning run."""
    if len(grid["rates"]) == 1:
        return []
    names = [name for name in grid["rules"] if name not in grid.get("tuned_as", {})]
    return [(name, lr, grid["tune_seed"], True) for lr in grid["rates"] for name in names]


def cell_name(name: str, lr: float, seed: int, tuning: bool) -> str:
    """Folder of a run below `raw/`."""
    return f"{'tune' if tuning else 'final'}-{name}-lr{lr:g}-seed{seed}"


def run(folder: Path, grid: dict, wanted: list[tuple[str, float, int, bool]], jobs: int) -> None:
    """Run what is not there yet, in the worker processes of `layerwise compare`."""
    commands, runs = {}, []
    with tempfile.TemporaryDirectory() as scratch, Pool(jobs, Path(scratch) / "workers.log") as pool:
        for name, lr, seed, tuning in wanted:
            place = folder / "raw" / cell_name(name, lr, seed, tuning)
            if not (place / "result.json").exists():
                words = [*grid["common"], *grid["rules"][name], *grid["tune" if tuning else "final"]]
                words += ["--lr", f"{lr:g}", "--seed", str(seed), "--threads", "1"]
                options = arguments.train_options([*words, "--out", str(Path(scratch) / place.name)], "train")
                commands[place.name] = " ".join(["layerwise", "train", *words])
                runs.append(cells.GridRun(name, place.name, options))
        cells.train(runs, pool, jobs, ended=lambda cell: keep(cell, folder / "raw" / cell.name, commands[cell.name]))


def keep(cell: cells.GridRun, place: Path, command: str) -> None:
    """Put a finished run's result and metrics into their folder, whole or not at all."""
    result = cell.result
    if result is None:
        print(f"{cell.name}: failed: {(cell.failure or {}).get('reason')}", flush=True)
        return
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "result.json").write_text(json.dumps(result | {"command": command}, indent=2) + "\n")
    shutil.copy(cell.folder / "metrics.jsonl", partial)
    partial.rename(place)
    shutil.rmtree(cell.folder)
    val = "" if result["val_accuracy"] is None else f"val {100 * result['val_accuracy']:.2f} "
    print(f"{cell.name}: {val}test {100 * result['test_accuracy']:.2f} in {result['train_seconds']:.0f} s", flush=True)


def tuned_rate(folder: Path, grid: dict, name: str) -> float:
    """The learning rate with the best accuracy on the validation split; of another rule where the grid says so."""
    name = grid.get("tuned_as", {}).get(name, name)
    scores = {}
    for lr in grid["rates"]:
        file = folder / "raw" / cell_name(name, lr, grid["tune_seed"], True) / "result.json"
        if file.exists():
            scores[lr] = json.loads(file.read_text())["val_accuracy"]
    return max(scores, key=scores.__getitem__) if scores else grid["rates"][0]


def write_table(folder: Path, grid: dict, best: dict[str, float]) -> None:
    """Mean, standard deviation and n of the finished final runs."""
    rows = []
    for name, lr in best.items():
        cells = [folder / "raw" / cell_name(name, lr, seed, False) for seed in grid["seeds"]]
        cells = [cell for cell in cells if (cell / "result.json").exists()]
        results = [json.loads((cell / "result.json").read_text()) for cell in cells]
        if not results:
            continue
        descents = [share for cell in cells for share in descent(cell)]
        accuracy = [100 * result["test_accuracy"] for result in results]
        memory = results[0]["memory_mib"]
        rows.append(
            {
                "rule": name,
                "lr": f"{lr:g}",
                "n": len(results),
                "test_mean": f"{statistics.mean(accuracy):.2f}",
                "test_std": f"{statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else "",
                "blocks": " ".join(
                    f"{100 * statistics.mean(result['blocks'][block] for result in results):.1f}"
                    for block in results[0]["blocks"]
                ),
                "activations_gradients_mib": f"{memory['activations'] + memory['gradients']:.1f}",
                "peak_mib": f"{memory['peak']:.1f}",
                "seconds_mean": f"{statistics.mean(result['train_seconds'] for result in results):.0f}",
                "descent_percent": f"{100 * statistics.mean(descents):.0f}" if descents else "",
            }
        )
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    rates = ", ".join(f"{lr:g}" for lr in grid["rates"])
    chosen = f"out of {rates}, chosen on the validation split with seed {grid['tune_seed']}"
    if len(grid["rates"]) == 1:
        chosen = f"{rates}, the same for all, not tuned"
    columns = {  # of the table: field
        "rule": "rule",
        "lr": "lr",
        "n": "n",
        "test accuracy": "test",
        "by block, head last": "blocks",
        "act. + grad. MiB": "activations_gradients_mib",
        "peak MiB": "peak_mib",
        "seconds": "seconds_mean",
    }
    if grid.get("descent"):
        columns["descent, %"] = "descent_percent"
    lines = [
        f"# {grid['title']}",
        "",
        grid["about"],
        "",
        f"Command: `python benchmarks/grid.py {folder.as_posix()}`. Learning rate of every rule {chosen};",
        "test accuracy in % of the last weights, mean and standard deviation over n seeds; accuracy of every block's",
        "own readout, then the head's; activations + gradients and peak in MiB (exact); seconds of training with one",
        "thread on a shared machine (rough). Rows with fewer seeds than the grid, or missing, were not finished.",
        *([DESCENT] if grid.get("descent") else []),
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        shown = row | {"test": f"{row['test_mean']} ± {row['test_std']}"}
        lines.append("| " + " | ".join(str(shown[field]) for field in columns.values()) + " |")
    lines += ["", "Machine:", "", "```", (folder / "environment.txt").read_text().strip(), "```", ""]
    (folder / "table.md").write_text("\n".join(lines))
    print("\n".join(lines))


def descent(cell: Path) -> list[float]:
    """SID's share of samples with descent on the test split, module by module; empty for other rules."""
    lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    return [
        value for line in lines if line["split"] == "test" for name, value in line.items() if name.endswith("/descent")
    ]


def environment(jobs: int) -> str:
    """The machine and the versions, for the record."""
    return (
        f"cpu: {processor()}, {os.cpu_count()} cores, {jobs} runs at a time with one thread each\n"
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.release()}\n"
    )


if __name__ == "__main__":
    main()
