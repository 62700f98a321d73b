"""The layers inside a block: input and output of each, and its gradients in closed form, without a graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.chains import Chain, is_sequential
from layerwise.errors import LayerwiseError

See = Callable[[nn.Module, Tensor, Tensor], Tensor | None]
"""Called with a layer, its input and its output; what it returns, if not None, replaces the output."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.RMSNorm)


_FOUND: WeakKeyDictionary[Block, dict[Any, list[nn.Module]]] = WeakKeyDictionary()
"""Modules of each block. They do not change, and finding them takes a walk through the model."""


def _once(block: Block, what: str, find: Callable[[Block], list[nn.Module]]) -> list[nn.Module]:
    found, key = _FOUND.setdefault(block, {}), (what, len(block._names))
    if key not in found:
        found[key] = find(block)
    return found[key]


def layers_of(block: Block) -> list[nn.Module]:
    """Modules without children that a block may call: those of its chain, or of its model without other blocks' layers.

    Running the head of a model that is cut at its calls once more also runs what lies before the first cut.
    """
    return _once(block, "layers", _layers_of)


def _layers_of(block: Block) -> list[nn.Module]:
    chain = block.run if isinstance(block.run, Chain) else None
    roots = [block._model] if chain is None else chain.modules
    found = [m for m in {m: None for root in roots for m in root.modules()} if not any(m.children())]
    own = {id(parameter) for parameter in block.parameters()}
    held = {m: [id(p) for p in m.parameters(recurse=False)] for m in found}
    return [m for m in found if chain is not None or not held[m] or own & {*held[m]}]


@contextmanager
def seeing_layers(block: Block, see: See) -> Iterator[None]:
    """A context in which `see(layer, x, out)` is called whenever a layer of the block has run.

    A layer is a module without children. The function may return another output, such as one with noise.

    Raises:
        LayerwiseError: the block is compiled, so that its layers are not called.

    >>> from layerwise.core.blocks import Partition
    >>> net = Partition(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ["1"])
    >>> seen = []
    >>> with seeing_layers(net.blocks[0], lambda layer, x, out: seen.append(type(layer).__name__)):
    ...     out = net.blocks[0](torch.ones(1, 2))
    >>> seen
    ['Linear', 'ReLU']
    """
    if block.compiled:
        raise LayerwiseError(
            f"block {block.name!r} is compiled, so the rule cannot access its layers, which it needs; "
            "leave compile out."
        )

    def hook(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        return see(layer, given[0], out)

    handles = [layer.register_forward_hook(hook) for layer in layers_of(block)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def has_gradients(layer: nn.Module) -> bool:
    """Whether `layer_gradients` knows the layer: linear, convolution, norm with scale and shift, embedding."""
    return type(layer) in (nn.Linear, nn.Embedding, *CONVOLUTIONS, *NORMS)


def layer_gradients(layer: nn.Module, x: Tensor, signal: Tensor) -> dict[Tensor, Tensor]:
    r"""Gradients of a layer's own parameters, given the gradient on its output: $\delta\, x^\top$ of a linear layer.

    Args:
        layer: one that `has_gradients`.
        x: its input.
        signal: the gradient on its output, of the output's shape.

    Returns:
        Parameter to gradient, for all parameters of the layer.

    >>> layer = nn.Linear(2, 1)
    >>> found = layer_gradients(layer, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [10.0]]))
    >>> found[layer.weight], found[layer.bias]
    (tensor([[31., 42.]]), tensor([11.]))
    """
    found: dict[Tensor, Tensor] = {}
    bias = getattr(layer, "bias", None)
    if isinstance(layer, nn.Linear):
        rows = signal.flatten(0, -2) if signal.dim() > 1 else signal[None]
        inputs = x.flatten(0, -2) if x.dim() > 1 else x[None]
        found[layer.weight] = rows.T @ inputs
        if bias is not None:
            found[bias] = rows.sum(0)
    elif isinstance(layer, nn.Embedding):
        rows = torch.zeros_like(layer.weight)
        rows.index_add_(0, x.flatten(), signal.flatten(0, -2).to(rows.dtype))
        if layer.padding_idx is not None:
            rows[layer.padding_idx] = 0
        found[layer.weight] = rows
    elif isinstance(layer, CONVOLUTIONS):
        found[layer.weight] = convolution_backward(layer, x, signal, layer.weight, (False, True))[1]
        if bias is not None:
            found[bias] = signal.sum((0, *range(2, signal.dim())))
    elif isinstance(layer, NORMS) and layer.weight is not None:
        scaled = signal * _normalised(layer, x)
        last = isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
        others = range(x.dim() - layer.weight.dim()) if last else (0, *range(2, x.dim()))
        found[layer.weight] = scaled.sum(tuple(others))
        if bias is not None:
            found[bias] = signal.sum(tuple(others))
    return found


def convolution_backward(
    layer: nn.Module, x: Tensor, signal: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor]:
    """Gradients on a convolution's input, as if its kernel were `weight`, and on its kernel.

    Args:
        layer: the convolution.
        x: its input.
        signal: the gradient on its output.
        weight: the kernel through which the signal goes back.
        wanted: whether the gradient on the input, and that on the kernel, is wanted.

    Returns:
        Both; None where one is not wanted.
    """
    assert isinstance(layer, CONVOLUTIONS)
    padding = layer.padding
    around = [0] * (2 * (x.dim() - 2))
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        around = list(layer._reversed_padding_repeated_twice)
        if any(around) and wanted[0] and mode != "constant":
            raise LayerwiseError(
                f"a convolution with padding_mode={mode!r} has no feedback of its own; use padding_mode='zeros'."
            )
        x, padding = (F.pad(x, around, mode=mode) if any(around) else x), (0,) * (x.dim() - 2)
    on_input, on_kernel, _ = torch.ops.aten.convolution_backward(
        signal,
        x,
        weight,
        None,
        layer.stride,
        padding,
        layer.dilation,
        False,
        [0] * (x.dim() - 2),
        layer.groups,
        [*wanted, False],
    )
    if on_input is not None and any(around):
        on_input = F.pad(on_input, [-side for side in around])
    return on_input, on_kernel


def _normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a norm before scale and shift."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps)
    assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    if layer.training or layer.running_mean is None:
        return F.batch_norm(x, None, None, training=True, eps=layer.eps)
    return F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)


def holding_parameters(block: Block) -> list[nn.Module]:
    """The modules that hold a block's parameters themselves, in the model's order.

    >>> from layerwise.core.blocks import Partition
    >>> net = Partition(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ["1"])
    >>> holding_parameters(net.blocks[0])
    [Linear(in_features=2, out_features=3, bias=True)]
    """
    return _once(block, "holding", _holding_parameters)


def _holding_parameters(block: Block) -> list[nn.Module]:
    paths = {name.rpartition(".")[0]: None for name, _ in block.named_parameters()}
    return [*{block._model.get_submodule(path): None for path in paths}]


def is_plain_chain(block: Block) -> bool:
    """Whether a block is a chain of layers, each with gradients in closed form or without parameters."""
    if not isinstance(block.run, Chain):
        return False
    modules = [m for part in block.run.modules for m in part.modules()]
    plain = all(is_sequential(m) or not any(m.children()) for m in modules)
    return plain and all(has_gradients(layer) for layer in holding_parameters(block))
