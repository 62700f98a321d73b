"""What a comparison found, in plain sentences: accuracy beyond chance, memory at depth, and what limits both."""

import math
from collections.abc import Mapping
from typing import Any

from layerwise.core.tasks import ACCURACY, Metric
from layerwise.memory.fitting import size_in_words
from layerwise.report.summary import BASELINE, LEAST_SEEDS, difference_in_words
from layerwise.terminal import table

FEW = 200
"""Number of updates below which the order of rules says little about longer training."""
FLAT = 1.02
"""Ratio of largest to smallest memory up to which memory counts as constant."""


def verdict(
    rules: Mapping[str, Mapping[str, Any]],
    metric: Metric = ACCURACY,
    tuned: int = 0,
    chance: float | None = None,
    accumulate: int = 1,
) -> list[str]:
    """Sentences on what a comparison found.

    Args:
        rules: `rules` of `summary.json`.
        metric: by which rules are compared.
        tuned: trials of learning rate and weight decay per rule.
        chance: accuracy of always answering the most frequent class of the test split, 0 to 1, if it is known.
        accumulate: batches per update.

    >>> difference = {"mean": -0.02, "low": -0.03, "high": -0.01, "n": 3, "samples": 100}
    >>> held = {"4": 2**20, "64": 2**20}, {"4": 2**21, "64": 2**25}
    >>> own = {"n": 3, "steps": {"mean": 500.0}, "held_at": held[0], "difference_to_backprop": difference}
    >>> base = {"n": 3, "steps": {"mean": 500.0}, "held_at": held[1], "difference_to_backprop": None}
    >>> for sentence in verdict({"sll": own, "backprop": base}, chance=0.1):
    ...     print(sentence)
    Beyond chance, sll differs from backprop by -2.00 (-3.00 .. -1.00) points.
    At 64 blocks a step of sll holds 1 MiB of activations and gradients, 97 % less than backprop's 32 MiB; from 4 to \
64 blocks it is constant for sll.
    Every run made 500 updates; always answering the most frequent class gives 10.0 %.
    No learning rate was tuned: --tune 4 tries as many for every rule.
    """
    done = {label: found for label, found in rules.items() if found["n"]}
    if not done:
        return []
    found = [_accuracies(rules, metric), *_memory(done)]
    counts = {math.ceil(round(own["steps"]["mean"]) / accumulate) for own in done.values() if own.get("steps")}
    if counts:
        least, most = min(counts), max(counts)
        every = "Every finished run" if any(own.get("failed") for own in rules.values()) else "Every run"
        words = f"{every} made {least:,} update{'s' * (least != 1)}"
        words = words if least == most else f"Runs made {least:,} to {most:,} updates"
        words += "" if chance is None else f"; always answering the most frequent class gives {100 * chance:.1f} %"
        few = f". Under {FEW} updates the order of rules says little about longer training" if least < FEW else ""
        found.append(words + few + ".")
    if not tuned:
        found.append("No learning rate was tuned: --tune 4 tries as many for every rule.")
    return found


def _accuracies(rules: Mapping[str, Mapping[str, Any]], metric: Metric) -> str:
    if BASELINE not in rules or not rules[BASELINE]["n"]:
        return f"Nothing is said about differences, as {BASELINE} is not among the finished rules."
    if not any(own["n"] for label, own in rules.items() if label != BASELINE):
        return f"Nothing is said about differences, as no rule besides {BASELINE} has finished."
    others = {label: own[f"difference_to_{BASELINE}"] for label, own in rules.items() if label != BASELINE}
    known = {label: own for label, own in others.items() if own is not None and own["low"] is not None}
    if not known:
        return f"Differences are not told from chance: that takes {LEAST_SEEDS} seeds and a task with classes."
    unit = " points" if metric.share else ""
    beyond = {label: own for label, own in known.items() if not own["low"] <= 0 <= own["high"]}
    within = [label for label in known if label not in beyond]
    unknown = [label for label in others if label not in known]
    untold = f"; of {', '.join(unknown)} it is not known, with too few finished seeds" if unknown else ""
    if not beyond:
        who = f"{', '.join(within)}: no difference" if unknown else "No rule differs"
        return f"{who} from {BASELINE} beyond chance{untold}."
    differing = ", ".join(
        f"{label} differs from {BASELINE} by {difference_in_words(own, metric)}{unit}" for label, own in beyond.items()
    )
    rest = "" if not within else f"; {', '.join(within)}: no difference" if unknown else "; no other rule differs"
    return f"Beyond chance, {differing}{rest}{untold}."


def _memory(rules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    held = {
        label: {int(depth): size for depth, size in own["held_at"].items()}
        for label, own in rules.items()
        if own.get("held_at")
    }
    base = held.pop(BASELINE, None)
    if base is None or not held:
        return []
    depth = max(base)
    rivals = {label: sizes for label, sizes in held.items() if depth in sizes}
    if not rivals:
        return []
    best = min(rivals, key=lambda label: rivals[label][depth])
    own, other = rivals[best][depth], base[depth]
    share = 100 * abs(1 - own / other)
    words = (
        f"At {depth} blocks a step of {best} holds {size_in_words(own)} of activations and gradients, "
        f"{share:.0f} % {'less' if own <= other else 'more'} than {BASELINE}'s {size_in_words(other)}"
    )
    flat = [
        label
        for label, sizes in rivals.items()
        if len(sizes) > 1 and min(sizes) <= min(base) and max(sizes.values()) <= FLAT * min(sizes.values())
    ]
    if flat:
        words += f"; from {min(base)} to {depth} blocks it is constant for {', '.join(flat)}"
    return [words + "."]


def depth_columns(rules: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """The numbers of blocks at which rules were measured, from the least to the most."""
    return sorted({int(depth) for own in rules.values() for depth in own.get("held_at", {})})


def depth_rows(rules: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """MiB of activations + gradients per rule, in the order of `depth_columns`."""
    depths = depth_columns(rules)
    return [
        (label, *(f"{held[str(depth)] / 2**20:.2f}" if str(depth) in held else "-" for depth in depths))
        for label, own in rules.items()
        if (held := own.get("held_at"))
    ]


def depth_table(rules: Mapping[str, Mapping[str, Any]], width: int = 10**6) -> str:
    """`depth_rows` in aligned columns, as wide as the terminal at most; empty where nothing was measured.

    >>> print(depth_table({"sll": {"held_at": {"4": 2**20, "16": 2**21}}}))
    act. + grad., MiB, at  4 blocks  16 blocks
    sll                    1.00      2.00
    """
    if not (rows := depth_rows(rules)):
        return ""
    rows = [("act. + grad., MiB, at", *(f"{depth} blocks" for depth in depth_columns(rules))), *rows]
    return table(rows, width)
