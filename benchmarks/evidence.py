"""Reads the folders of `benchmarks/` as rows, and writes them as tables.

A folder is a claim. `claim.toml` has the question, the answer and, where the evidence is a grid of training runs, the
grids. `results.jsonl` has one line per run or measurement, complete in itself: figures, options, machine, commit,
versions. A folder whose evidence is not a grid has its own `table.py`. `README.md` is written from all of them.

A shell script stores a measurement with:

    python benchmarks/evidence.py keep FOLDER NAME FILE.json [--command "..."]
"""

import argparse
import importlib.util
import json
import math
import re
import statistics
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machines import environments, machine_of, recorded_by  # noqa: F401
from writing import options_text, spread, table, wrapped

from layerwise.core.tasks import ACCURACY, Metric, metric_of

HERE = Path(__file__).parent
EDGE = "**edge**"
MARK = "†"
MARKED = "† marks a learning rate at the end of its grid, where a wider grid may give more."
BESIDE = ("lr=", "seed=", "threads=", "device=", "data=")
"""Options of a run that do not belong to its row; a folder of data may have been renamed."""
LEGEND = (
    "Test accuracy is that of the last weights: mean ± standard deviation over n seeds. *By block* is the accuracy of "
    "each block's own readout, the head last. Memory is exact, in MiB. Seconds are those of training with one thread "
    "on a shared machine, so they are rough. The learning rate of a row was chosen on the validation split with one "
    f"seed, unless its cell says otherwise. {EDGE} marks a rate at the end of its grid, where a wider grid may serve "
    "that row better; with two rates every choice is an edge."
)
DESCENT = (
    "Descent is the share of test samples whose local objective is no larger than before the module, mean over modules."
)
NOT_RUN = "This folder has the settings of a comparison and no results, so it answers nothing, and no page draws on it."
WRITTEN = "<!-- written by benchmarks/run.py; do not edit -->"


# Results, one line each


def load(folder: Path) -> list[dict[str, Any]]:
    """The lines of `results.jsonl`."""
    file = folder / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def save(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write `results.jsonl`, whole or not at all; bytes have most digits, curves fewest."""
    partial = folder / "results.jsonl.partial"
    fewer = {"test": 9, "by_epoch": 5}
    kept = [short(line) | {name: short(line[name], n) for name, n in fewer.items() if name in line} for line in lines]
    partial.write_text("".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n" for line in kept))
    partial.rename(folder / "results.jsonl")


def short(value: Any, digits: int = 12) -> Any:
    """The value with its floats rounded to a number of significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: short(part, digits) for name, part in value.items()}
    return [short(part, digits) for part in value] if isinstance(value, list | tuple) else value


