"""Draws `report.html`: the results of a comparison or a benchmark in one file that needs no network."""

import contextlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from layerwise.core.tasks import ACCURACY, Metric
from layerwise.errors import LayerwiseError
from layerwise.files import MissingFile, kind_of, shown
from layerwise.records import convert
from layerwise.report import figures
from layerwise.report.benches import put_bench, read_bench
from layerwise.report.confusion import Counts, confusions
from layerwise.report.diagnosed import read_diagnosed
from layerwise.report.explained import base, explained
from layerwise.report.filters import filters
from layerwise.report.finished import check_finished, check_summary
from layerwise.report.frontier import frontier
from layerwise.report.language import loss_per_block, texts
from layerwise.report.reading import (
    ADVICE,
    CompareRecord,
    FixedOptions,
    Machine,
    Summary,
    metric_named,
    read_metrics,
    read_record,
    read_result,
    read_rows,
)
from layerwise.report.sections import Origin, Section
from layerwise.report.summary import columns, is_fitted, notes_of_fits, resolution_in_words, spread, table_rows
from layerwise.report.verdict import verdict
from layerwise.runs.environment import machine_in_words
from layerwise.runs.layout import grid_run_folder
from layerwise.runs.writing import write_atomically

Layers = tuple[str, str, tuple[float, float] | None]
LAYERS: dict[str, Layers] = {  # quantity: title, caption, limits of the colours
    "accuracy": (
        "Own readout: accuracy, %",
        "Test accuracy of what the rule reads off each block; a rule without local readouts has the head's only.",
        (0.0, 100.0),
    ),
    "probe_accuracy": (
        "Linear probe: accuracy, %",
        "Test accuracy of a logistic regression on each block's frozen output: what a linear readout could tell there.",
        (0.0, 100.0),
    ),
    "bhattacharyya": (
        "Bhattacharyya coefficient to the next block",
        "Overlap of the class posteriors (of the probes) of neighbouring blocks; 1: the next block changes nothing.",
        (0.0, 1.0),
    ),
    "cka": (
        "CKA to the next block",
        "Linear centred kernel alignment of neighbouring blocks' outputs; 1: the same up to rotation and scale.",
        (0.0, 1.0),
    ),
    "cka_to_backprop": (
        "CKA to the backprop twin",
        "Linear centred kernel alignment with the same block of the backprop run of the same seed.",
        (0.0, 1.0),
    ),
    "gradient_cosine": (
        "Cosine to the backprop gradient",
        "Rule's gradient against that of backpropagation at the trained weights, on one batch, per block.",
        (-1.0, 1.0),
    ),
    "hoyer": ("Hoyer sparsity", "0: all features of equal size; 1: all but one are zero.", (0.0, 1.0)),
    "dead": ("Dead units", "Share of units that give the same value for every test sample.", (0.0, 1.0)),
}
PERCENT = ("accuracy", "probe_accuracy", "f1", "exact_match", "miou", "pixel_accuracy")
MOST_REPORTED = 50
"""Largest number of figures for scalars that rules report."""
REPORTED = {
    "divergence": "Divergence to the block before",
    "label_kl": "Belief: KL to the label",
    "consistency": "Belief: KL to the belief before",
    "entropy": "Belief: entropy",
    "descent": "Belief: share of samples that descend",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` and `figures/` for a folder that `compare` or `bench --out` has written.

    Raises:
        LayerwiseError: there is nothing to draw, or matplotlib or Jinja is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  so that its absence is noticed before anything is done
    except ImportError as reason:
        raise LayerwiseError(
            f"a report needs {reason.name}, which is not installed; pip install 'layerwise[report]' and then run "
            f"layerwise report {shlex.quote(str(folder))}."
        ) from reason
    page: dict[str, Any] = {
        "table": [],
        "rules": [],
        "verdict": [],
        "notes": [],
        "failures": [],
        "texts": [],
        "sections": [],
        "origins": [],
    }
    if kind_of(folder / "summary.json") is not None:
        put_comparison(folder, page)
    benches = [found for file in sorted(folder.glob("*.json")) if (found := read_bench(folder, file.name)) is not None]
    for found in benches:
        put_bench(found, page)
    if not page["origins"]:
        raise LayerwiseError(f"{folder} holds neither a comparison nor a benchmark; give the folder of one.")
    page.setdefault("title", f"Benchmarks: {folder.resolve().name}")
    page.setdefault("subtitle", page["origins"][0].machine)
    place = _folder_of_figures(folder)
    for section in page["sections"]:
        for item in section.shown:
            figures.save(item["figure"], place)
    page["sections"] = [section for section in page["sections"] if section.shown]
    template, page["script"] = (
        files("layerwise.report").joinpath(name).read_text() for name in ("page.html", "page.js")
    )
    page["base"], page["named"] = base, {rule.name for rule in page["rules"]}
    html = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template).render(page)
    write_atomically(folder / "report.html", html + "\n")
    return folder / "report.html"


def _folder_of_figures(folder: Path) -> Path:
    """`figures/`, which must be a folder in `folder` and not a link to another place."""
    place = folder / "figures"
    if place.is_symlink() or kind_of(place) not in (None, "folder"):
        raise LayerwiseError(f"{shown(place)} is not a folder of its own, so no figure is written there; remove it.")
    try:
        place.mkdir(exist_ok=True)
    except OSError as reason:
        raise LayerwiseError(
            f"cannot write to {shown(folder)} ({reason.strerror}); change its permissions."
        ) from reason
    return place


@dataclass
class Runs:
    """The finished runs of a comparison, by rule and seed."""

    results: dict[str, dict[int, dict[str, Any]]]
    lines: dict[str, dict[int, list[dict[str, Any]]]]
    layers: dict[str, dict[int, dict[str, dict[str, float | None]]]]
    confusion: dict[str, list[Mapping[str, Counts]]]
    filters: dict[str, Mapping[str, Any]]
    """Of the first seed that has any."""

    @classmethod
    def read(cls, folder: Path, rows: list[dict[str, str]]) -> "Runs":
        """Read the finished runs that the rows of results.csv name."""
        found = cls({}, {}, {}, {}, {})
        for row in rows:
            if row["status"] != "ok":
                continue
            rule, seed = row["rule"], int(row["seed"])
            run = grid_run_folder(rule, f"seed {seed}", "runs")
            result = read_result(folder, f"{run}/result.json")
            found.results.setdefault(rule, {})[seed] = result
            found.lines.setdefault(rule, {})[seed] = read_metrics(folder, f"{run}/metrics.jsonl")
            blocks: dict[str, dict[str, float | None]] = {}
            with contextlib.suppress(MissingFile):
                diagnosed = read_diagnosed(folder, f"{run}/diagnostics.json", result["command"])
                blocks, confusion = diagnosed["blocks"], diagnosed.get("confusion")
                found.confusion.setdefault(rule, []).extend([] if confusion is None else [confusion])
                if own := diagnosed.get("filters"):
                    found.filters.setdefault(rule, own)
            found.layers.setdefault(rule, {})[seed] = blocks
            check_finished(folder / run)
        return found

    def curves(self, x: str, metric: Metric = ACCURACY) -> dict[str, list[tuple[float, float, float | None]]]:
        """The metric on the validation split over `step` or `seconds`; at every evaluation the mean over seeds."""
        found = {}
        for rule, seeds in self.lines.items():
            points: dict[int, list[tuple[float, float]]] = {}
            for lines in seeds.values():
                for line in lines:
                    place, value = line.get(x), line.get(f"head/{metric.name}")
                    if line["split"] == "val" and place is not None and value is not None:
                        points.setdefault(line["step"], []).append((place, metric.factor * value))
            if points:
                found[rule] = [_point(values) for _, values in sorted(points.items())]
        return found

    def heat(self, quantity: str) -> dict[str, dict[str, float | None]]:
        """Mean over seeds per rule and block."""
        factor = 100 if quantity in PERCENT else 1
        found: dict[str, dict[str, float | None]] = {}
        for rule in self.results:
            per_block: dict[str, list[float]] = {}
            for blocks in self._sources(rule, quantity):
                for block, value in blocks.items():
                    if value is not None:
                        per_block.setdefault(block, []).append(factor * value)
            if per_block:
                found[rule] = {block: sum(values) / len(values) for block, values in per_block.items()}
        return found

    def _sources(self, rule: str, quantity: str) -> list[dict[str, float | None]]:
        """Per seed: block to value, from the diagnostics or from what the rule reported on the test split."""
        if quantity in LAYERS and quantity != "accuracy":
            return [{b: row.get(quantity) for b, row in blocks.items()} for blocks in self.layers[rule].values()]
        tests = [line for lines in self.lines[rule].values() for line in lines if line["split"] == "test"]
        end = f"/{quantity}"
        return [{key.removesuffix(end): v for key, v in line.items() if key.endswith(end)} for line in tests]

    def reported(self) -> list[str]:
        """Names of the scalars that rules reported on the test split, other than loss and accuracy."""
        lines = [line for seeds in self.lines.values() for lines in seeds.values() for line in lines]
        names = dict.fromkeys(
            key.partition("/")[2] for line in lines if line["split"] == "test" for key in line if "/" in key
        )
        return [name for name in names if name not in ("loss", "accuracy")][:MOST_REPORTED]


def _point(values: list[tuple[float, float]]) -> tuple[float, float, float | None]:
    accuracies = spread([accuracy for _, accuracy in values])
    assert accuracies is not None
    return sum(place for place, _ in values) / len(values), accuracies["mean"], accuracies["sd"]


def put_comparison(folder: Path, page: dict[str, Any]) -> None:
    """Put a comparison on the page: table, curves, trade-offs, layers."""
    record: Any = read_record(folder, "compare.json", CompareRecord)
    machine: Any = read_record(folder, "environment.json", Machine)
    summary: Any = read_record(folder, "summary.json", Summary)
    rules: dict[str, Any] = dict(summary["rules"])
    metric = metric_named(summary.get("metric", "accuracy"), folder / "summary.json")
    rows = read_rows(folder, "results.csv")
    unknown = [row["rule"] for row in rows if row["rule"] not in rules]
    if unknown or not rules:
        raise LayerwiseError(
            f"{shown(folder / 'results.csv')} and summary.json are of different comparisons "
            f"({unknown[0] if unknown else 'no rule'!r}); {ADVICE}."
        )
    runs = Runs.read(folder, rows)
    check_summary(folder / "summary.json", rules, runs.results, metric)
    looks = figures.look(list(rules))
    fixed: Any = convert(record["fixed"], FixedOptions, f"'fixed' of {shown(folder / 'compare.json')}", ADVICE)
    commands = [found["command"] for seeds in runs.results.values() for found in seeds.values()]
    packages = "\n".join(f"{name}=={version}" for name, version in machine["packages"].items())
    origin = Origin(
        record["command"],
        machine_in_words(machine),
        json.dumps(record["fixed"], indent=2),
        "\n".join(commands),
        packages,
    )
    page["origins"].append(origin)
    page["title"] = f"Learning rules on {fixed['data']}, {fixed['model']['name']}"
    seeds = f"{record['seeds']} seed{'s' if record['seeds'] > 1 else ''}"
    page["subtitle"] = f"{seeds}, {_budget(fixed)}; {machine_in_words(machine)}"
    page["columns"], page["table"] = columns(metric, is_fitted(rules)), table_rows(rules, metric)
    page["rules"] = explained(rules)
    page["verdict"] = verdict(rules, metric, fixed["tune"], summary.get("chance"), fixed.get("accumulate", 1))
    page["notes"] = [*notes(rules, fixed, metric), *notes_of_fits(rules)]
    page["failures"] = [
        (f"{rule} seed {failed['seed']}", failed["reason"])
        for rule, found in rules.items()
        for failed in found["failed"]
    ]
    page["sections"] += [
        _accuracy(runs, looks, record, origin, metric),
        frontier(rules, looks, origin, metric),
        _memory_at_depth(rules, looks, origin),
        _costs(rules, looks, origin, metric),
        loss_per_block(runs.lines, metric, origin),
        _layers(runs, origin),
        confusions(runs.confusion, origin),
        filters(runs.filters, origin),
    ]
    page["texts"] = texts(runs.results)


def _budget(fixed: dict[str, Any]) -> str:
    kind = fixed["budget"]
    amount = "?" if fixed[kind] is None else f"{fixed[kind]:g}"
    return f"{amount} {kind} each" + (f", {fixed['tune']} trials per rule" if fixed["tune"] else "")


def notes(rules: dict[str, Any], fixed: dict[str, Any], metric: Metric = ACCURACY) -> list[str]:
    """Sentences on how to read the table."""
    paired = (
        "paired by seed and test sample, in percentage points, with its 95 % confidence interval over both (Student's "
        "t over seeds, bootstrap over test samples), from three seeds on"
        if metric == ACCURACY
        else "paired by seed" + ("" if metric.larger else "; less is better")
    )
    found = [
        f"Test {metric.words} of the last weights, mean ± standard deviation over n seeds. The difference to backprop "
        f"is {paired}. Memory is exact, of one training step: "
        "activations + gradients, and the peak with parameters and optimizer state. Seconds are those of training, "
        "without evaluation.",
    ]
    if (resolution := resolution_in_words(rules)) is not None:
        found.append(f"{resolution[0].upper()}{resolution[1:]}.")
    rates = {
        rule: f"{own['lr']:g} / {own['weight_decay']:g}"
        for rule, own in rules.items()
        if own["lr"] is not None and own["weight_decay"] is not None
    }
    words = "; ".join(f"{rule} {rate}" for rule, rate in rates.items())
    if len({*rates.values()}) == 1:
        words = f"{next(iter(rates.values()))} for all"
    how = f"chosen out of {fixed['tune']} trials on the validation split" if fixed["tune"] else "not tuned"
    return [*found, f"Learning rate / weight decay, {how}: {words}."]


def _accuracy(runs: Runs, looks: Any, record: dict[str, Any], origin: Origin, metric: Metric = ACCURACY) -> Section:
    words, unit = metric.words, " %" if metric.share else ""
    title = f"{words[0].upper()}{words[1:]}"
    section = Section(title, f"Validation {words} after every epoch; bands are one standard deviation over seeds.")
    per_epoch = {rule: plan.get("steps_per_epoch", 1) for rule, plan in record["plan"].items()}
    steps = runs.curves("step", metric)
    epochs = {rule: [(x / per_epoch.get(rule, 1), y, sd) for x, y, sd in points] for rule, points in steps.items()}
    for name, found, x in (
        ("accuracy_epochs", epochs, "epochs"),
        ("accuracy_seconds", runs.curves("seconds", metric), "seconds of training"),
    ):
        if found:
            ends = ", ".join(f"{rule} {points[-1][1]:.1f}{unit}" for rule, points in found.items())
            section.draw(
                name,
                f"{title} over {x}",
                f"Validation {words} over {x}, one curve per rule; at the end: {ends}.",
                lambda axes, found=found, x=x: figures.curves(axes, found, x, f"validation {metric.title}", looks),
                figures.height(len(found)),
                f"Validation {words} over {x}; mean and band over seeds.",
                origin,
            )
    return section


def _costs(rules: dict[str, Any], looks: Any, origin: Origin, metric: Metric = ACCURACY) -> Section:
    up, unit = "Up" if metric.larger else "Down", " %" if metric.share else ""
    title = f"{metric.words[0].upper()}{metric.words[1:]}"
    about = f"{up} and to the left is better; the dotted line joins the rules that no other beats in both."
    section = Section(f"{title} against cost", about)
    for name, quantity, words, factor in (
        ("accuracy_memory", "peak_mib", "peak memory of a step, MiB", 1.0),
        ("accuracy_flops", "flops", "training compute, GFLOP", 1e-9),
        ("accuracy_time", "train_seconds", "training time, s", 1.0),
    ):
        points = {}
        for rule, found in rules.items():
            own, scale = found.get(f"test_{metric.name}"), metric.factor
            if found["n"] and found[quantity] is not None and own is not None:
                deviation = None if own["sd"] is None else scale * own["sd"]
                points[rule] = (factor * found[quantity]["mean"], scale * own["mean"], deviation)
        if points:
            values = "; ".join(f"{rule}: {x:.3g}, {y:.1f}{unit}" for rule, (x, y, _) in points.items())
            section.draw(
                name,
                f"{title} against {words.split(',')[0]}",
                f"Test {metric.words} against {words}. {values}.",
                lambda axes, points=points, words=words: figures.trade(
                    axes, points, words, f"test {metric.title}", looks, metric.larger
                ),
                figures.height(len(points)),
                f"Test {metric.words} (mean, standard deviation) against {words}.",
                origin,
            )
    seconds = {
        rule: (found["peak_mib"]["mean"], found["train_seconds"]["mean"], found["train_seconds"]["sd"])
        for rule, found in rules.items()
        if found["n"] and found["peak_mib"] is not None and found["train_seconds"] is not None
    }
    if seconds:
        values = "; ".join(f"{rule}: {x:.3g}, {y:.3g}" for rule, (x, y, _) in seconds.items())
        section.draw(
            "time_memory",
            "Training time against peak memory of a step",
            f"Seconds of training against peak memory of a step in MiB. {values}.",
            lambda axes: figures.trade(axes, seconds, "peak memory of a step, MiB", "training time, s", looks, False),
            figures.height(len(seconds)),
            "Seconds of training (mean, standard deviation) against peak memory; down and to the left is better.",
            origin,
        )
    return section


def _memory_at_depth(rules: dict[str, Any], looks: Any, origin: Origin) -> Section:
    section = Section(
        "Memory against depth", "Activations + gradients of one step; parameters and optimizer state grow."
    )
    mib = {
        rule: [(float(depth), size / 2**20, None) for depth, size in sorted(held.items(), key=lambda row: int(row[0]))]
        for rule, own in rules.items()
        if (held := own.get("held_at")) and min(held.values()) > 0
    }
    if mib:
        values = "; ".join(
            f"{rule}: " + ", ".join(f"{x:g} blocks {y:.3g}" for x, y, _ in row) for rule, row in mib.items()
        )
        section.draw(
            "memory_depth",
            "Activations + gradients against depth",
            f"MiB of activations and gradients against the number of blocks. {values}.",
            lambda axes: figures.curves(axes, mib, "number of blocks", "MiB", looks, log=True),
            figures.height(len(mib)),
            f"MiB, exact, of one step of the same model with other numbers of blocks. {values}.",
            origin,
        )
    return section


def _layers(runs: Runs, origin: Origin) -> Section:
    about = "Means over seeds, at the end of training; first block on the left. Colours span the bounds of the "
    section = Section("Layer by layer", about + "quantity, or begin at 0 where it has none.", folded=True)
    own = {name: _reported(name) for name in runs.reported()}
    for quantity, (title, caption, limits) in (LAYERS | own).items():
        found = runs.heat(quantity)
        if found:
            form = ".1f" if quantity in PERCENT else ".3g" if quantity in own else ".3f"
            alt = "; ".join(f"{rule}: {_row(row)}" for rule, row in found.items())
            section.draw(
                f"layers_{quantity}",
                title,
                f"{title}, per rule and block. {alt}.",
                lambda axes, found=found, limits=limits, form=form: figures.heat(axes, found, limits, form),
                1.15 + 0.36 * len(found),
                caption,
                origin,
            )
    return section


def _reported(name: str) -> Layers:
    title = REPORTED.get(name, name.replace("_", " ").capitalize())
    limits = (0.0, 100.0) if name in PERCENT else None
    return title, "As the rule itself reports it, mean over the test split.", limits


def _row(row: Mapping[str, float | None]) -> str:
    return ", ".join(f"{block} {figures.three_digits(value)}" for block, value in row.items() if value is not None)
