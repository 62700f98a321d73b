"""A network's output layer: the linear layer that its head calls last. Its outputs may be left to the loss."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.call_blocks import CallBlock
from layerwise.core.chains import Chain, is_overridden
from layerwise.core.chunked import LinearOutputs
from layerwise.core.coroutine import called_instead

HARMLESS = ("grad_fn", "requires_grad", "dtype", "device", "layout", "is_leaf")
"""What can be asked of outputs without computing them."""


@dataclass(eq=False)
class Watched:
    """The plain linear layer that a model has called last."""

    layer: nn.Linear | None = None

    def output_layer(self, network: Partition, outputs: int) -> nn.Linear | None:
        """The layer, where it belongs to the network's head and gives so many outputs."""
        own = {id(parameter) for parameter in network.head.parameters()}
        found = self.layer
        return found if found is not None and id(found.weight) in own and found.out_features == outputs else None


@contextmanager
def watching_linear_layers(model: nn.Module) -> Iterator[Watched]:
    """A context in which calls of a model's plain linear layers are noted; an adapter's own layers are none."""
    watched = Watched()

    def note(layer: nn.Module, *_: Any) -> None:
        watched.layer = layer  # pyright: ignore[reportAttributeAccessIssue]

    adapted = {id(part) for module in model.modules() if hasattr(module, "base_layer") for part in module.modules()}
    own = [module for module in model.modules() if type(module) is nn.Linear and id(module) not in adapted]
    handles = [module.register_forward_hook(note) for module in own]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def output_weight(network: Partition) -> Tensor:
    """The matrix of the network's output layer `(K, D)` as it is now, without history; no copy."""
    assert network.output_layer is not None
    if network.head.before is not None:
        network.head.before()  # an offloaded head has to be fetched, a sharded one gathered
    return network.output_layer.weight.detach()


class Uncomputed(Tensor):
    """Outputs that are computed only where somebody needs them: any operation of torch on them does so.

    >>> layer = nn.Linear(2, 5)
    >>> left = uncomputed(layer)(torch.ones(3, 2))
    >>> type(left).__name__, type(left * 2).__name__, (left * 2).shape
    ('Uncomputed', 'Tensor', torch.Size([3, 5]))
    """

    outputs: LinearOutputs

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = getattr(getattr(func, "__self__", None), "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if asked in HARMLESS:
                return func(*args, **(kwargs or {}))
            return func(*_computed(args), **_computed(kwargs or {}))


def _computed(given: Any) -> Any:
    if isinstance(given, Uncomputed):
        return given.outputs.whole()
    if isinstance(given, dict):
        return {name: _computed(value) for name, value in given.items()}
    return type(given)(map(_computed, given)) if type(given) in (tuple, list) else given


def uncomputed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A function in place of a linear layer's, which does not compute yet."""

    def forward(x: Tensor) -> Tensor:
        left = x.detach().as_subclass(Uncomputed)
        left.outputs = LinearOutputs(x, layer.weight, layer.bias)
        return left

    return forward


class HeadWithoutOutputs(Block):
    """A head that gives the input of its last layer, also when a checkpoint runs it again.

    Attributes:
        outputs: what that layer would give, after a call; None where something comes after it, and the outputs are
            computed as ever.
    """

    outputs: LinearOutputs | None

    def __init__(self, head: Block, layer: nn.Linear):
        self.__dict__.update(copy.copy(head).__dict__)
        self._head, self._layer, self.outputs = head, layer, None

    def __call__(self, h: Any) -> Tensor:
        with called_instead(self._layer, uncomputed(self._layer)):
            out = self._head(h)
        self.outputs = out.outputs if isinstance(out, Uncomputed) else None
        return out if self.outputs is None else self.outputs.features

    def left(self, out: Tensor) -> LinearOutputs | None:
        """The outputs that are left to the loss, given what the head gave to whoever has run it."""
        found, self.outputs = self.outputs, None
        return None if found is None else LinearOutputs(out, found.weight, found.bias)

    @property
    def ran(self) -> bool:
        return self._head.ran


def without_outputs(head: Block, layer: nn.Linear | None) -> HeadWithoutOutputs | None:
    """The head without its output layer; None where that layer cannot be left out."""
    if layer is None or not (isinstance(head, CallBlock) or isinstance(head.run, Chain)):  # made into other code
        return None
    watched = layer._forward_hooks or layer._forward_pre_hooks or is_overridden(layer)
    return None if watched else HeadWithoutOutputs(head, layer)
