"""Make the evidence of a claim, and write its README.

    python benchmarks/run.py benchmarks/mlp-local-losses-vs-backprop --jobs 2
    python benchmarks/run.py benchmarks/mlp-local-losses-vs-backprop --check mnist/sll
    python benchmarks/run.py benchmarks/language-models --grid characters --device cuda --jobs 8
    python benchmarks/run.py benchmarks/* --table

A folder with grids in its `claim.toml` is trained here: every rule over the same learning rates on the validation
split, then the final runs over the seeds. Only the final runs use the test split. A finished run is not run again, so
the command can be stopped and repeated. A folder without grids has a `run.sh`, which gets the remaining options.

`--check GRID/ROW ...` trains the final runs of these rows again and compares them with the stored ones, all scalars of
the test split to eight digits; nothing is stored. `--table` only writes the README from the stored results.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import evidence
from evidence import Claim, Grid

from layerwise.compare import grid_runs
from layerwise.compare.grid_runs import GridRun
from layerwise.compare.pool import WorkerPool
from layerwise.runs import arguments as command_line
from layerwise.runs.building import load_data

Wanted = tuple[Grid, str, float, int, str]
"""Grid, row, learning rate, seed, `tuning` or `final`."""


def main() -> int:
    """Train, check, or run the folder's script; then write the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument(
        "--device", default="auto", help="where the runs of a grid train: cpu, cuda, ... (default: auto)"
    )
    parser.add_argument("--grid", nargs="+", metavar="GRID", help="only these grids of the folder")
    parser.add_argument("--table", action="store_true", help="only write the README of what is there")
    parser.add_argument("--check", nargs="+", metavar="GRID/ROW", help="train these rows again and compare")
    arguments, further = parser.parse_known_args()
    folders = [folder.resolve() for folder in arguments.folders if (folder / "claim.toml").exists()]
    os.chdir(evidence.HERE.parent)  # paths of data in a grid are relative to the repository
    for folder in folders:
        claim = Claim(folder)
        if further and claim.grids:
            parser.error(f"unknown options: {' '.join(further)}")
        if arguments.check:
            return check(claim, arguments.check, arguments.jobs, arguments.device)
        if not arguments.table:
            if claim.grids:
                unknown = [name for name in arguments.grid or [] if name not in claim.grids]
                if unknown:
                    parser.error(f"{claim.name} has the grids {', '.join(claim.grids)}, not {', '.join(unknown)}")
                grow(claim, arguments.jobs, arguments.device, arguments.grid or list(claim.grids))
            else:
                path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
                subprocess.run(["bash", claim.folder / "run.sh", *further], env=os.environ | {"PATH": path}, check=True)
        claim = Claim(claim.folder)  # read again, with the new lines
        (claim.folder / "README.md").write_text(claim.readme())
        print(claim.folder / "README.md")
    return 0


def grow(claim: Claim, jobs: int, device: str, names: list[str]) -> None:
    """Run what is missing of these grids: first the tuning, then the final runs at the chosen rates."""
    prepare(claim)
    lines = list(claim.lines)

    def ended(wanted: Wanted, result: dict) -> None:
        grid, row, lr, _, kind = wanted
        result = {name: value for name, value in result.items() if name != "blocks"}  # they are in `test`
        lines.append({"grid": grid.name, "row": row, "kind": kind, "lr": lr, **result})
        order = {name: i for i, name in enumerate(claim.grids)}
        lines.sort(key=lambda line: (order[line["grid"]], line["kind"], line["row"], line["lr"], line["seed"]))
        evidence.save(claim.folder, lines)

    def missing(wanted: Iterable[Wanted]) -> list[Wanted]:
        there = {(line["grid"], line["row"], line["lr"], line["seed"], line["kind"]) for line in lines}
        return [one for one in wanted if (one[0].name, *one[1:]) not in there]

    train(missing(one for name in names for one in tuning(claim.grids[name])), jobs, ended, device)
    grids = Claim(claim.folder).grids
    train(
        missing(one for name in names for one in finals(grids[name], grids[name].options["rules"])), jobs, ended, device
    )


def prepare(claim: Claim) -> None:
    """Write the data that a grid needs and that is on no hub."""
    for script in {grid.options["prepare"] for grid in claim.grids.values() if "prepare" in grid.options}:
        subprocess.run([sys.executable, claim.folder / script], check=True)


