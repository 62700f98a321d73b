"""The files of a comparison: its record, the machine, the table of its runs and their summary."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from layerwise.core.tasks import ACCURACY, Metric
from layerwise.errors import LayerwiseError
from layerwise.files import MissingFile
from layerwise.records import DamagedRecord
from layerwise.report.reading import CompareRecord, read_record
from layerwise.report.summary import as_csv, summarise
from layerwise.runs.environment import environment
from layerwise.runs.options import TrainOptions, to_mapping
from layerwise.runs.writing import write_atomically

MEASURED = {"flops_per_step", "seconds_per_step", "steps_per_epoch"}
"""Costs of a step that every measured rule has."""


def kept_plan(folder: Path, fixed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Measurements per rule from an earlier start of the comparison; none if the folder is new.

    Args:
        folder: of the comparison.
        fixed: the options that must be the same when the command is repeated.

    Raises:
        LayerwiseError: the folder holds something else, a comparison with other options, or a damaged record.
    """
    try:
        before = read_record(folder, "compare.json", CompareRecord)
    except MissingFile:
        if {path.name for path in folder.iterdir()} - {"workers.log", "compare.json.partial"}:
            raise LayerwiseError(f"{folder} is not empty and holds no comparison; choose another --out.") from None
        return {}
    except DamagedRecord as reason:
        found = reason.args[0].partition("; ")[0]
        raise LayerwiseError(f"{found}; remove the folder, or choose another --out.") from None
    # Options that are newer than the comparison had the effect of their present default.
    known = json.loads(json.dumps(to_mapping(TrainOptions()))) | before["fixed"]
    for name, value in json.loads(json.dumps(fixed)).items():
        if known.get(name) != value:
            raise LayerwiseError(
                f"{folder} holds a comparison with {name} = {json.dumps(before['fixed'].get(name))}, not "
                f"{json.dumps(value)}; put it back, or choose another --out."
            )
    # A rule of which a figure is missing is measured again.
    return {label: dict(plan) for label, plan in before["plan"].items() if plan.keys() >= MEASURED}


def write_record(
    folder: Path, command: str, labels: Sequence[str], seeds: int, fixed: Mapping[str, Any], plan: Mapping[str, Any]
) -> None:
    """Write `compare.json` and `environment.json`; rules that could not be measured are left out of the plan."""
    measured = {label: found for label, found in plan.items() if "kind" not in found}
    record = {"command": command, "rules": list(labels), "seeds": seeds, "fixed": fixed, "plan": measured}
    write_atomically(folder / "compare.json", json.dumps(record, indent=2) + "\n")
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")


def write_results(
    folder: Path,
    command: str,
    budget: str,
    rows: Sequence[dict[str, Any]],
    correct: Mapping[str, Mapping[int, np.ndarray]],
    metric: Metric = ACCURACY,
    fits: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    deeper: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    chance: float | None = None,
) -> dict[str, Any]:
    """Write `results.csv` and `summary.json`, with the settings under a peak, the memory at other depths, and the
    accuracy of chance.
    """
    write_atomically(folder / "results.csv", as_csv(rows))
    summary = {
        "command": command,
        "budget": budget,
        "metric": metric.name,
        "chance": chance,
        "rules": summarise(rows, correct, metric),
    }
    for label, fit in fits.items():
        summary["rules"][label]["fit"] = fit
    for label, held in deeper.items():
        summary["rules"][label]["held_at"] = held
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
