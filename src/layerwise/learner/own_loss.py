"""Compares the loss that a model computes itself with the task's, which is the only one that trains."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.calls import CallPartition
from layerwise.core.modes import evaluation_mode
from layerwise.core.parts import MicroBatch
from layerwise.core.randomness import preserved_generators
from layerwise.core.reading import arguments, logits_in
from layerwise.core.tasks import Classification, Task
from layerwise.learner.setup import ONE_PROCESS, Setup
from layerwise.parallel.alone import WholeNetwork

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative difference of two losses that are the same, by the type of the outputs; 0.05 for others."""


def compare_own_loss(setup: Setup, task: Task, offload: Any, x: Any, y: Tensor) -> None:
    """Warn if a model that computes a loss from `labels` computes another one than the task, for two samples.

    A shift of the labels that the model does and the task does not (or the reverse) shows here, and so do further terms
    of the model's own loss, such as the balance of a router. Such models run their whole forward pass once more.

    Args:
        setup: the learner's parts.
        task: as fitted to the network.
        offload: of the learner; blocks that are not in memory are left alone.
        x: the first batch.
        y: its labels.
    """
    whole = type(setup.stage) is WholeNetwork and setup.replicas is ONE_PROCESS and not offload.active
    plain = isinstance(task, Classification) and task.weights is None and not task.label_smoothing
    network, model = setup.network, setup.network.model
    if not (whole and plain and isinstance(network, CallPartition)):
        return
    if "labels" not in inspect.signature(model.forward).parameters or any(p.is_meta for p in model.parameters()):
        return
    part = MicroBatch(slice(0, 2), len(y), index=0)
    args, kwargs = arguments(part.of(x))
    labels = part.of(y)
    with torch.no_grad(), preserved_generators(setup.device), evaluation_mode(model):
        try:
            out = model(*args, **{**kwargs, "labels": labels})
            own = out["loss"] if isinstance(out, Mapping) else out.loss
            logits = logits_in(out, network.output, type(model).__name__)
            losses = float(own), float(task.loss(logits, labels))
        except Exception:  # the model's own code, which may take no such labels or give no single number
            return
    apart, size = abs(losses[0] - losses[1]), max(map(abs, losses))
    if apart > TOLERANCE.get(logits.dtype, 0.05) * size:
        warnings.warn(
            f"the loss that {type(model).__name__} computes itself is {losses[0]:.5g} for two samples, and that of the "
            f"task {losses[1]:.5g}, which alone trains: look whether the task means the labels as the model does "
            "(LanguageModel(shift=False) where they are not shifted), or whether the model adds further terms.",
            stacklevel=2,
        )
