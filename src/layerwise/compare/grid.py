"""`layerwise compare`: a grid of runs, rules by seeds, that differ only in the rule."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from layerwise.compare.depth import depths_asked, depths_of
from layerwise.compare.grid_runs import GridRun, discard_damaged, train_all
from layerwise.compare.peak import changed
from layerwise.compare.pool import WorkerPool, default_jobs
from layerwise.compare.record import kept_plan, write_record, write_results
from layerwise.compare.rules_asked import plain_fields, read_rules, settled_by
from layerwise.compare.settings import RIVALS, ComparisonSettings
from layerwise.compare.tuning import choose, trial_options
from layerwise.core.devices import pick_device
from layerwise.core.tasks import metric_of
from layerwise.errors import LayerwiseError, note
from layerwise.files import MissingFile, shown
from layerwise.memory.fitting import read_size
from layerwise.records import damaged
from layerwise.report.diagnosed import read_diagnosed
from layerwise.report.reading import read_correct
from layerwise.report.summary import BASELINE, result_row, unreached_row
from layerwise.runs.folders import FREE, claimed
from layerwise.runs.layout import grid_run_folder
from layerwise.runs.options import TrainOptions, run_name, to_mapping
from layerwise.runs.progress import GridProgress

PATIENCE = 10  # seconds: workers of a killed comparison run for a moment longer, and hold its folder
NEVER = 10**9  # no checkpoint before the last step: an interrupted run starts again
TUNE_SEED = 10_000
"""Seed of the trials, different from those of the runs."""


@dataclass(frozen=True)
class CompareOptions(ComparisonSettings, TrainOptions):
    """Compare learning rules: the same data order, initial weights and budget for each, over several seeds.

    Repeat the command to continue after a crash: finished runs stay, and a half-written run is run again.
    """


def budget_of(options: CompareOptions) -> str:
    """The kind of budget, from `--budget` or from the amount that is given.

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
        LayerwiseError: a mistake in the options. In that case nothing is written.
    """

    def __init__(self, options: CompareOptions, command: str = ""):
        self.options, self.command = options, command
        for name, least in (("seeds", 1), ("tune", 0), ("jobs", 1)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise LayerwiseError(f"{name} is {value}; it must be {least} or more.")
        if options.tune and options.val_fraction == 0:
            raise LayerwiseError("--tune chooses on the validation split, and --val-fraction is 0; give it a share.")
        self.depths = depths_asked(options.depths)
        self.metric = metric_of(options.task)
        self.accelerator = pick_device(options.device).type != "cpu"
        self.budget = budget_of(options)
        threads = options.threads or 1
        common = replace(options, threads=threads, out=None, save_every=NEVER, peak=None)
        self.rules = read_rules(options.rules, common)
        check_folders(list(self.rules))
        self.baseline = read_rules((BASELINE,), replace(common, micro=1))[BASELINE]
        """Plain backpropagation, against which settings under a peak are timed."""
        self.unreached: set[str] = set()
        """Rules that cannot be brought under the peak; they are not trained."""
        words = () if options.rules == RIVALS else options.rules
        self.asked = {part for word in words for part in word.split(",")}
        """Rules that the user has named; others are left out if they do not train this model."""
        base = f"runs/compare-{run_name(options)}"
        self.folder = Path(options.out or base)
        self.plan: dict[str, dict[str, Any]] = {}
        """The cost of a step of each rule, or why it could not be measured."""
        self.chosen: dict[str, TrainOptions | None] = {}
        """The options of each rule's runs; None if every trial failed."""

    def run(self) -> dict[str, Any]:
        """Train the runs that are not finished, diagnose them, and write the tables.

        Returns:
            The contents of `summary.json`.

        Raises:
            LayerwiseError: the rule, the model or the data refuses an option (then nothing is written), or the folder
                holds something else.
        """
        log = self.folder / "workers.log"
        with (
            claimed(self.folder, PATIENCE, "comparison") as lock,
            _gone_if_empty(log),
            WorkerPool(1, log, lock) as pool,
        ):
            self.plan = kept_plan(self.folder, self._fixed())
            self._measure(pool)
            self._bring_under(pool)
            write_record(self.folder, self.command, list(self.rules), self.options.seeds, self._fixed(), self.plan)
            trained = [label for label in self.rules if label not in self.unreached]
            grid_runs = [run for label in trained for run in self._trials(label)]
            runs = len(grid_runs) + self.options.seeds * len(trained)
            work = sum(map(self._cost, grid_runs)) + self.options.seeds * sum(map(self._label_cost, trained))
            with GridProgress(work, runs, f"comparison of {len(self.rules)} rules · {self.folder}") as progress:
                self._train(pool, grid_runs, progress)
                self.chosen = {label: self._choose(label) for label in trained}
                finals = self.finals()
                self._train(pool, [run for run in finals if run is not None], progress)
            self._measure_deeper(pool)
            write_record(self.folder, self.command, list(self.rules), self.options.seeds, self._fixed(), self.plan)
            if self.options.report and self.options.task == "classification":  # probes are of classes
                self._diagnose(pool, [run for run in finals if run is not None])
        return self._write()

    def finals(self) -> list[GridRun | None]:
        """The runs of the comparison, seed by seed; None if every trial of the rule failed."""
        found = []
        for seed in range(self.options.seeds):
            for label, options in self.chosen.items():
                found.append(None if options is None else self._grid_run(label, f"seed {seed}", seed, "runs", options))
        return found

    def _grid_run(self, label: str, what: str, seed: int, part: str, options: TrainOptions) -> GridRun:
        folder = self.folder / grid_run_folder(label, what, part)
        return GridRun(label, f"{label} {what}", replace(options, seed=seed, out=str(folder)))

    def _trials(self, label: str) -> list[GridRun]:
        """The trials of a rule: the same list for every rule, around the rule's own rate and decay."""
        listed = trial_options(self._budgeted(label), self.options.tune)
        return [self._grid_run(label, f"trial {i}", TUNE_SEED, "trials", options) for i, options in enumerate(listed)]

    def _choose(self, label: str) -> TrainOptions | None:
        trials = self._trials(label)
        if not trials:
            return self._budgeted(label)
        best = choose([run.result for run in trials], self.metric)
        return None if best is None else trials[best].options

    def _budgeted(self, label: str) -> TrainOptions:
        options = self.rules[label]
        if self.budget in ("epochs", "steps"):
            return options
        per_step = self.plan[label].get(f"{self.budget}_per_step")
        # A rule that could not be measured fails in its own run, whatever the number of steps.
        return replace(options, steps=max(1, int(getattr(self.options, self.budget) / per_step)) if per_step else 1)

    def _fixed(self) -> dict[str, Any]:
        """The options that must be the same when the command is repeated; rules and seeds may be added."""
        common = {
            name: value for name, value in plain_fields(self.options).items() if name not in (*FREE, "rule", "seed")
        }
        return (
            common
            | {"budget": self.budget, "tune": self.options.tune}
            | {name: getattr(self.options, name) for name in ("seconds", "flops")}
        )

    def _measure(self, pool: WorkerPool) -> None:
        """Measure the cost of a step of every rule once, one rule at a time: for budgets, jobs and the time left."""
        missing = [label for label in self.rules if label not in self.plan]
        refused: dict[str, str] = {}

        def done(task: dict[str, Any], answer: dict[str, Any]) -> None:
            if answer.get("kind") == "mistake":
                refused[task["label"]] = answer["reason"]
                return
            self.plan[task["label"]] = answer.get("done", answer)

        tasks = [{"do": "measure", "label": label, "options": to_mapping(self.rules[label])} for label in missing]
        run_shown(pool, tasks, done, "a step of each rule, for its cost")
        for label, reason in refused.items():
            if label in self.asked or len(refused) == len(self.rules):
                raise LayerwiseError(reason)
            note(f"{label} is left out: {reason}")
            del self.rules[label]

    def _bring_under(self, pool: WorkerPool) -> None:
        """Bring every rule under the peak, if there is one, and record how; earlier findings are kept."""
        if self.options.peak is None:
            return
        found = {label: plan["fit"] for label, plan in self.plan.items() if "fit" in plan}
        measured = {label: plan["held_bytes"] for label in self.rules if "held_bytes" in (plan := self.plan[label])}
        if self.options.peak != "auto":
            peak = read_size(self.options.peak)
        elif found:
            peak = next(iter(found.values()))["peak"]
        elif measured:
            peak = min(measured.values())
        else:
            raise LayerwiseError("peak is auto, and no rule could be measured; see why with layerwise train.")
        for label, fit in found.items():
            if fit["peak"] != peak or fit["reached"] != (fit["held"] <= peak):
                file = shown(self.folder / "compare.json")
                raise damaged(file, f"what {label} holds does not belong to the peak {peak}", "choose another --out")
        baseline = to_mapping(self.baseline)

        def done(task: dict[str, Any], answer: dict[str, Any]) -> None:
            if "done" in answer:
                self.plan[task["label"]] |= {"fit": answer["done"]}
            else:  # it fails in its own run, too
                note(f"{task['label']} keeps its memory: {answer['reason']}")

        tasks = [
            {
                **{"do": "fit", "label": label, "options": to_mapping(self.rules[label])},
                **{"baseline": baseline, "peak": peak, "settled": settled_by(label)},
            }
            for label in measured
            if label not in found
        ]
        run_shown(pool, tasks, done, "each rule under the peak")
        for label in measured:
            fit = self.plan[label].get("fit")
            if fit is None:
                continue
            if not fit["reached"]:
                self.unreached.add(label)
                continue
            try:
                self.rules[label] = changed(self.rules[label], fit["changes"])
                self.plan[label] |= {name: fit[name] for name in ("seconds_per_step", "flops_per_step")}
            except (KeyError, TypeError) as reason:  # an option or a figure that the rule does not have
                file, what = (
                    shown(self.folder / "compare.json"),
                    f"the setting of {label} under the peak is not its own",
                )
                raise damaged(file, what, "choose another --out") from reason

    def _measure_deeper(self, pool: WorkerPool) -> None:
        """Measure the memory of a step of every trained rule at other numbers of blocks, unless it is known."""
        tasks, missing = [], []
        for label, options in self.chosen.items():
            known = self.plan[label].get("held_at", {})
            if options is None or (known and self.depths is None):
                continue
            steps = self.options.seeds * self._steps(self._grid_run(label, "", 0, "runs", options))
            depths, why = depths_of(label, options, self.depths, self.plan[label], steps)
            missing += [why] if why else []
            depths = tuple(depth for depth in depths if str(depth) not in known)
            if depths:
                tasks.append({"do": "depths", "label": label, "options": to_mapping(options), "depths": depths})

        def done(task: dict[str, Any], answer: dict[str, Any]) -> None:
            if "done" in answer:
                self.plan[task["label"]]["held_at"] = self.plan[task["label"]].get("held_at", {}) | answer["done"]
            else:
                missing.append(f"the memory of {task['label']} at other depths: {answer['reason']}")

        run_shown(pool, tasks, done, "memory of a step at other numbers of blocks")
        for reason in dict.fromkeys(missing[:1]):
            note(str(reason))

    def _label_cost(self, label: str) -> float:
        options, plan = self._budgeted(label), self.plan[label]
        if "seconds_per_step" not in plan:
            return 1.0
        return 0.5 + plan["seconds_per_step"] * (options.steps or options.epochs * plan["steps_per_epoch"])

    def _cost(self, run: GridRun) -> float:
        """The seconds that a run should take; only their ratios matter."""
        return self._label_cost(run.label)

    def _jobs(self, tasks: int) -> int:
        if self.options.jobs is not None:
            return self.options.jobs
        peak = max(plan.get("peak_bytes", 0) for plan in self.plan.values())
        return default_jobs(tasks, peak, threads=self.options.threads or 1, accelerator=self.accelerator)

    def _train(self, pool: WorkerPool, grid_runs: list[GridRun], progress: GridProgress) -> None:
        discard_damaged(grid_runs, self.folder)
        for run in grid_runs:
            if run.settled:
                progress.skipped(self._cost(run))
        steps = {run.name: self._steps(run) for run in grid_runs}
        train_all(
            grid_runs,
            pool,
            self._jobs(len(grid_runs)),
            begun=lambda run: progress.begun(
                run.name, self._cost(run), lambda: min(1.0, run.last_step() / steps[run.name])
            ),
            ended=lambda run: progress.ended(run.name, outcome_of(run)),
        )

    def _steps(self, run: GridRun) -> int:
        plan = self.plan[run.label]
        return run.options.steps or run.options.epochs * plan.get("steps_per_epoch", 1)

    def _diagnose(self, pool: WorkerPool, grid_runs: list[GridRun]) -> None:
        """Diagnose every finished run, with the backprop run of the same seed for comparison."""
        twins = {run.options.seed: run for run in grid_runs if run.label == BASELINE and run.result}
        tasks = []
        for run in grid_runs:
            twin = twins.get(run.options.seed)
            if (result := run.result) and not _is_diagnosed(run.folder, result["command"]):
                paths = {"folder": str(run.folder), "twin": str(twin.folder) if twin else None}
                tasks.append({"do": "diagnose", "label": run.name, "device": self.options.device, **paths})
        failed: list[str] = []

        def done(_: dict[str, Any], answer: dict[str, Any]) -> None:
            failed.extend([answer["reason"]] if "kind" in answer else [])

        run_shown(pool, tasks, done, "diagnostics of the runs")
        for reason in failed:
            note(f"a run could not be diagnosed: {reason}")

    def _write(self) -> dict[str, Any]:
        """Write results.csv and summary.json of all runs that are settled."""
        rows: list[dict[str, Any]] = []
        chance: float | None = None
        correct: dict[str, dict[int, np.ndarray]] = {}
        for label in self.rules:
            if label in self.unreached:
                rows.append(unreached_row(label, self.plan[label]["fit"], self.metric))
                continue
            for seed in range(self.options.seeds):
                options = self.chosen[label]
                if options is None:
                    reason = f"every trial failed, the first: {(self._trials(label)[0].failure or {})['reason']}"
                    rows.append(result_row(label, seed, None, None, reason, self.metric))
                    continue
                run = self._grid_run(label, f"seed {seed}", seed, "runs", options)
                rows.append(
                    result_row(label, seed, options, run.result, (run.failure or {}).get("reason", ""), self.metric)
                )
                chance = (run.result or {}).get("chance", chance)
                if run.result and (found := read_correct(run.folder)) is not None:
                    correct.setdefault(label, {})[seed] = found
        fits = {label: plan["fit"] for label, plan in self.plan.items() if label in self.rules and "fit" in plan}
        deeper = {
            label: plan["held_at"] for label, plan in self.plan.items() if label in self.rules and plan.get("held_at")
        }
        return write_results(self.folder, self.command, self.budget, rows, correct, self.metric, fits, deeper, chance)


