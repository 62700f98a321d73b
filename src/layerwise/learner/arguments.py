"""The arguments of a learner, checked: one sentence for each of another kind."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerwise.core.groups import Unit
from layerwise.core.pieces import has_trunk
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError
from layerwise.parallel.alone import OneProcess
from layerwise.parallel.stage import Stage


def usable_device(device: torch.device | str) -> torch.device:
    """A device that blocks can run on."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as reason:
        said = str(reason).splitlines()[0].rstrip(".")
        raise LayerwiseError(
            f"device {device!r} cannot be used ({said}); choose one that this machine has."
        ) from reason
    if found.type == "meta":
        raise LayerwiseError("nothing can be trained on the device 'meta'; choose one that holds numbers.")
    return found


def check_types(lr_multipliers: Any, channels_last: Any, stage: Any, replicas: Any, cuts: Any, layout: Any) -> None:
    """Raise LayerwiseError for an argument of another type."""
    for name, value, kinds, wanted in (
        ("lr_multipliers", lr_multipliers, (Mapping, type(None)), "a mapping from block names to factors"),
        ("channels_last", channels_last, (bool,), "True or False"),
        ("stage", stage, (Stage, type(None)), "a Stage"),
        ("replicas", replicas, (OneProcess, type(None)), "Replicas, Shards or OneProcess()"),
        ("cuts", cuts, (str, Sequence, type(None)), "a name, a pattern, or a list of names"),
        ("layout", layout, (str, Mapping, type(None)), "a layout such as 'BCL', or a mapping from block names"),
    ):
        if not isinstance(value, kinds):
            raise LayerwiseError(f"{name} is of type {type(value).__name__}; give {wanted}.")
    if isinstance(layout, Mapping) and not all(isinstance(part, str) for item in layout.items() for part in item):
        raise LayerwiseError("layout maps block names to layouts such as 'BCL'; give words for both.")
    if isinstance(cuts, Sequence) and not all(isinstance(cut, str) for cut in cuts):
        raise LayerwiseError("cuts are names of modules; give words.")


def check_micro(rule: Rule, units: Sequence[Unit], layouts: Mapping[str, str | None]) -> None:
    """Raise LayerwiseError where a batch cannot be run in parts; warn where parts change what is learned.

    Args:
        rule: the rule.
        units: what runs here.
        layouts: of the input and of the blocks' outputs, by name.
    """
    if why := rule.whole_batch or ("trains a trunk that waits for the whole batch" if has_trunk(rule) else ""):
        raise LayerwiseError(f"rule {rule.name!r} {why}, so that it cannot be run in parts; leave micro out.")
    for name, layout in layouts.items():
        if layout is not None and not layout.startswith("B"):
            raise LayerwiseError(
                f"{name} has the layout {layout!r}, and a batch can be run in parts only along its first dimension; "
                "leave micro out, or put the batch first."
            )
    if names := [unit.site.name for unit in units if unit.running()]:
        warnings.warn(
            f"running statistics (batch norm) in {', '.join(names)} are taken from each of the parts of a batch, so "
            "that the result is not that of the whole batch",
            stacklevel=2,
        )


def check_options(precision: str, nonfinite: str) -> None:
    """Raise LayerwiseError for a word that is none of those an option has."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise LayerwiseError(f"unknown precision {precision!r}; choose fp32, bf16 or fp16.")
    if nonfinite not in ("raise", "skip"):
        raise LayerwiseError(f"nonfinite is {nonfinite!r}; choose 'raise' or 'skip'.")
