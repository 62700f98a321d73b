"""Contexts in which models run without a trace: every mode is put back, buffers are copies."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from layerwise.core.blocks import Partition


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """A context in which all modules are in evaluation mode; every module gets its own mode back after it.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluation_mode(net):
    ...     net[0].training
    False
    >>> [module.training for module in net]
    [True, False]
    """
    inner = [model.model if isinstance(model, Partition) else model for model in models]
    modules = [module for model in (*models, *inner) for module in model.modules()]
    modes = [(module, module.training) for module in modules]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def scratch_buffers(places: Iterable[tuple[dict[str, Any], str]]) -> Iterator[None]:
    """A context in which modules run on copies of their buffers, so that a pass moves none of them.

    The modules get copies, and the buffers themselves stay out of the graph. To put values back after the pass would
    change tensors in place that the backward pass may still need.

    Args:
        places: registries of modules, and the names there; what is no buffer is left alone.

    >>> import torch
    >>> norm = nn.BatchNorm1d(2)
    >>> with scratch_buffers([(norm._buffers, name) for name in norm._buffers]):
    ...     out = norm(torch.randn(4, 2))
    >>> norm.running_mean, norm.num_batches_tracked
    (tensor([0., 0.]), tensor(0))
    """
    found = [(registry, name, registry[name]) for registry, name in places]
    buffers = [entry for entry in found if isinstance(entry[2], Tensor) and not isinstance(entry[2], nn.Parameter)]
    for registry, name, buffer in buffers:
        registry[name] = buffer.clone()
    try:
        yield
    finally:
        for registry, name, buffer in buffers:
            registry[name] = buffer
