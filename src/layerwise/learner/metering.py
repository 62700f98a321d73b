"""A meter for one step of a learner."""

from typing import TYPE_CHECKING

from layerwise.memory.meter import MemoryMeter, optimizer_tensors

if TYPE_CHECKING:
    from layerwise.learner.learner import Learner


def meter_of(learner: "Learner") -> MemoryMeter:
    """A meter that knows the learner's parameters and optimizer state."""
    tensors = [t for own in (learner.network, learner.auxiliary) for t in (*own.parameters(), *own.buffers())]
    tensors += [] if learner.network.output_copy is None else [learner.network.output_copy]
    parameters = [p for group in learner.groups for p in group.parameters]
    tensors += [p for p in learner.replicas.full_of(parameters) if not any(p is t for t in parameters)]
    optimizers = [optimizer for group in learner.groups for optimizer in group.optimizers]
    return MemoryMeter(parameters=tensors, optimizer_state=lambda: optimizer_tensors(optimizers), device=learner.device)
