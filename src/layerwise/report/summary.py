"""The numbers of a comparison: a row per run, mean and spread per rule, paired differences to the baseline."""

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.special import stdtrit

BASELINE = "backprop"
CONFIDENCE = 0.95
TIMING = ("train_seconds", "samples_per_second")
"""Columns of results.csv that differ from one repetition to the next."""
MEMORY = ("parameters", "optimizer", "gradients", "activations", "peak")
QUANTITIES = {  # of summary.json: from a row
    "test_accuracy": lambda row: row["test_accuracy"],
    "val_accuracy": lambda row: row["val_accuracy"],
    "test_loss": lambda row: row["test_loss"],
    "train_seconds": lambda row: row["train_seconds"],
    "peak_mib": lambda row: row["peak_mib"],
    "activations_gradients_mib": lambda row: row["activations_mib"] + row["gradients_mib"],
    "flops": lambda row: row["flops"],
}


def result_row(label: str, seed: int, options: Any, result: dict[str, Any] | None, reason: str) -> dict[str, Any]:
    """A row of results.csv.

    Args:
        label: the rule as it was asked for.
        seed: of the run.
        options: of the run, with `lr` and `weight_decay`; None where no trial of the rule succeeded.
        result: contents of `result.json`, None for a run that failed.
        reason: why it failed.
    """
    names = ("epochs", "steps", "test_accuracy", "val_accuracy", "test_loss", "val_loss", "parameters")
    names += ("flops_per_step", "skipped_steps")
    row: dict[str, Any] = {
        "rule": label,
        "seed": seed,
        "status": "failed" if result is None else "ok",
        "reason": reason if result is None else "",
        "lr": None if options is None else options.lr,
        "weight_decay": None if options is None else options.weight_decay,
    }
    row |= {name: None if result is None else result[name] for name in names}
    row["flops"] = None if result is None else result["flops_per_step"] * result["steps"]
    row |= {f"{part}_mib": None if result is None else result["memory_mib"].get(part) for part in MEMORY}
    return row | {name: None if result is None else result[name] for name in TIMING}


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; what is not there is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation (n - 1 in the denominator; None for one value) and n of the values that are there.

    >>> spread([1.0, 3.0])
    {'mean': 2.0, 'sd': 1.4142135623730951, 'n': 2}
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    sd = statistics.stdev(found) if len(found) > 1 else None
    return {"mean": statistics.fmean(found), "sd": sd, "n": len(found)}


def paired_difference(own: dict[int, float], base: dict[int, float]) -> dict[str, Any] | None:
    r"""Difference over the seeds that both have, with a confidence interval of Student's t.

    $\bar d \pm t_{n-1, 0.975}\, s_d / \sqrt n$ with $d_i = a_i - b_i$ for seed i. With n = 3 the quantile is 4.3, so
    the interval is wide: three seeds show large differences only.

    Args:
        own: value per seed.
        base: value per seed of the baseline.

    Returns:
        `mean`, `low`, `high`, `n`, `confidence`; `low` and `high` are None for one seed; None without a common seed.

    >>> found = paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0})
    >>> round(found["mean"], 3), round(found["high"], 3)  # 1.5 + 12.706 * 0.7071 / 1.4142
    (1.5, 7.853)
    """
    differences = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    found = spread(differences)
    if found is None:
        return None
    low = high = None
    if found["sd"] is not None:
        quantile = float(stdtrit(found["n"] - 1, (1 + CONFIDENCE) / 2))
        half = quantile * found["sd"] / found["n"] ** 0.5
        low, high = found["mean"] - half, found["mean"] + half
    return {"mean": found["mean"], "low": low, "high": high, "n": found["n"], "confidence": CONFIDENCE}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per rule: spread of every quantity, failures with their reasons, difference to the baseline in accuracy."""
    found = {}
    for label in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == label]
        done = [row for row in own if row["status"] == "ok"]
        summary: dict[str, Any] = {
            "n": len(done),
            "failed": [{"seed": row["seed"], "reason": row["reason"]} for row in own if row["status"] != "ok"],
            "lr": own[0]["lr"],
            "weight_decay": own[0]["weight_decay"],
        }
        summary |= {name: spread([read(row) for row in done]) for name, read in QUANTITIES.items()}
        summary[f"difference_to_{BASELINE}"] = (
            None if label == BASELINE else paired_difference(_by_seed(rows, label), _by_seed(rows, BASELINE))
        )
        found[label] = summary
    return found


def _by_seed(rows: Sequence[dict[str, Any]], label: str) -> dict[int, float]:
    return {row["seed"]: row["test_accuracy"] for row in rows if row["rule"] == label and row["status"] == "ok"}


def plus_minus(found: dict[str, Any] | None, digits: int, factor: float = 1.0) -> str:
    """Mean and standard deviation as text.

    >>> plus_minus({"mean": 0.97, "sd": 0.01, "n": 3}, 1, factor=100)
    '97.0 ± 1.0'
    """
    if found is None:
        return "-"
    text = f"{factor * found['mean']:.{digits}f}"
    return text if found["sd"] is None else f"{text} ± {factor * found['sd']:.{digits}f}"


def exact(found: dict[str, Any] | None, digits: int) -> str:
    """A figure that is the same for every seed; with its spread where it is not.

    >>> exact({"mean": 4.25, "sd": 0.0, "n": 3}, 2)
    '4.25'
    """
    return plus_minus(found if found is None or found["sd"] else found | {"sd": None}, digits)


def difference_in_words(found: dict[str, Any] | None) -> str:
    """A paired difference of accuracies, in percentage points."""
    if found is None:
        return "-"
    text = f"{100 * found['mean']:+.2f}"
    return text if found["low"] is None else f"{text} ({100 * found['low']:+.2f} .. {100 * found['high']:+.2f})"


COLUMNS = ("rule", "n", "test accuracy, %", "difference to backprop", "act. + grad., MiB", "peak, MiB", "seconds")


def table_rows(summary: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table for a person, in the order of `COLUMNS`; a rule without a finished run gives its reason."""
    rows = []
    for label, found in summary.items():
        if not found["n"]:
            rows.append((label, "0", f"failed: {found['failed'][0]['reason']}", "", "", "", ""))
            continue
        rows.append(
            (
                label,
                str(found["n"]) + (f" ({len(found['failed'])} failed)" if found["failed"] else ""),
                plus_minus(found["test_accuracy"], 2, 100),
                difference_in_words(found[f"difference_to_{BASELINE}"]),
                exact(found["activations_gradients_mib"], 2),
                exact(found["peak_mib"], 2),
                plus_minus(found["train_seconds"], 1),
            )
        )
    return rows


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The table in aligned columns."""
    rows = [COLUMNS, *table_rows(summary)]
    widths = [max(len(row[i]) for row in rows if row[3] or i < 2) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(f"{word:<{w}}" for word, w in zip(row, widths, strict=True)).rstrip() for row in rows)
