"""A meter for one step of a learner."""

from collections.abc import Sequence

import torch
from torch import nn

from layerwise.core.blocks import Partition
from layerwise.core.groups import Group
from layerwise.memory.meter import MemoryMeter, optimizer_tensors
from layerwise.parallel.alone import OneProcess
from layerwise.parallel.replicas import Replicas


def meter_of(
    network: Partition,
    auxiliary: nn.ModuleDict,
    groups: Sequence[Group],
    replicas: Replicas | OneProcess,
    device: torch.device,
) -> MemoryMeter:
    """A meter that knows a learner's parameters and optimizer state."""
    tensors = [t for own in (network, auxiliary) for t in (*own.parameters(), *own.buffers())]
    tensors += [] if network.output_copy is None else [network.output_copy]
    parameters = [p for group in groups for p in group.parameters]
    tensors += [p for p in replicas.full_of(parameters) if not any(p is t for t in parameters)]
    optimizers = [optimizer for group in groups for optimizer in group.optimizers]
    return MemoryMeter(parameters=tensors, optimizer_state=lambda: optimizer_tensors(optimizers), device=device)