def tuning(grid: Grid) -> list[Wanted]:
    """The runs that choose the learning rates."""
    options = grid.options
    if len(options["rates"]) == 1:
        return []
    names = [name for name in options["rules"] if name not in options.get("tuned_as", {})]
    return [(grid, name, lr, options["tune_seed"], "tuning") for lr in options["rates"] for name in names]


def finals(grid: Grid, names: Iterable[str]) -> list[Wanted]:
    """The runs that the tables show."""
    rates = {name: evidence.Row(grid, name).lr for name in names}
    return [(grid, name, lr, seed, "final") for seed in grid.options["seeds"] for name, lr in rates.items()]


def train(wanted: list[Wanted], jobs: int, ended: Callable[[Wanted, dict], None], device: str) -> None:
    """Train in the worker processes of `layerwise compare`."""
    runs: dict[str, tuple[Wanted, str, GridRun]] = {}
    with tempfile.TemporaryDirectory() as scratch, WorkerPool(jobs, Path(scratch) / "workers.log") as pool:
        for one in wanted:
            grid, row, lr, seed, kind = one
            name = f"{grid.name}-{row}-{kind}-lr{lr:g}-seed{seed}"
            words = [*grid.options["common"], *grid.options["rules"][row]]
            words += [*grid.options["tune" if kind == "tuning" else "final"], "--lr", f"{lr:g}", "--seed", str(seed)]
            words += ["--threads", "1", *([] if device == "auto" else ["--device", device])]
            options = command_line.train_options([*words, "--out", str(Path(scratch) / name)], "train")
            runs[name] = one, " ".join(["layerwise", "train", *words]), GridRun(row, name, options)

        def end(cell: GridRun) -> None:
            one, command, _ = runs[cell.name]
            if cell.result is None:
                print(f"{cell.name}: failed: {(cell.failure or {}).get('reason')}", flush=True)
                return
            result = json.loads((cell.folder / "result.json").read_text())  # all fields, not those of a comparison
            ended(one, result | {"command": command})
            shutil.rmtree(cell.folder)
            metric = evidence.metric_in(result)
            own, val = (result[f"{part}_{metric.name}"] for part in ("test", "val"))
            before = "" if val is None else f"val {metric.written(val)}, "
            print(f"{cell.name}: {before}test {metric.written(own)} in {result['train_seconds']:.0f} s", flush=True)

        if jobs > 1:  # what is decoded or encoded is kept in the cache, so that the workers need not all do it
            for options in {cell.options.data: cell.options for _, _, cell in runs.values()}.values():
                load_data(options)
        grid_runs.train_all([cell for _, _, cell in runs.values()], pool, jobs, ended=end)


def check(claim: Claim, names: list[str], jobs: int, device: str) -> int:
    """Train the final runs of these rows again; return 1 if a figure differs from the stored one."""
    prepare(claim)
    wanted: list[Wanted] = []
    for name in names:
        with contextlib.suppress(KeyError):
            row = claim.row(name)
            wanted += finals(row.grid, [row.name])
            continue
        raise SystemExit(f"{claim.name} has no row {name}; its rows are {', '.join(all_rows(claim))}.")
    differ: list[str] = []

    def ended(one: Wanted, result: dict) -> None:
        grid, name, _, seed, _ = one
        old = next(line for line in grid.rows[name].finals if line["seed"] == seed)
        new = result["test"]
        same = evidence.equal(old["test"], new)
        differ.extend([] if same else [name])
        metric = evidence.metric_in(old)
        before, now = (f"{metric.factor * test[f'head/{metric.name}']:.4f}" for test in (old["test"], new))
        shown = "equal" if same else f"{before} is stored, {evidence.machine_of(old)}"
        print(f"{grid.name}/{name} seed {seed}: {now}, {shown}", flush=True)

    train(wanted, jobs, ended, device)
    return 1 if differ else 0


def all_rows(claim: Claim) -> list[str]:
    """Names of all rows that have results."""
    return [f"{grid.name}/{name}" for grid in claim.grids.values() for name in grid.rows]


if __name__ == "__main__":
    sys.exit(main())