def run_shown(
    pool: WorkerPool,
    tasks: Sequence[dict[str, Any]],
    done: Callable[[dict[str, Any], dict[str, Any]], None],
    title: str,
) -> None:
    """Do tasks one after the other, each of them under its label in a progress of their own; none: say nothing."""
    if not tasks:
        return

    def over(task: dict[str, Any], answer: dict[str, Any]) -> None:
        done(task, answer)
        progress.ended(task["label"])

    with GridProgress(len(tasks), len(tasks), title) as progress:
        pool.run(tasks, over, jobs=1, begun=lambda task: progress.begun(task["label"], 1.0, lambda: 0.0))


def check_folders(labels: Sequence[str]) -> None:
    """Raise LayerwiseError if two rules would write to one folder, which replaces other characters by `-`.

    >>> check_folders(["sll:weight=0/1", "sll:weight=0/2"])
    """
    known: dict[str, str] = {}
    for label in labels:
        other = known.setdefault(grid_run_folder(label, "", "runs").casefold(), label)
        if other != label:
            raise LayerwiseError(
                f"the runs of {other} and {label} would lie in one folder; rename a file, or write them in other words."
            )


def _is_diagnosed(folder: Path, command: str) -> bool:
    """Whether a run has diagnostics of its own; damaged ones are made again."""
    try:
        read_diagnosed(folder, "diagnostics.json", command)
    except MissingFile:
        return False
    except LayerwiseError as reason:
        note(f"{reason.args[0].partition('; ')[0]}; the run is diagnosed again")
        return False
    return True


@contextlib.contextmanager
def _gone_if_empty(file: Path) -> Iterator[None]:
    """A context at whose end a file is removed if it is empty."""
    try:
        yield
    finally:
        if file.exists() and not file.stat().st_size:
            file.unlink()


def outcome_of(run: GridRun) -> str:
    """The outcome of a run in one line."""
    found = run.result
    if found is None:
        return f"{run.name}: failed: {(run.failure or {}).get('reason', 'unknown')}"
    metric = metric_of(run.options.task)
    own, val = found[f"test_{metric.name}"], found[f"val_{metric.name}"]
    before = "" if val is None else f"val {metric.written(val)}, "
    return f"{run.name}: {before}test {metric.written(own)} in {found['train_seconds']:.1f} s"
