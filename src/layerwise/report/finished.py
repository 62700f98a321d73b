"""Checks that the files of a finished run agree: each is whole by itself, and may still be of another run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from layerwise.core.tasks import Metric
from layerwise.errors import LayerwiseError, short
from layerwise.files import MissingFile, kind_of, shown
from layerwise.report.reading import Name, read_correct, read_metrics, read_record, read_result
from layerwise.report.summary import QUANTITIES, result_row, spread
from layerwise.runs.layout import OPTIONS
from layerwise.runs.log import FILE

ADVICE = "resume the run, which writes all of them again"


class Told(TypedDict):
    """The fields of `result.json` that other files hold too; older versions wrote fewer."""

    options: NotRequired[dict[Name, Any]]
    test: NotRequired[dict[Name, Any]]
    by_epoch: NotRequired[dict[Name, list[float | None]]]


def check_finished(folder: Path) -> dict[str, Any]:
    """The contents of a finished run's `result.json`, if the other files of the run say the same.

    Compared are the options (`config.json`), the figures of the validation and the test split (`metrics.jsonl`), and
    the test samples that were classified correctly (`test_correct.npy`).

    Raises:
        MissingFile: the run is not finished.
        LayerwiseError: a damaged file, one that is missing, or one of another run.
    """
    result = read_result(folder, "result.json")
    told = read_record(folder, "result.json", Told)
    metric = result["metric"]
    _check_options(folder, told.get("options", {}))
    last = {line["split"]: line for line in read_metrics(folder, FILE)}
    copies = [(split, "metrics.jsonl", last.get(split, {})) for split in ("val", "test")]
    for split, where, values in [*copies, ("test", "its field 'test'", told.get("test", {}))]:
        for name in ("loss", metric):
            _check_same(folder, f"{split}_{name}", result[f"{split}_{name}"], values.get(f"head/{name}"), where)
    epochs = told.get("by_epoch", {}).get("val")
    if epochs and metric == "accuracy":  # figures of a whole text or table are no means over batches
        _check_same(folder, f"val_{metric}", result[f"val_{metric}"], epochs[-1], "its field 'by_epoch'")
    correct = read_correct(folder)
    if correct is not None and metric == "accuracy":
        _check_same(folder, "test_accuracy", result["test_accuracy"], float(correct.mean()), "test_correct.npy", 1e-6)
    return result


def check_has_samples(folder: Path) -> None:
    """Raise LayerwiseError if a finished run of classes has lost the record of its test samples."""
    if kind_of(folder / "test_correct.npy") != "file":
        raise LayerwiseError(f"{shown(folder / 'test_correct.npy')} is missing; {ADVICE}.")


def _check_options(folder: Path, of_result: Mapping[str, Any]) -> None:
    try:
        own = read_record(folder, OPTIONS, dict[str, Any])
    except MissingFile as reason:
        raise LayerwiseError(f"{shown(folder / OPTIONS)} is missing; start the run again.") from reason
    for name in sorted(own.keys() & of_result.keys()):
        if own[name] != of_result[name]:
            raise LayerwiseError(
                f"{shown(folder / 'result.json')} is of another run: it has {name} = {short(of_result[name])} and "
                f"{OPTIONS} {short(own[name])}; {ADVICE}."
            )


def _check_same(folder: Path, name: str, own: Any, other: Any, where: str, tolerance: float = 1e-9) -> None:
    """Raise LayerwiseError if another place has another number; none, or one that is not finite, counts as no number.

    Args:
        folder: of the run.
        name: of the number in result.json.
        own: what result.json has.
        other: what the other place has.
        where: the other place.
        tolerance: relative; accuracies are sums of float32 in one of them.
    """
    numbers = [value for value in (own, other) if isinstance(value, (int, float)) and math.isfinite(value)]
    if len(numbers) == 2 and not math.isclose(*numbers, rel_tol=tolerance, abs_tol=tolerance):
        raise LayerwiseError(
            f"{shown(folder / 'result.json')} has {name} = {numbers[0]:.6g} and {where} {numbers[1]:.6g}: one of them "
            f"is of another run; {ADVICE}."
        )


def check_summary(
    file: Path,
    rules: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Mapping[int, dict[str, Any]]],
    metric: Metric,
) -> None:
    """Raise LayerwiseError unless a comparison's `summary.json` has the means of its finished runs.

    Args:
        file: the summary.
        rules: its fields by rule.
        results: contents of `result.json` by rule and seed.
        metric: by which rules are compared.
    """
    for rule, summary in rules.items():
        rows = [result_row(rule, seed, None, result, "", metric) for seed, result in results.get(rule, {}).items()]
        named = {f"test_{metric.name}": lambda row: row[f"test_{metric.name}"]}
        for name, read in (QUANTITIES | named).items():
            own, found = summary.get(name), spread([read(row) for row in rows])
            if summary["n"] != len(rows) or (own is not None and found is not None and not _is_same(own, found)):
                raise LayerwiseError(
                    f"{shown(file)} has other figures of {rule} than its runs ({name}); repeat the command that wrote "
                    "the folder."
                )


def _is_same(own: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two spreads agree; numbers that are not finite agree with each other."""
    pairs = [(own[name], found[name]) for name in ("mean", "sd", "n") if None not in (own[name], found[name])]
    return all(a == b or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) or not math.isfinite(b) for a, b in pairs)