def equal(a: Any, b: Any) -> bool:
    """Whether two values, or dictionaries of values, are the same to eight digits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-8) or (math.isnan(a) and math.isnan(b))
    return a == b


def keep(folder: Path, name: str, found: Any, command: str, packages: Sequence[str] = ()) -> None:
    """Store a measurement under its name, with the machine that made it and the versions of these packages."""
    from layerwise.runs.environment import machine

    found = {"rows": found} if isinstance(found, list) else dict(found)
    here = found.pop("environment", None) or machine()
    here = {key: value for key, value in here.items() if key != "packages"}
    if packages:
        here["packages"] = {package: version(package) for package in packages}
    found.setdefault("machines", [here])
    line = {"name": name, **found, "command": command or found.get("command", "")}
    lines = [old for old in load(folder) if old["name"] != name]
    save(folder, sorted([*lines, line], key=lambda line: line["name"]))


def metric_in(line: dict[str, Any]) -> Metric:
    """The metric by which a run is compared; accuracy for a run that stores none."""
    return metric_of(line.get("task", "classification")) if line.get("metric") else ACCURACY


# Claims


@dataclass(frozen=True)
class Row:
    """One row of a grid: a rule with its options, over the seeds."""

    grid: "Grid"
    name: str

    @property
    def words(self) -> list[str]:
        """The words of the command line that are this row's own."""
        return self.grid.options["rules"][self.name]

    @property
    def rule(self) -> str:
        """The name of the rule."""
        return self.words[self.words.index("--rule") + 1]

    @property
    def text(self) -> str:
        """The options that distinguish the row."""
        return options_text(self.words)

    @property
    def tuned_as(self) -> str:
        """The row whose learning rate this one has."""
        return self.grid.options.get("tuned_as", {}).get(self.name, self.name)

    @property
    def lr(self) -> float:
        """The learning rate with the best accuracy (or other metric) on the validation split."""
        best = min(self.scores, key=lambda lr: self.metric.better_first(self.scores[lr]), default=None)
        return self.grid.options["rates"][0] if best is None else best

    @property
    def metric(self) -> Metric:
        """The metric by which its runs are compared."""
        return metric_in(next((line for line in self.grid.lines if line["row"] == self.name), {}))

    @cached_property
    def scores(self) -> dict[float, float]:
        """Learning rate to accuracy (or other metric) on the validation split, in the order of the grid."""
        key = f"val_{self.metric.name}"
        lines = [line for line in self.grid.lines if (line["row"], line["kind"]) == (self.tuned_as, "tuning")]
        return {lr: line[key] for lr in self.grid.options["rates"] for line in lines if line["lr"] == lr}

    @property
    def lr_text(self) -> str:
        """The learning rate, how it was chosen, and whether it is at the edge of its grid."""
        rates, chosen = self.grid.options["rates"], []
        if self.tuned_as != self.name:
            chosen.append(f"that of `{self.tuned_as}`")
        if len(rates) == 1:
            chosen.append("not tuned")
        elif self.lr in (min(rates), max(rates)):
            chosen.append(f"{EDGE}, {'lowest' if self.lr == min(rates) else 'highest'} of {len(rates)}")
        else:
            chosen.append(f"inside {len(rates)}")
        if ties := [f"{lr:g}" for lr, score in self.scores.items() if lr != self.lr and self.tied(score)]:
            chosen.append(f"tied with {', '.join(ties)}")
        return f"{self.lr:g} ({'; '.join(chosen)})"

    def tied(self, score: float) -> bool:
        """Whether a score on the validation split is the best one too; means of floats differ in their last digits."""
        return abs(score - self.scores[self.lr]) < 1e-6

    @cached_property
    def finals(self) -> list[dict[str, Any]]:
        """The final runs at that rate, seed by seed."""
        wanted = (self.name, "final", self.lr)
        found = {line["seed"]: line for line in self.grid.lines if (line["row"], line["kind"], line["lr"]) == wanted}
        return [found[seed] for seed in self.grid.options["seeds"] if seed in found]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy in %, or the metric of another task, seed by seed."""
        return [self.metric.factor * line[f"test_{self.metric.name}"] for line in self.finals]

    @property
    def accuracy(self) -> str:
        """Mean and standard deviation of the test accuracy, or of the metric of another task."""
        small = max(map(abs, self.accuracies), default=0) < 10  # such as bits per byte
        return spread(self.accuracies, digits=2 if self.metric.share else 3 if small else 1)

    @property
    def figure(self) -> str:
        """The same with its name and unit, for a table of several metrics."""
        if self.metric == ACCURACY or not self.accuracy:
            return self.accuracy
        return f"{self.metric.words} {self.accuracy}" + (" %" if self.metric.share else "")

    @property
    def changed(self) -> str:
        """A sentence on options of the stored runs that are not those of the row today; empty if there are none."""
        words = [*self.grid.options["common"], *self.words, *self.grid.options["final"]]
        now = set(options_text(words).split())
        for line in self.finals:
            given = line["command"].partition(" train ")[2]
            before = {word for word in options_text(given.split()).split() if not word.startswith(BESIDE)}
            if more := sorted(before - now):
                return f"The stored runs of `{self.name}` had further options: `{' '.join(more)}`."
        return ""

    def cells(self) -> dict[str, str]:
        """Column to cell."""
        first, memory = self.finals[0], self.finals[0]["memory_mib"]
        blocks = [name for name in first["test"] if name.endswith(f"/{self.metric.name}")]
        descents = [v for line in self.finals for name, v in line["test"].items() if name.endswith("/descent")]
        return {
            "row": f"`{self.name}`",
            "rule": f"`{self.rule}`",
            "options": f"`{self.text}`" if self.text else "",
            "learning rate": self.lr_text,
            "n": str(len(self.finals)),
            f"test {self.metric.title}": self.accuracy,
            "by block, %" if self.metric.share else "by block": " ".join(
                f"{self.metric.factor * statistics.mean(line['test'][block] for line in self.finals):.1f}"
                for block in blocks
            ),
            "act. + grad.": f"{memory['activations'] + memory['gradients']:.1f}",
            "peak": f"{memory['peak']:.1f}",
            "seconds": f"{statistics.mean(line['train_seconds'] for line in self.finals):.0f}",
            "descent, %": f"{100 * statistics.mean(descents):.0f}" if descents else "",
        }


@dataclass(frozen=True)
class Grid:
    """Rules on one task, each over the same learning rates and seeds."""

    name: str
    options: dict[str, Any]
    lines: list[dict[str, Any]] = field(repr=False)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The rows that have a finished run."""
        rows = {name: Row(self, name) for name in self.options["rules"]}
        return {name: row for name, row in rows.items() if row.finals}

    def setting(self) -> list[str]:
        """Title, question and options of the grid, as in its folder's README."""
        options = self.options
        rates = ", ".join(f"{lr:g}" for lr in options["rates"])
        how = f"Common options: `{' '.join(options['common'] + options['final'])}`."
        if len(options["rates"]) == 1:
            how += f" One learning rate for all rows, {rates}."
        else:
            words = f" and `{' '.join(options['tune'])}`" if options["tune"] else ""
            how += f" Learning rates {rates}, chosen with seed {options['tune_seed']}{words}."
        return [f"## {options['title']}", "", *wrapped(options["about"]), "", *wrapped(how), ""]

    def text(self) -> list[str]:
        """The section of the grid in its folder's README."""
        options = self.options
        rows = [row.cells() for row in self.rows.values()]
        notes = [note for row in self.rows.values() if (note := row.changed)]
        processors = {machine_of(line).partition(",")[0] for row in self.rows.values() for line in row.finals}
        if len(processors) > 1:
            notes.append(
                "The rows come from different machines (see the environment below): their seconds do not compare, and "
                "another processor rounds otherwise, so that accuracies may differ a little."
            )
        columns = [name for name in (rows[0] if rows else ()) if name != "descent, %" or options.get("descent")]
        lines = self.setting()
        if missing := [name for name in options["rules"] if name not in self.rows]:
            lines += [f"Rows without a finished run: {', '.join(missing)}.", ""]
        lines += table(columns, [[row[name] for name in columns] for row in rows])
        return [*lines, *(line for note in notes for line in ["", *wrapped(note)])]


