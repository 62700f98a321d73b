"""Measures the memory of a step of each rule in deeper networks."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from layerwise import models
from layerwise.compare.rules_asked import settled_by
from layerwise.core.devices import pick_device
from layerwise.errors import LayerwiseError
from layerwise.learner.fitting import use_of
from layerwise.memory.fitting import held_by
from layerwise.runs import building
from layerwise.runs.options import TrainOptions

USUAL = (4, 16, 64)
"""Default numbers of blocks to measure."""
SHARE = 0.25
"""Largest time of an unrequested measurement of a rule's memory, as a share of the time of its runs."""
ALWAYS = 20.0
"""Seconds that measuring a rule may always take."""
METERED = 6.0
"""Time of a measurement, in plain steps: a metered step takes as long as a few plain ones, and two of these precede."""


def depths_asked(text: str) -> tuple[int, ...] | None:
    """The numbers of blocks in `--depths`; None for auto.

    Raises:
        LayerwiseError: it is not a list of positive numbers.

    >>> depths_asked("4,16"), depths_asked("none"), depths_asked("auto")
    ((4, 16), (), None)
    """
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) < 10**6 for word in words):
        raise LayerwiseError(f"--depths {text!r} is not a list such as 4,16,64; give one, or auto, or none.")
    return tuple(dict.fromkeys(map(int, words)))


def depths_of(
    label: str, options: TrainOptions, asked: tuple[int, ...] | None, plan: Mapping[str, Any], steps: int
) -> tuple[tuple[int, ...], str]:
    """The numbers of blocks at which to measure a rule, or the reason why there are none.

    Args:
        label: the rule as it was given.
        options: of its runs.
        asked: numbers of blocks; None for the usual ones, if they take little time compared with the runs.
        plan: the measured cost of a step of the rule.
        steps: of all runs of the rule.
    """
    own = getattr(options.model, "depth", None)
    if asked == () or own is None or "model.depth" in settled_by(label) or "seconds_per_step" not in plan:
        return (), ""
    if asked is not None:
        return asked, ""
    per_block = plan["seconds_per_step"] / max(1, own)
    needed = per_block * sum(USUAL) * METERED
    if needed > max(ALWAYS, SHARE * steps * plan["seconds_per_step"]):
        numbers = ",".join(map(str, USUAL))
        return (), f"memory at {numbers} blocks takes about {needed:.0f} s; ask for it with --depths {numbers}"
    return USUAL, ""


def held_at(options: TrainOptions, depths: tuple[int, ...]) -> dict[str, int]:
    """Bytes of activations + gradients of one step, by number of blocks; nothing is written.

    Args:
        options: of a run.
        depths: numbers of blocks.
    """
    if "depth" not in {field.name for field in fields(models.options(models.name_of(options.model)))}:
        return {}
    device, found = pick_device(options.device), {}
    dataset = building.load_data(options)
    for depth in depths:
        deeper = replace(options, model=replace(options.model, depth=depth), blocks=None)
        batches, _, _ = building.split_batches(deeper, dataset, device)
        learner = building.build_learner(deeper, building.DataSignature.of(dataset), device, total=3)
        x, y = next(iter(batches.epoch(0)))
        found[str(depth)] = held_by(use_of(learner, x, y))
    return found
