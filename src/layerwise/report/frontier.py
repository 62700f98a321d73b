"""The frontier of a comparison under a peak: accuracy and seconds against memory."""

from collections.abc import Mapping
from typing import Any

from layerwise.core.tasks import ACCURACY, Metric
from layerwise.memory.fitting import size_in_words
from layerwise.report import figures
from layerwise.report.sections import Origin, Section
from layerwise.report.summary import how_in_words


def frontier(rules: Mapping[str, Any], looks: Any, origin: Origin, metric: Metric = ACCURACY) -> Section:
    """Two figures of the rules that were brought under a peak: what their memory costs in accuracy and in time."""
    fits = {rule: found["fit"] for rule, found in rules.items() if "fit" in found}
    peaks = {fit["peak"] for fit in fits.values()}
    peak = size_in_words(max(peaks)) if peaks else ""
    section = Section(
        f"The cheapest way to {peak}",
        "Activations + gradients at the peak of a step; every rule in the setting that brings it under the peak.",
    )
    mib, scale = "activations + gradients, MiB", metric.factor
    points = {}
    for rule, fit in fits.items():
        own = rules[rule].get(f"test_{metric.name}")
        if fit["reached"] and own is not None:
            deviation = None if own["sd"] is None else scale * own["sd"]
            points[rule] = (fit["held"] / 2**20, scale * own["mean"], deviation)
    if points:
        section.draw(
            "frontier_accuracy",
            f"{metric.words[0].upper()}{metric.words[1:]} against the peak",
            "; ".join(f"{rule}: {x:.3g} MiB, {y:.1f}" for rule, (x, y, _) in points.items()),
            lambda axes: figures.trade(axes, points, mib, f"test {metric.title}", looks, metric.larger),
            figures.height(len(points)),
            f"Test {metric.words} against memory, within a peak of {peak}.",
            origin,
        )
    paths = {rule: path for rule, fit in fits.items() if (path := path_of(fit))}
    if paths:
        text = "; ".join(
            f"{rule} ({how_in_words(fits[rule])}): " + ", ".join(f"{x:.3g} MiB at {y:.2f}" for x, y, _ in path)
            for rule, path in paths.items()
        )
        section.draw(
            "frontier_seconds",
            "Time against the peak",
            text,
            lambda axes: figures.curves(axes, paths, mib, "time per sample / backprop", looks),
            figures.height(len(paths)),
            "Time per sample as a multiple of plain backpropagation's, in steps taken in turns in one process; a line "
            "leads from a rule as it was asked for to its setting within the peak.",
            origin,
        )
    return section


def path_of(fit: Mapping[str, Any]) -> list[tuple[float, float, None]]:
    """Memory in MiB and relative time of a rule, within the peak and as it was requested.

    >>> path_of({"held": 2**20, "ratio": 1.2, "held_as_asked": 2**21, "ratio_as_asked": 1.0})
    [(1.0, 1.2, None), (2.0, 1.0, None)]
    """
    ends = [(fit["held"], fit.get("ratio")), (fit["held_as_asked"], fit.get("ratio_as_asked"))]
    return [(held / 2**20, ratio, None) for held, ratio in dict.fromkeys(ends) if ratio is not None]
