"""What a report shows of language models: bits per byte of each block over training, and text that each rule wrote."""

from typing import Any

from layerwise.core.tasks import Metric
from layerwise.report import figures
from layerwise.report.sections import Origin, Section

METRIC = "bits_per_byte"
HEAD = "head"


def blocks_over_steps(lines: dict[int, list[dict[str, Any]]]) -> dict[str, list[tuple[float, float, None]]]:
    """Per block, bits per byte of its readout on the validation split over steps: the mean over seeds.

    Args:
        lines: of each seed's log.

    >>> line = {"split": "val", "step": 5, "block1/bits_per_byte": 2.0}
    >>> blocks_over_steps({0: [line], 1: [line | {"block1/bits_per_byte": 4.0}]})
    {'block1': [(5.0, 3.0, None)]}
    """
    found: dict[str, dict[int, list[float]]] = {}
    end = f"/{METRIC}"
    for line in (line for seed in lines.values() for line in seed if line["split"] == "val"):
        for name, value in line.items():
            if name.endswith(end) and value is not None:
                found.setdefault(name.removesuffix(end), {}).setdefault(line["step"], []).append(value)
    return {
        block: [(float(step), sum(values) / len(values), None) for step, values in sorted(points.items())]
        for block, points in found.items()
    }


def loss_per_block(lines: dict[str, dict[int, list[dict[str, Any]]]], metric: Metric, origin: Origin) -> Section:
    """A figure per rule: bits per byte of every block over steps. Empty for other tasks."""
    section = Section(
        "Loss of each block", f"Validation {metric.words} of each block's own readout and of the head over steps."
    )
    for rule, seeds in lines.items() if metric.name == METRIC else ():
        found = blocks_over_steps(seeds)
        if not found:
            continue
        looks = figures.look(list(found))
        ends = ", ".join(f"{block} {points[-1][1]:.3f}" for block, points in found.items())
        section.draw(
            f"blocks_{rule}",
            rule,
            f"Validation {metric.words} of each block under {rule} over steps; at the end: {ends}.",
            lambda axes, found=found, looks=looks: figures.curves(
                axes, found, "steps", f"validation {metric.title}", looks
            ),
            figures.height(len(found)),
            "Mean over seeds.",
            origin,
        )
    return section


def texts(results: dict[str, dict[int, dict[str, Any]]]) -> list[tuple[str, str, str]]:
    """The text that each rule's first run wrote: rule, prompt, continuation."""
    found = []
    for rule, seeds in results.items():
        sample = next((result["sample"] for _, result in sorted(seeds.items()) if result.get("sample")), None)
        if sample is not None:
            found.append((rule, sample["prompt"], sample["text"]))
    return found
