r"""The statistics of a comparison: a row per run, mean and spread per rule, paired differences to the baseline.

A difference of two rules in accuracy is uncertain in two ways: another seed would train other weights, and another
test set would ask other questions. The interval covers both. With $c_{si} = 1$ where the rule's run of seed s
classifies test sample i correctly, $b_{si}$ the same of the baseline, n seeds and N test samples,

$$\bar d = \frac{1}{nN}\sum_{s,i} (c_{si} - b_{si}), \qquad
  \left[\bar d - \sqrt{h^2 + l^2},\ \bar d + \sqrt{h^2 + u^2}\right]$$

- seeds: $h = t_{n-1,\,0.975}\, s / \sqrt n$ with s the standard deviation of the differences per seed (Student's t;
  Student, Biometrika 6, 1908). A bootstrap over three seeds would be narrower by a factor of 2.7.
- test samples: $l$ and $u$ are the distances of the 2.5 % and 97.5 % quantiles of 10,000 bootstrap means from their
  centre (percentile bootstrap; Efron, Annals of Statistics 7, 1979). A draw resamples test samples, with the outcomes
  of all seeds and of both rules together. Two samples are added first, one that only the rule gets right and one that
  only the baseline does (Bonett & Price, Journal of Educational and Behavioral Statistics 37, 2012): rules that agree
  on every sample of this split need not agree on every other.
- together: the distances are added in quadrature, as those of independent errors are (Zou & Donner, Statistics in
  Medicine 27, 2008).

There is no interval for fewer than three seeds, or if the runs did not keep which samples they classified correctly
(as under a task without classes). A difference is in the metric of the task: under `rmse` less is better.
"""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from layerwise.core.tasks import ACCURACY, Metric
from layerwise.memory.fitting import size_in_words
from layerwise.terminal import table

BASELINE = "backprop"
CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""Smallest number of seeds for which there is an interval."""
DRAWS = 10_000
"""Bootstrap samples of the test set."""
UNREACHED = "unreached"
"""Status of a rule that cannot be brought under the peak of the comparison."""
TIMING = ("train_seconds", "samples_per_second")
"""Columns of results.csv that differ from one repetition to the next."""
MEMORY = ("parameters", "optimizer", "gradients", "activations", "peak")
QUANTITIES = {  # of summary.json, each computed from a row
    "steps": lambda row: row["steps"],
    "test_loss": lambda row: row["test_loss"],
    "train_seconds": lambda row: row["train_seconds"],
    "peak_mib": lambda row: row["peak_mib"],
    "activations_gradients_mib": lambda row: row["activations_mib"] + row["gradients_mib"],
    "flops": lambda row: row["flops"],
}


def result_row(
    label: str, seed: int, options: Any, result: dict[str, Any] | None, reason: str, metric: Metric = ACCURACY
) -> dict[str, Any]:
    """A row of results.csv.

    Args:
        label: the rule as it was requested.
        seed: of the run.
        options: of the run, with `lr` and `weight_decay`; None where no trial of the rule succeeded.
        result: contents of `result.json`, None for a run that failed.
        reason: why it failed.
        metric: by which rules are compared.
    """
    names = ("epochs", "steps", f"test_{metric.name}", f"val_{metric.name}", "test_loss", "val_loss", "parameters")
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
    counted = result is not None and result["flops_per_step"] is not None
    row["flops"] = result["flops_per_step"] * result["steps"] if counted and result is not None else None
    row |= {f"{part}_mib": None if result is None else result["memory_mib"].get(part) for part in MEMORY}
    return row | {name: None if result is None else result[name] for name in TIMING}


def unreached_row(label: str, fit: Mapping[str, Any], metric: Metric = ACCURACY) -> dict[str, Any]:
    """A row of results.csv for a rule that was not trained because it cannot be brought under the peak."""
    row = result_row(label, 0, None, None, how_far(fit), metric)
    return row | {"status": UNREACHED}


def how_far(fit: Mapping[str, Any]) -> str:
    """How far a rule came towards a peak, in words.

    >>> how_far({"peak": 2**20, "held": 3 * 2**19, "changes": {"micro": 4}, "why": ""})
    'does not reach 1 MiB: 1.5 MiB at least, by micro 4'
    """
    words = f"does not reach {size_in_words(fit['peak'])}: {size_in_words(fit['held'])} at least"
    words += f", by {how_in_words(fit)}" if fit["changes"] else ""
    return words + (f" ({fit['why'].rstrip('.')})" if fit["why"] else "")


def how_in_words(fit: Mapping[str, Any]) -> str:
    """What brought a rule under a peak, in words.

    >>> how_in_words({"changes": {"micro": 4, "policy": "matmul"}}), how_in_words({"changes": {}})
    ('micro 4, policy matmul', 'as it is')
    """
    return (
        ", ".join(f"{name} {'all' if value is None else value}" for name, value in fit["changes"].items()) or "as it is"
    )


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; a missing value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, standard deviation (n - 1 in the denominator) and n of the values that are not None.

    The deviation is None for one value, and where a value is not finite (a loss may overflow).

    >>> spread([1.0, 3.0])
    {'mean': 2.0, 'sd': 1.4142135623730951, 'n': 2}
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    if not all(map(math.isfinite, found)):
        return {"mean": sum(found) / len(found), "sd": None, "n": len(found)}
    sd = statistics.stdev(found) if len(found) > 1 else None
    return {"mean": statistics.fmean(found), "sd": sd, "n": len(found)}


def paired_difference(
    own: Mapping[int, float],
    base: Mapping[int, float],
    own_correct: Mapping[int, np.ndarray] | None = None,
    base_correct: Mapping[int, np.ndarray] | None = None,
) -> dict[str, Any] | None:
    """Mean difference over the seeds that both rules have, with the interval that the module describes.

    Args:
        own: accuracy per seed.
        base: accuracy per seed of the baseline.
        own_correct: per seed which test samples were classified correctly, bool `(N,)`.
        base_correct: the same of the baseline.

    Returns:
        `mean`, `low`, `high`, `n` (seeds), `samples` (N), `confidence`; None without a common seed. `low` and `high`
        are None for fewer than three seeds or without the samples.

    >>> right, wrong = np.array([True] * 60 + [False] * 40), np.array([True] * 50 + [False] * 50)
    >>> found = paired_difference(*({s: v for s in range(3)} for v in (0.6, 0.5, right, wrong)))
    >>> round(found["mean"], 3), found["low"] < 0.1 - 1.9 * 0.03, found["high"] > 0.1 + 1.9 * 0.03  # sd of a mean: 0.03
    (0.1, True, True)
    """
    seeds = sorted(own.keys() & base.keys())
    found = spread([own[seed] - base[seed] for seed in seeds])
    if found is None:
        return None
    outcomes = _outcomes(seeds, own_correct or {}, base_correct or {})
    low = high = None
    if found["n"] >= LEAST_SEEDS and found["sd"] is not None and outcomes is not None:
        seed_half = float(stdtrit(found["n"] - 1, (1 + CONFIDENCE) / 2)) * found["sd"] / found["n"] ** 0.5
        below, above = resampled_distances(outcomes)
        low = found["mean"] - (seed_half**2 + below**2) ** 0.5
        high = found["mean"] + (seed_half**2 + above**2) ** 0.5
    samples = None if outcomes is None else len(outcomes)
    found = {"mean": found["mean"], "low": low, "high": high, "n": found["n"], "samples": samples}
    return found | {"confidence": CONFIDENCE}


def _outcomes(seeds: Sequence[int], own: Mapping[int, np.ndarray], base: Mapping[int, np.ndarray]) -> np.ndarray | None:
    """Mean difference over seeds per test sample, -1 to 1; None if a seed's samples are missing or differ."""
    pairs = [(own[seed], base[seed]) for seed in seeds if seed in own and seed in base]
    if len(pairs) < len(seeds) or len({len(part) for pair in pairs for part in pair}) != 1:
        return None
    return np.mean([a.astype(np.float64) - b for a, b in pairs], axis=0)


