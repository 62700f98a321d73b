"""Compares the loss that a model computes itself with the task's, which is the only one that trains."""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.core.calls import CallPartition
from layerwise.core.modes import evaluation_mode
from layerwise.core.parts import MicroBatch
from layerwise.core.randomness import preserved_generators
from layerwise.core.reading import arguments, logits_in
from layerwise.core.tasks import Classification, Task
from layerwise.learner.build import Built
from layerwise.learner.setup import ONE_PROCESS
from layerwise.parallel.alone import WholeNetwork

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative difference of two losses that are the same, by the type of the outputs; 0.05 for others."""


def compare_own_loss(built: Built, x: Any, y: Tensor, apart: bool) -> None:
    """Warn if a model that computes a loss from `labels` computes another one than the task, for two samples.

    A shift of the labels that the model does and the task does not (or the reverse) shows here, and so do further terms
    of the model's own loss, such as the balance of a router. Such models run their whole forward pass once more.

    Args:
        built: the learner's groups; nothing happens after the first time, and where blocks are not in memory.
        x: the first batch.
        y: its labels.
        apart: whether they were no entry of the batch; then they mean what the task says, and only a difference that
            is the same for other labels counts: the model adds something to its loss.
    """
    if built.compared:
        return
    built.compared, setup, task = True, built.setup, built.task
    whole = type(setup.stage) is WholeNetwork and setup.replicas is ONE_PROCESS and not built.offload.active
    plain = isinstance(task, Classification) and task.weights is None and not task.label_smoothing
    network, model = setup.network, setup.network.model
    if not (whole and plain and isinstance(network, CallPartition)):
        return
    if "labels" not in inspect.signature(model.forward).parameters or any(p.is_meta for p in model.parameters()):
        return
    part = MicroBatch(slice(0, 2), len(y), index=0)
    labels = part.of(y)
    with torch.no_grad(), preserved_generators(setup.device), evaluation_mode(model):
        losses = _losses(network, task, part.of(x), labels)
        if losses is None or losses.agree:
            return
        if apart:
            others = torch.where(labels < 0, labels, (labels + 1) % losses.classes)
            again = _losses(network, task, part.of(x), others)
            if again is None or abs(losses.difference - again.difference) > losses.tolerance:
                return
    name = type(model).__name__
    begin = f"the loss that {name} computes itself is {losses.own:.5g} for two samples,"
    if apart:
        warnings.warn(
            f"{begin} {abs(losses.difference):.5g} {'more' if losses.difference > 0 else 'less'} than that "
            f"of the task, and so it is for other labels: {name} adds further terms, which do not train, because the "
            "task's loss alone does.",
            stacklevel=2,
        )
        return
    warnings.warn(
        f"{begin} and that of the task {losses.task:.5g}, which alone trains: look whether the task means the "
        "labels as the model does (LanguageModel(shift=False) where they are not shifted), or whether the model adds "
        "further terms.",
        stacklevel=2,
    )


@dataclass(frozen=True)
class Losses:
    """Two losses of the same samples."""

    own: float
    """Of the model."""
    task: float
    classes: int
    tolerance: float
    """Absolute difference of losses that are the same."""

    @property
    def difference(self) -> float:
        """What the model's own loss has more than the task's."""
        return self.own - self.task

    @property
    def agree(self) -> bool:
        """Whether they are the same loss; nothing is known of one that is no number."""
        return not abs(self.difference) > self.tolerance


def _losses(network: CallPartition, task: Task, x: Any, labels: Tensor) -> Losses | None:
    """The model's own loss and the task's; None if the model computes none from these labels."""
    args, kwargs = arguments(x)
    model = network.model
    try:
        out = model(*args, **{**kwargs, "labels": labels})
        own = out["loss"] if isinstance(out, Mapping) else out.loss
        logits = logits_in(out, network.output, type(model).__name__)
        found = float(own), float(task.loss(logits, labels))
    except Exception:  # the model's own code, which may take no such labels or give no single number
        return None
    return Losses(*found, logits.shape[-1], TOLERANCE.get(logits.dtype, 0.05) * max(map(abs, found)))
