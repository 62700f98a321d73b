"""Finds how many parts a batch needs so that a step stays within a peak of memory."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from layerwise.core.pieces import JoinsGroups, LearnsInPart, TakesTurns
from layerwise.errors import LayerwiseError
from layerwise.learner.batches import labelled
from layerwise.learner.learner import Learner
from layerwise.memory.fitting import Fit, fewest_parts, held_by, read_size, size_in_words
from layerwise.memory.meter import MemoryUse

HORIZON = 5000
"""Number of first updates to check for groups that a rule joins or skips."""


def use_of(learner: Learner, x: Any, y: Tensor | None = None) -> MemoryUse:
    """Measure the step with the most activations and gradients; this trains the learner.

    The step ends an update after the first one, because accumulated gradients count and optimizers create their state
    in the first. If a rule joins or skips groups, a step is measured for every set of groups in its first updates.
    """

    def to_the_end() -> MemoryUse:
        while learner.accumulated < learner.engine.execution.accumulate - 1:
            learner.step(x, y)
        return learner.measured_step(x, y)[1]

    learner.step(x, y)
    while learner.accumulated:
        learner.step(x, y)
    uses = [to_the_end()]
    seen = {_groups_of(learner, learner.updates - 1)}
    accumulation, varies = (
        learner.engine.accumulation,
        isinstance(learner.rule, (JoinsGroups, TakesTurns, LearnsInPart)),
    )
    for update in range(learner.updates, HORIZON if varies else 0):
        if (groups := _groups_of(learner, update)) not in seen:
            seen.add(groups)
            accumulation.updates = update
            uses.append(to_the_end())
    return max(uses, key=held_by)


def _groups_of(learner: Learner, update: int) -> tuple[Any, ...]:
    """Identify the groups of an update: the blocks in each, and which of them learn."""
    return tuple((group.name, group.learns, tuple(map(id, group.resting))) for group in learner.groups_at(update))


def fit_micro(make: Callable[[int], Learner], x: Any, y: Tensor | None, peak: int | str, least: int = 1) -> Fit:
    """Find the smallest number of parts of a batch with which a step stays within a peak.

    The figure is that of `Learner.measured_step`: activations + gradients at the moment when they are largest. For
    backpropagation parts are gradient accumulation; a local rule runs every block in parts.

    Args:
        make: returns a new learner with this number for its option `micro`; its model will be trained.
        x: inputs `(B, ...)`, as `Learner.step` takes them.
        y: labels.
        peak: bytes, or words such as `"20MiB"`.
        least: smallest number of parts to try.

    Returns:
        The fit: `micro`, the bytes `held`, and whether the peak is `reached`.

    Raises:
        LayerwiseError: `peak` is not a size, or an error of `make` or of the first step.

    >>> import torch
    >>> def make(micro):
    ...     model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    ...     return Learner(model, "backprop", micro=micro)
    >>> x, y = torch.randn(64, 8), torch.randint(3, (64,))
    >>> fit = fit_micro(make, x, y, "16KiB")
    >>> fit.reached, fit.micro > 1
    (True, True)
    """
    size = read_size(peak) if isinstance(peak, str) else peak
    return fewest_parts(lambda micro: use_of(make(micro), x, y), len(labelled(x, y)[1]), size, least)


def check_peak_reached(fit: Fit, peak: int, way: str) -> None:
    """Raise LayerwiseError if no number of parts was enough."""
    if not fit.reached:
        least = f"the smallest step of {way} holds {size_in_words(fit.held)} of activations and gradients"
        parts = f", in {fit.micro} parts" if fit.micro > 1 else ""
        why = f" ({fit.why.rstrip('.')})" if fit.why else ""
        raise LayerwiseError(
            f"peak is {size_in_words(peak)}, and {least}{parts}{why}; give a larger peak, a smaller batch or another "
            "rule."
        )
