"""`layerwise compare`: a grid of runs, rules by seeds, that differ in the rule and in nothing else."""

import contextlib
import dataclasses
import json
import re
import shlex
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from layerwise import models, rules
from layerwise.compare.grid_runs import GridRun, train
from layerwise.compare.pool import Pool, default_jobs
from layerwise.compare.tuning import choose, trial_options
from layerwise.errors import LayerwiseError, suggestion
from layerwise.files import kind_of
from layerwise.report.page import write_report
from layerwise.report.summary import BASELINE, as_csv, result_row, summarise, table
from layerwise.runs.arguments import train_options
from layerwise.runs.building import pick_device
from layerwise.runs.checkpoint import write_atomically
from layerwise.runs.environment import environment
from layerwise.runs.folders import FREE, claimed, grid_run_folder
from layerwise.runs.options import TrainOptions, from_mapping, model_name, to_mapping
from layerwise.runs.progress import GridProgress
from layerwise.runs.records import read_json

RIVALS = ("sll", "sid", "local_ce", "backprop", "backprop_checkpoint")
PATIENCE = 10  # seconds: workers of a comparison that was killed live on for a moment, and hold its folder
NEVER = 10**9  # no checkpoint before the last step: a run that was cut short begins again
PER_RULE = (
    "lr",
    "weight_decay",
    "optimizer",
    "schedule",
    "warmup",
    "clip",
    "label_smoothing",
    "nonfinite",
    "cuts",
    "blocks",
)
"""Options of a run that may differ between rules, beside those of the model: they change neither data nor budget."""
TUNE_SEED = 10_000
"""Seed of the trials; not one that counts."""


@dataclass(frozen=True)
class CompareOptions(TrainOptions):
    """Compare learning rules: the same data order, initial weights and budget for each, over several seeds.

    Repeat the command to go on after a crash: finished runs stay, a half-written one is run again.
    """

    rules: tuple[str, ...] = RIVALS
    """Rules, with options behind colons: sll sll:overlap=1:lr=2e-3 backprop; several numbers as weight=0/1; an
    option of the model as backprop:model.depth=2; or all."""
    seeds: int = 3
    """Number of seeds: 0, 1, ..."""
    budget: Literal["epochs", "steps", "seconds", "flops"] | None = None
    """What every run may use; its amount is --epochs, --steps, --seconds or --flops."""
    seconds: float | None = None
    """Seconds of training per run, turned into steps by a measurement before the first run."""
    flops: float | None = None
    """Floating-point operations of training per run, turned into steps likewise."""
    tune: int = 0
    """Trials of learning rate and weight decay per rule, chosen on the validation split; 0 for none."""
    jobs: int | None = None
    """Runs at the same time; as many as cores and memory allow if not given."""
    report: bool = True
    """Diagnose the finished runs and write report.html."""


def read_rules(words: Sequence[str], common: TrainOptions) -> dict[str, TrainOptions]:
    """Options of a run per rule asked for.

    Args:
        words: `name` or `name:option=value:...`, several in one word with commas between. An option is a field of the
            rule, one of `PER_RULE`, or `model.` and a field of the model; a value is a number, a word, `none`,
            `true`, `false`, or numbers with `/` between. `all` stands for every rule that trains the model, with its
            default options.
        common: the options that all have in common.

    Raises:
        LayerwiseError: an unknown rule or option, a value of the wrong kind, a rule that is asked for twice.

    >>> read_rules(["sll:overlap=1:lr=0.01,backprop"], TrainOptions())["sll:overlap=1:lr=0.01"].rule.overlap
    1
    """
    found: dict[str, TrainOptions] = {}
    every = [name for name in rules.names() if model_name(common.model) in (rules.get(name).models or models.names())]
    labels = [part for word in words for part in word.split(",") if part]
    for label in (name for part in labels for name in (every if part == "all" else [part])):
        name, *settings = label.split(":")
        values = _plain(common) | {"rule": {"name": name}}
        legal = {field: (values["rule"], field, hint) for field, hint in _fields(rules.get(name)).items()}
        legal |= {field: (values, field, hint) for field, hint in _fields(TrainOptions).items() if field in PER_RULE}
        for field, hint in _fields(type(common.model)).items():
            legal[f"model.{field}"] = values["model"], field, hint
        for setting in settings:
            option, equals, text = setting.partition("=")
            if not equals:
                raise LayerwiseError(f"--rules {label}: write {option}=VALUE behind the colon.")
            option = option.replace("-", "_")
            if option not in legal:
                raise LayerwiseError(f"--rules {label}: no option {option!r}; {suggestion(option, list(legal))}.")
            place, field, hint = legal[option]
            place[field] = _value(text, hint)
        if label in found:
            raise LayerwiseError(f"--rules names {label} twice; leave one out, or give them different options.")
        found[label] = from_mapping(values, f"--rules {label}")
    if not found:
        raise LayerwiseError("--rules is empty; name at least one rule, see layerwise ls rules.")
    return found