def resampled_distances(outcomes: np.ndarray) -> tuple[float, float]:
    """How far the bootstrap's 2.5 % and 97.5 % quantiles of the mean lie below and above its centre.

    Args:
        outcomes: per test sample a difference, -1 to 1, `(N,)`. One sample of each extreme is added.

    The draws are seeded: the same outcomes give the same bits.

    >>> below, above = resampled_distances(np.zeros(1000))  # two of 1002 samples differ: 1.96 * sqrt(2) / 1002
    >>> 0.0015 < below < 0.004, 0.0015 < above < 0.004
    (True, True)
    """
    values, counts = np.unique(np.append(outcomes, (-1.0, 1.0)), return_counts=True)
    size = int(counts.sum())
    means = np.random.default_rng(0).multinomial(size, counts / size, size=DRAWS) @ values / size
    centre = float(counts @ values) / size
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return centre - float(low), float(high) - centre


def summarise(
    rows: Sequence[dict[str, Any]],
    correct: Mapping[str, Mapping[int, np.ndarray]] | None = None,
    metric: Metric = ACCURACY,
) -> dict[str, dict[str, Any]]:
    """Per rule: spread of every quantity, failures with their reasons, difference to the baseline in the metric.

    Args:
        rows: of `result_row`.
        correct: per rule and seed, which test samples were classified correctly.
        metric: by which rules are compared.
    """
    correct, found = correct or {}, {}
    for label in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == label]
        done = [row for row in own if row["status"] == "ok"]
        summary: dict[str, Any] = {
            "n": len(done),
            "test_samples": next((len(samples) for samples in correct.get(label, {}).values()), None),
            "failed": [{"seed": row["seed"], "reason": row["reason"]} for row in own if row["status"] == "failed"],
            "lr": own[0]["lr"],
            "weight_decay": own[0]["weight_decay"],
        }
        named = {f"{part}_{metric.name}": f"{part}_{metric.name}" for part in ("test", "val")}
        summary |= {name: spread([row[key] for row in done]) for name, key in named.items()}
        summary |= {name: spread([read(row) for row in done]) for name, read in QUANTITIES.items()}
        summary[f"difference_to_{BASELINE}"] = (
            None
            if label == BASELINE
            else paired_difference(
                _by_seed(rows, label, metric),
                _by_seed(rows, BASELINE, metric),
                correct.get(label),
                correct.get(BASELINE),
            )
        )
        found[label] = summary
    return found


