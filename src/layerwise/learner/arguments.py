"""The arguments of a learner, checked: one sentence for each of another kind."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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


def check_options(precision: str, nonfinite: str) -> None:
    """Raise LayerwiseError for a word that is none of those an option has."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise LayerwiseError(f"unknown precision {precision!r}; choose fp32, bf16 or fp16.")
    if nonfinite not in ("raise", "skip"):
        raise LayerwiseError(f"nonfinite is {nonfinite!r}; choose 'raise' or 'skip'.")