def _fields(cls: type) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _plain(options: TrainOptions) -> dict[str, Any]:
    """The fields of a run, without what a comparison adds."""
    values = to_mapping(options)
    return {f.name: values[f.name] for f in dataclasses.fields(TrainOptions)}


def _value(text: str, hint: Any) -> Any:
    """A value out of a word: a number where the option takes one."""
    if "/" in text:
        return tuple(_value(part, hint) for part in text.split("/"))
    if text in ("none", "None"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if hint is not str:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def budget_of(options: CompareOptions) -> str:
    """The kind of budget, told by `--budget` or by the amount that is given.

    Raises:
        LayerwiseError: no amount, two amounts, or one that is not positive.
    """
    given = [name for name in ("steps", "seconds", "flops") if getattr(options, name) is not None]
    kind = options.budget or (given[0] if given else "epochs")
    if kind != "epochs" and kind not in given:
        raise LayerwiseError(f"--budget {kind} needs its amount: give --{kind} too.")
    for name in given:
        if name != kind:
            raise LayerwiseError(f"the budget is in {kind}, so --{name} cannot be given as well; leave one out.")
        if not getattr(options, name) > 0:
            raise LayerwiseError(f"--{name} is {getattr(options, name)}; it must be larger than 0.")
    return kind


class Grid:
    """A comparison in its folder.

    Args:
        options: what to compare.
        command: the command line, for the record.

    Raises:
        LayerwiseError: a mistake in the options. Nothing is written then.
    """

    def __init__(self, options: CompareOptions, command: str = ""):
        self.options, self.command = options, command
        for name, least in (("seeds", 1), ("tune", 0), ("jobs", 1)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise LayerwiseError(f"{name} is {value}; it must be {least} or more.")
        if options.tune and options.val_fraction == 0:
            raise LayerwiseError("--tune chooses on the validation split, and --val-fraction is 0; give it a share.")
        self.accelerator = pick_device(options.device).type != "cpu"
        self.budget = budget_of(options)
        threads = options.threads or 1
        self.rules = read_rules(options.rules, replace(options, threads=threads, out=None, save_every=NEVER))
        base = f"runs/compare-{options.data.replace('/', '_').replace(':', '_')}-{model_name(options.model)}"
        self.folder = Path(options.out or base)
        self.plan: dict[str, dict[str, Any]] = {}
        """Per rule what a step of it costs, or why that could not be measured."""
        self.chosen: dict[str, TrainOptions | None] = {}
        """Per rule the options of its runs; None where every trial failed."""

    def run(self) -> dict[str, Any]:
        """Run what is not finished yet, and write the tables and the report.

        Returns:
            The contents of `summary.json`.

        Raises:
            LayerwiseError: a mistake that the rule, the model or the data refuses (nothing is written then), or a
                folder that holds something else.
        """
        log = self.folder / "workers.log"
        with claimed(self.folder, PATIENCE, "comparison") as held, _gone_if_empty(log), Pool(1, log, held) as pool:
            self._check_folder()
            self._measure(pool)
            self._write_record()
            cells = [cell for label in self.rules for cell in self._trials(label)]
            runs = len(cells) + self.options.seeds * len(self.rules)
            work = sum(map(self._cost, cells)) + self.options.seeds * sum(map(self._label_cost, self.rules))
            with GridProgress(work, runs, f"comparison of {len(self.rules)} rules · {self.folder}") as progress:
                self._train(pool, cells, progress)
                self.chosen = {label: self._choose(label) for label in self.rules}
                finals = self.finals()
                self._train(pool, [cell for cell in finals if cell is not None], progress)
            if self.options.report:
                self._diagnose(pool, [cell for cell in finals if cell is not None])
        return self._write()

    def finals(self) -> list[GridRun | None]:
        """The runs that count, seed by seed; None where every trial of the rule failed."""
        found = []
        for seed in range(self.options.seeds):
            for label, options in self.chosen.items():
                found.append(None if options is None else self._cell(label, f"seed {seed}", seed, "runs", options))
        return found

    def _cell(self, label: str, what: str, seed: int, part: str, options: TrainOptions) -> GridRun:
        folder = self.folder / grid_run_folder(label, what, part)
        return GridRun(label, f"{label} {what}", replace(options, seed=seed, out=str(folder)))

    def _trials(self, label: str) -> list[GridRun]:
        """The trials of a rule: a list that is the same for every rule, around the rule's own rate and decay."""
        listed = trial_options(self._budgeted(label), self.options.tune)
        return [self._cell(label, f"trial {i}", TUNE_SEED, "trials", options) for i, options in enumerate(listed)]

    def _choose(self, label: str) -> TrainOptions | None:
        trials = self._trials(label)
        if not trials:
            return self._budgeted(label)
        best = choose([cell.result for cell in trials])
        return None if best is None else trials[best].options

    def _budgeted(self, label: str) -> TrainOptions:
        options = self.rules[label]
        if self.budget in ("epochs", "steps"):
            return options
        per_step = self.plan[label].get(f"{self.budget}_per_step")
        # A rule that could not be measured fails in its own run, whatever the number of steps.
        return replace(options, steps=max(1, int(getattr(self.options, self.budget) / per_step)) if per_step else 1)

    def _check_folder(self) -> None:
        """Refuse a folder that is not ours, or holds a comparison with other options."""
        record = self.folder / "compare.json"
        if kind_of(record) is None:
            if {path.name for path in self.folder.iterdir()} - {"workers.log", "compare.json.partial"}:
                raise LayerwiseError(f"{self.folder} is not empty and holds no comparison; choose another --out.")
            return
        before = read_json(record, "choose another --out", {"fixed": dict, "plan": dict[str, dict[str, float]]})
        for name, value in json.loads(json.dumps(self._fixed())).items():
            if before["fixed"].get(name) != value:
                raise LayerwiseError(
                    f"{self.folder} holds a comparison with {name} = {json.dumps(before['fixed'].get(name))}, not "
                    f"{json.dumps(value)}; put it back, or choose another --out."
                )
        self.plan = before["plan"]

    def _fixed(self) -> dict[str, Any]:
        """What must stay the same when the command is repeated; rules and seeds may be added."""
        common = {name: value for name, value in _plain(self.options).items() if name not in (*FREE, "rule", "seed")}
        return (
            common
            | {"budget": self.budget, "tune": self.options.tune}
            | {name: getattr(self.options, name) for name in ("seconds", "flops")}
        )

    def _measure(self, pool: Pool) -> None:
        """What a step of every rule costs, measured alone and once: for budgets, number of jobs and time left."""
        missing = [label for label in self.rules if label not in self.plan]

        def done(task: dict[str, Any], answer: dict[str, Any]) -> None:
            if answer.get("kind") == "mistake":
                raise LayerwiseError(answer["reason"])
            self.plan[task["label"]] = answer.get("done", answer)

        tasks = [{"do": "measure", "label": label, "options": to_mapping(self.rules[label])} for label in missing]
        pool.run(tasks, done, jobs=1)

    def _write_record(self) -> None:
        measured = {label: plan for label, plan in self.plan.items() if "kind" not in plan}
        record = {
            "command": self.command,
            "rules": list(self.rules),
            "seeds": self.options.seeds,
            "fixed": self._fixed(),
            "plan": measured,
        }
        write_atomically(self.folder / "compare.json", json.dumps(record, indent=2) + "\n")
        write_atomically(self.folder / "environment.json", json.dumps(environment(), indent=2) + "\n")

    def _label_cost(self, label: str) -> float:
        options, plan = self._budgeted(label), self.plan[label]
        if "seconds_per_step" not in plan:
            return 1.0
        return 0.5 + plan["seconds_per_step"] * (options.steps or options.epochs * plan["steps_per_epoch"])

    def _cost(self, cell: GridRun) -> float:
        """Seconds that the cell should take; only their ratios matter."""
        return self._label_cost(cell.label)

    def _jobs(self, tasks: int) -> int:
        if self.options.jobs is not None:
            return self.options.jobs
        peak = max(plan.get("peak_bytes", 0) for plan in self.plan.values())
        return default_jobs(tasks, peak, threads=self.options.threads or 1, accelerator=self.accelerator)

    def _train(self, pool: Pool, cells: list[GridRun], progress: GridProgress) -> None:
        for cell in cells:
            if cell.settled:
                progress.skipped(self._cost(cell))
        steps = {cell.name: self._steps(cell) for cell in cells}
        train(
            cells,
            pool,
            self._jobs(len(cells)),
            begun=lambda cell: progress.begun(
                cell.name, self._cost(cell), lambda: min(1.0, cell.last_step() / steps[cell.name])
            ),
            ended=lambda cell: progress.ended(cell.name, in_words(cell)),
        )

    def _steps(self, cell: GridRun) -> int:
        plan = self.plan[cell.label]
        return cell.options.steps or cell.options.epochs * plan.get("steps_per_epoch", 1)

    def _diagnose(self, pool: Pool, cells: list[GridRun]) -> None:
        """Diagnose every finished run beside the backprop run of its seed."""
        twins = {cell.options.seed: cell for cell in cells if cell.label == BASELINE and cell.result}
        tasks = []
        for cell in cells:
            twin = twins.get(cell.options.seed)
            if cell.result and not cell.read("diagnostics.json"):
                paths = {"folder": str(cell.folder), "twin": str(twin.folder) if twin else None}
                tasks.append({"do": "diagnose", "device": self.options.device, **paths})
        failed: list[str] = []
        pool.run(tasks, lambda task, answer: failed.extend([answer["reason"]] if "kind" in answer else []))
        for reason in failed:
            print(f"layerwise: note: a run could not be diagnosed: {reason}", file=sys.stderr)

    def _write(self) -> dict[str, Any]:
        """results.csv and summary.json of everything that is there."""
        rows = []
        for label in self.rules:
            for seed in range(self.options.seeds):
                options = self.chosen[label]
                cell = None if options is None else self._cell(label, f"seed {seed}", seed, "runs", options)
                if cell is None:
                    reason = f"every trial failed, the first: {(self._trials(label)[0].failure or {})['reason']}"
                    rows.append(result_row(label, seed, None, None, reason))
                else:
                    reason = (cell.failure or {}).get("reason", "")
                    rows.append(result_row(label, seed, options, cell.result, reason))
        write_atomically(self.folder / "results.csv", as_csv(rows))
        summary = {"command": self.command, "budget": self.budget, "rules": summarise(rows)}
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


@contextlib.contextmanager
def _gone_if_empty(file: Path) -> Iterator[None]:
    """Remove a file at the end where nothing was written into it."""
    try:
        yield
    finally:
        if file.exists() and not file.stat().st_size:
            file.unlink()


def in_words(cell: GridRun) -> str:
    """What became of a cell, in one line."""
    found = cell.result
    if found is None:
        return f"{cell.name}: failed: {(cell.failure or {}).get('reason', 'unknown')}"
    val = "" if found["val_accuracy"] is None else f"val {100 * found['val_accuracy']:.2f} %, "
    return f"{cell.name}: {val}test {100 * found['test_accuracy']:.2f} % in {found['train_seconds']:.1f} s"


def command(argv: list[str]) -> int:
    """`layerwise compare`: 0 when every run succeeded, 1 when one failed."""
    for word in argv:
        if re.match(r"--rule($|[=.])", word):
            raise LayerwiseError(
                f"compare has no {word.partition('=')[0]}; rules and their options stand behind --rules, such as "
                "--rules sll:overlap=1 backprop."
            )
    options = train_options(argv, "compare", base=CompareOptions, hidden=("rule", "seed", "overwrite", "save_every"))
    grid = Grid(options, shlex.join(["layerwise", "compare", *argv]))
    summary = grid.run()
    print(table(summary["rules"]))
    print(f"files: {grid.folder}")
    if options.report:
        try:
            print(f"report: {write_report(grid.folder)}")
        except LayerwiseError as reason:  # the runs and the tables are there all the same
            print(f"layerwise: note: {reason}", file=sys.stderr)
    return int(any(found["failed"] for found in summary["rules"].values()))