def _by_seed(rows: Sequence[dict[str, Any]], label: str, metric: Metric) -> dict[int, float]:
    return {row["seed"]: row[f"test_{metric.name}"] for row in rows if row["rule"] == label and row["status"] == "ok"}


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
    """A number that should be the same for every seed; with its spread if it is not.

    >>> exact({"mean": 4.25, "sd": 0.0, "n": 3}, 2)
    '4.25'
    """
    return plus_minus(found if found is None or found["sd"] else found | {"sd": None}, digits)


def difference_in_words(found: dict[str, Any] | None, metric: Metric = ACCURACY) -> str:
    """A paired difference, of shares in percentage points, with its interval if there is one."""
    if found is None:
        return "-"
    mean, low, high = (
        None if found[name] is None else f"{metric.factor * found[name]:+.{metric.digits}f}"
        for name in ("mean", "low", "high")
    )
    return str(mean) if low is None or high is None else f"{mean} ({low} .. {high})"


def resolution_in_words(summary: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What one test sample is worth, and what an interval covers; None if the number of samples is not known.

    >>> resolution_in_words({"sll": {"test_samples": 360}})[:58]
    'test split: 360 samples, so that one sample is 0.28 points'
    """
    sizes = {found["test_samples"] for found in summary.values() if found.get("test_samples")}
    if not sizes:
        return None
    least = min(sizes)
    return (
        f"test split: {least:,} samples, so that one sample is {100 / least:.2g} points; an interval covers seeds and "
        f"test samples, and needs {LEAST_SEEDS} seeds"
    )


def columns(metric: Metric = ACCURACY, fitted: bool = False) -> tuple[str, ...]:
    """Names of the columns of the table; `fitted` says whether rules were brought under a peak.

    >>> columns()[2:4]
    ('test accuracy, %', 'difference to backprop')
    """
    difference = "difference to backprop" + ("" if metric.larger else " (less is better)")
    found = ("rule", "n", f"test {metric.title}", difference, "act. + grad., MiB", "peak, MiB", "seconds")
    return (*found, "within the peak by", "time per sample / backprop") if fitted else found


def table_rows(summary: dict[str, dict[str, Any]], metric: Metric = ACCURACY) -> list[tuple[str, ...]]:
    """The rows of the printed table, in the order of `columns`; a rule without a finished run shows the reason."""
    rows = []
    fitted = is_fitted(summary)
    for label, found in summary.items():
        if not found["n"]:
            reason = f"failed: {found['failed'][0]['reason']}" if found["failed"] else "not run"
            if "fit" in found and not found["fit"]["reached"]:
                reason = how_far(found["fit"])
            rows.append((label, "0", reason, *[""] * (len(columns(metric, fitted)) - 3)))
            continue
        rows.append(
            (
                label,
                str(found["n"]) + (f" ({len(found['failed'])} failed)" if found["failed"] else ""),
                plus_minus(found.get(f"test_{metric.name}"), metric.digits, metric.factor),
                difference_in_words(found[f"difference_to_{BASELINE}"], metric),
                exact(found["activations_gradients_mib"], 2),
                exact(found["peak_mib"], 2),
                plus_minus(found["train_seconds"], 1),
                *(_fit_cells(found.get("fit")) if fitted else ()),
            )
        )
    return rows


def is_fitted(summary: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether rules were brought under a peak."""
    return any("fit" in found for found in summary.values())


def notes_of_fits(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warnings about rules that were brought under a peak: where parts of a batch change the result.

    >>> fit = {"notes": ["batch norm sees parts"]}
    >>> notes_of_fits({"sll": {"fit": fit}, "backprop": {"fit": fit}})
    ['sll, backprop: batch norm sees parts']
    """
    labels_of: dict[str, list[str]] = {}
    for label, found in summary.items():
        for note in found["fit"]["notes"] if "fit" in found else ():
            labels_of.setdefault(note, []).append(label)
    return [f"{', '.join(labels)}: {note}" for note, labels in labels_of.items()]


def _fit_cells(fit: Mapping[str, Any] | None) -> tuple[str, str]:
    """How a rule came under the peak, and its time as a multiple of plain backpropagation's."""
    if fit is None:
        return "-", "-"
    return how_in_words(fit), "-" if fit.get("ratio") is None else f"{fit['ratio']:.2f}"


def summary_table(summary: dict[str, dict[str, Any]], metric: Metric = ACCURACY, width: int = 10**6) -> str:
    """The table in aligned columns, or one block of lines per rule if the terminal is too narrow."""
    return table([columns(metric, is_fitted(summary)), *table_rows(summary, metric)], width)