@dataclass(frozen=True)
class Claim:
    """A folder of `benchmarks/`."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @cached_property
    def toml(self) -> dict[str, Any]:
        """Contents of `claim.toml`."""
        return tomllib.loads((self.folder / "claim.toml").read_text())

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The results."""
        return load(self.folder)

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grids; none if the folder has its own script. `like` copies what a grid does not set."""
        found: dict[str, Grid] = {}
        for name, options in self.toml.get("grid", {}).items():
            base = found[options["like"]].options if "like" in options else {}
            lines = [line for line in self.lines if line["grid"] == name]
            found[name] = Grid(name, base | options, lines)
        return found

    @cached_property
    def script(self) -> Any:
        """The module `table.py` of a folder without grids."""
        spec = importlib.util.spec_from_file_location(f"{self.name}.table", self.folder / "table.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def row(self, name: str) -> Row:
        """The row that is called `grid/row`."""
        grid, _, row = name.partition("/")
        return self.grids[grid].rows[row]

    @property
    def command(self) -> str:
        """The command that makes the results."""
        return self.toml.get("command", f"python benchmarks/run.py benchmarks/{self.name}")

    @property
    def answer(self) -> str:
        """The answer, with its figures filled in: `{grid/row}`, `{grid/row - grid/row}`, or a script's `{name}`.

        A figure whose learning rate is at the edge of its grid is marked.
        """

        def figure(found: re.Match[str]) -> str:
            if not self.grids:
                return self.script.figures(self.lines)[found[1]]
            rows = [self.row(name) for name in found[1].split(" - ")]
            means = [statistics.mean(row.accuracies) for row in rows]
            text = rows[0].accuracy if len(rows) == 1 else f"{means[0] - means[1]:.1f}"
            return text + (MARK if any(EDGE in row.lr_text for row in rows) else "")

        return re.sub(r"\{([^}]+)\}", figure, self.toml["answer"])

    def small(self) -> list[str]:
        """The few rows that support the answer."""
        if not self.grids:
            return self.script.small(self.lines)
        rows = [self.row(name) for name in self.toml["shown"]]
        head = ["task", "rule", "options", title_of(rows), "n", "learning rate"]
        body = []
        for row in rows:
            cells = row.cells() | {head[3]: row.figure}
            body.append([row.grid.options.get("task", row.grid.options["title"]), *(cells[name] for name in head[1:])])
        return table(head, body)

    def readme(self) -> str:
        """The folder's README: question, answer, tables, environment, command."""
        if not self.lines:
            return self.plan()
        lines = [f"# {self.toml['question']}", "", *wrapped(self.answer), ""]
        if MARK in self.answer:
            lines += [*wrapped(MARKED), ""]
        if self.toml.get("about"):
            lines += [*wrapped(self.toml["about"]), ""]
        if self.grids:
            for grid in self.grids.values():
                lines += [*grid.text(), ""]
            legend = LEGEND + (
                f" {DESCENT}" if any(grid.options.get("descent") for grid in self.grids.values()) else ""
            )
            lines += ["## How to read the tables", "", *wrapped(legend), ""]
            machines = environments(self.lines, lambda line: f"{line['grid']}/{line['row']}")
        else:
            lines += [*self.script.tables(self.lines), ""]
            machines = environments(self.lines, lambda line: line["name"])
        lines += ["## Environment", "", *machines, "", "## Command", "", "```sh", self.command, "```", ""]
        if self.grids:
            grid = next(iter(self.grids.values()))
            row = next(iter(grid.rows), next(iter(grid.options["rules"])))
            lines += [
                "Finished runs are kept, so that the command can be stopped and repeated. One row again, compared with",
                "what is stored:",
                "",
                "```sh",
                f"python benchmarks/run.py benchmarks/{self.name} --check {grid.name}/{row}",
                "```",
                "",
            ]
        what = (
            "Each line of `results.jsonl` is a run" if self.grids else "Each line of `results.jsonl` is a measurement"
        )
        lines += [f"{what}: figures, options or command, machine. `claim.toml` has the settings.", ""]
        return "\n".join([*lines, WRITTEN, ""])

    def plan(self) -> str:
        """The README of a folder without results: the question, what is to be run, and the command."""
        lines = [f"# {self.toml['question']}", "", *wrapped(f"**Not run yet.** {NOT_RUN}"), ""]
        for grid in self.grids.values():
            rules = ", ".join(f"`{name}`" for name in grid.options["rules"])
            lines += [*grid.setting(), *wrapped(f"Rows: {rules}."), ""]
        return "\n".join([*lines, "## Command", "", "```sh", self.command, "```", "", WRITTEN, ""])


def title_of(rows: Iterable[Row]) -> str:
    """Head of the column of figures."""
    return "test accuracy, %" if all(row.metric == ACCURACY for row in rows) else "test accuracy, %, or as it says"


def claims(here: Path = HERE) -> list[Claim]:
    """All folders with results, in the order in which they are listed."""
    return [claim for claim in _folders(here) if claim.lines]


def planned(here: Path = HERE) -> list[Claim]:
    """All folders without results: their grids have not been run."""
    return [claim for claim in _folders(here) if not claim.lines]


def _folders(here: Path) -> list[Claim]:
    found = [Claim(file.parent) for file in here.glob("*/claim.toml")]
    return sorted(found, key=lambda claim: (claim.toml.get("place", 99), claim.name))


def main() -> None:
    """Store a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["keep"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--command", default="", help="what gave it, where the file does not say so")
    parser.add_argument("--packages", nargs="+", default=[], help="further packages whose versions matter")
    given = parser.parse_args()
    keep(given.folder, given.name, json.loads(given.file.read_text()), given.command, given.packages)


if __name__ == "__main__":
    main()
