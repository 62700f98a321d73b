"""The updates of a training step: one, or several for a rule that repeats the batch."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from layerwise.core.contract import asking, check_begin
from layerwise.core.groups import Group
from layerwise.core.pieces import RepeatsBatch
from layerwise.core.progress import Trace
from layerwise.core.trees import detach
from layerwise.learner.build import Built
from layerwise.learner.frozen import check_what_learns
from layerwise.learner.prediction import batch_context, begun


def train_on(
    built: Built, x: Any, y: Tensor, step: int, predict: Callable[[Any], Tensor], groups: Sequence[Group], trace: Trace
) -> tuple[Tensor, Any]:
    """Update all groups with a batch, as often as the rule says; schedules count all rounds as one update.

    Args:
        built: groups and engine.
        x: inputs on the device.
        y: labels.
        step: number of the training step.
        predict: the rule's prediction, for rules that use it (`UsesPrediction`).
        groups: of this update.
        trace: collects the metrics of the last round.

    Returns:
        Output and message of the last group.
    """
    check_what_learns(built)
    rule = built.setup.rule
    h, message = begun(built, x, y, step, predict)
    out = built.engine.step(groups, h, message, y, step, trace)
    for _ in range(rule.rounds() - 1 if isinstance(rule, RepeatsBatch) else 0):
        assert isinstance(rule, RepeatsBatch)
        built.engine.accumulation.updates -= 1
        with asking(rule, "`again`"):
            start = rule.again(batch_context(built, x, y, step, predict), message)
        check_begin(rule, start)
        h, message = detach(start)
        out = built.engine.step(groups, h, message, y, step, trace)
    return out
