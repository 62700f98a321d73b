"""Shared by the rules with feedback matrices: the error at the outputs, and layers with feedback of their own."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.layers import CONVOLUTIONS, convolution_backward, holding_parameters, seeing_layers
from layerwise.core.rule import Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError

Derivative = Literal["own", "one", "step", "tanh", "cos"]
ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.Softplus, nn.ReLU6),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Mish, nn.CELU),
)
IN_PLACE_OF: Mapping[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "step": lambda a: (a > 0).to(a.dtype),
    "tanh": lambda a: 1 - a.tanh().square(),
    "cos": torch.cos,
}
"""Functions that replace the derivative of an activation."""


def projected(error: Tensor, matrix: Tensor, h: Tensor, site: Site, task: Task) -> Tensor:
    """Project an error per sample, token or pixel through a matrix `(K, ...)` to the shape of a block's output.

    An error per pixel is summed over the pixels of each place of the output.

    Args:
        error: of the shape of the task's outputs.
        matrix: `(K, *shape)` of one sample's output; `(K, C)` for tokens and pixels.
        h: the block's output.
        site: of the block.
        task: says whether there is an error per sample, token or pixel.

    Raises:
        LayerwiseError: the output has other positions than the error.
    """
    if task.positions == "pixel" and h.dim() == 4:
        places = tuple(site.standard(h).shape[2:])
        share = math.prod(error.shape[2:]) / math.prod(places)
        pooled = F.adaptive_avg_pool2d(error, (places[0], places[1])) * share
        return site.restored(torch.einsum("bkhw,kc->bchw", pooled, matrix.to(error.dtype))).to(h.dtype)
    found = torch.tensordot(task.outputs_last(error), matrix.to(error.dtype), dims=1)
    found = site.restored(found) if has_standard_order(site) else found
    if found.shape != h.shape:
        raise LayerwiseError(
            f"an error of shape {tuple(error.shape)} has one entry for every prediction, and the output of block "
            f"{site.name!r}, {tuple(h.shape)}, has other positions; cut where they agree, or choose a rule such as "
            "local_ce."
        )
    return found.to(h.dtype)


def matrix_shape(site: Site, h: Tensor, task: Task, positions: bool) -> tuple[int, ...]:
    """Shape of a feedback matrix from outputs to a block's output `h`.

    Args:
        site: of the block.
        h: a sample of the output.
        task: gives the number of outputs K.
        positions: whether there is an error per position.
    """
    h = site.standard(h) if has_standard_order(site) else h
    width = h.shape[1] if h.dim() == 4 else h.shape[-1]
    return (task.outputs, width) if positions else (task.outputs, *h.shape[1:])


def has_standard_order(site: Site) -> bool:
    """Whether the layout of a site's output is known, so that feedback does not depend on it."""
    return bool(site.layouts) and site.layouts[site.index] is not None


class LayerFeedback(nn.Module):
    """The kernel through which the error of one layer goes back, instead of the layer's own.

    Attributes:
        matrix: of the shape of the layer's weight; None if it is computed from the weight each time.
        mixing: applied to the error first, `(outputs, M)`; none in most rules.
    """

    matrix: Tensor | None
    mixing: Tensor | None

    def __init__(self, matrix: Tensor | None = None, learns: bool = False, mixing: Tensor | None = None):
        super().__init__()
        if learns:
            assert matrix is not None
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("matrix", matrix)
        self.register_buffer("mixing", mixing)

    def kernel(self, weight: Tensor, kind: str) -> Tensor:
        """The kernel for the current weight: `usf`, `frsf` and `brsf` have its signs."""
        if kind == "usf":
            return glorot(weight) * weight.sign()
        if kind in ("frsf", "brsf"):
            sizes = glorot(weight) * torch.randn_like(weight) if self.matrix is None else self.matrix
            return sizes.abs() * weight.sign()
        assert self.matrix is not None
        return self.matrix


def glorot(weight: Tensor) -> float:
    """Glorot's deviation of a weight, sqrt(2 / (fan_in + fan_out))."""
    field = math.prod(weight.shape[2:])
    return math.sqrt(2 / ((weight.shape[0] + weight.shape[1]) * field))


def fed_layers(site: Site) -> list[nn.Module]:
    """The linear layers and convolutions of a site that the error goes back through, in the model's order."""
    return [layer for layer in holding_parameters(site.block) if isinstance(layer, (nn.Linear, *CONVOLUTIONS))]


def feedback_by_layer(network: Partition, auxiliary: Mapping[int, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Every layer that has feedback, with its `LayerFeedback`."""
    found: dict[nn.Module, nn.Module] = {}
    count = len(network.blocks)
    for index, modules in auxiliary.items():
        assert isinstance(modules, nn.ModuleList)
        site = Site(index, count, "", network=network)
        found |= dict(zip(fed_layers(site), modules, strict=True))
    return found


class Fed(torch.autograd.Function):
    """Returns a layer's output unchanged; in the backward pass the error uses the feedback's kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        matrix: Tensor,
        mixing: Tensor | None,
        layer: nn.Module,
    ) -> Tensor:
        """The output."""
        ctx.save_for_backward(x, weight, bias, matrix, mixing)
        ctx.layer = layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients on the input by the feedback; on weight and bias as usual; on the feedback as on a weight."""
        (signal,) = signals
        x, weight, bias, matrix, mixing = ctx.saved_tensors
        _, on_x, on_weight, on_bias, on_matrix, _, _ = ctx.needs_input_grad
        sent = signal if mixing is None else _mixed(ctx.layer, signal, mixing)
        grad_x = _back(ctx.layer, x, sent, matrix) if on_x else None
        grad_weight = _outer(ctx.layer, x, signal, weight) if on_weight or (on_matrix and mixing is None) else None
        grad_matrix = None
        if on_matrix:
            grad_matrix = grad_weight if mixing is None else _outer(ctx.layer, x, sent, matrix)
        sums = range(signal.dim() - 1) if isinstance(ctx.layer, nn.Linear) else (0, *range(2, signal.dim()))
        grad_bias = signal.sum(tuple(sums)).to(bias.dtype) if on_bias else None
        return None, grad_x, grad_weight if on_weight else None, grad_bias, grad_matrix, None, None


def _mixed(layer: nn.Module, signal: Tensor, mixing: Tensor) -> Tensor:
    """The error through the fixed matrix, position by position."""
    mixing = mixing.to(signal.dtype)
    return signal @ mixing if isinstance(layer, nn.Linear) else torch.einsum("bo...,om->bm...", signal, mixing)


def _back(layer: nn.Module, x: Tensor, signal: Tensor, matrix: Tensor) -> Tensor:
    """The error on a layer's input."""
    matrix = matrix.to(signal.dtype)
    if isinstance(layer, nn.Linear):
        return (signal @ matrix).to(x.dtype)
    found, _ = convolution_backward(layer, x.to(signal.dtype), signal, matrix, (True, False))
    assert found is not None
    return found.to(x.dtype)


def _outer(layer: nn.Module, x: Tensor, signal: Tensor, weight: Tensor) -> Tensor:
    """The gradient on a layer's weight, or on another tensor of its shape."""
    x = x.to(signal.dtype)
    if isinstance(layer, nn.Linear):
        return (signal.reshape(-1, signal.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    return convolution_backward(layer, x, signal, weight.to(signal.dtype), (False, True))[1].to(weight.dtype)


class Augmented(torch.autograd.Function):
    """Returns an activation's output unchanged; in the backward pass another function replaces its derivative."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, a: Tensor, derivative: str) -> Tensor:
        """The output."""
        ctx.save_for_backward(a)
        ctx.derivative = derivative
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor | None, ...]:
        """The error, times the function of the activation's input."""
        (a,) = ctx.saved_tensors
        return None, signals[0] * IN_PLACE_OF[ctx.derivative](a), None


def run_with_feedback(
    block: Block, h: Tensor, feedback: Mapping[nn.Module, nn.Module], kind: str, derivative: Derivative
) -> Tensor:
    """Run a block whose layers send the error back through their feedback; activations may use another derivative.

    Args:
        block: what runs.
        h: its input.
        feedback: `LayerFeedback` by layer; other layers are unchanged.
        kind: of the kernels, see `LayerFeedback.kernel`.
        derivative: replaces that of the activations, unless "own".
    """
    if not torch.is_grad_enabled() or (not feedback and derivative == "own"):
        return block(h)

    def see(layer: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        own = feedback.get(layer)
        if own is not None:
            assert isinstance(own, LayerFeedback)
            assert isinstance(layer, (nn.Linear, *CONVOLUTIONS))
            with torch.no_grad():
                made = own.kernel(layer.weight, kind) if own.matrix is None or kind == "frsf" else None
            matrix = own.matrix if made is None else made
            return Fed.apply(out.detach(), x, layer.weight, layer.bias, matrix, own.mixing, layer)
        if derivative != "own" and isinstance(layer, ACTIVATIONS):
            return Augmented.apply(out.detach(), x, derivative)
        return None

    with seeing_layers(block, see):
        return block(h)


def alignment(feedback: Mapping[nn.Module, nn.Module], modules: nn.Module | None, kind: str) -> dict[str, Tensor]:
    """The metric `alignment`: the mean cosine between the layers' weights and the kernels of their feedback."""
    cosines = []
    for layer, own in feedback.items():
        if isinstance(modules, nn.ModuleList) and any(own is module for module in modules) and kind != "brsf":
            assert isinstance(own, LayerFeedback)
            assert isinstance(layer.weight, Tensor)
            weight, kernel = layer.weight.detach(), own.kernel(layer.weight, kind).detach()
            if own.mixing is not None:
                kernel = torch.tensordot(own.mixing, kernel, dims=1)
            cosines.append(F.cosine_similarity(weight.float().flatten(), kernel.float().flatten(), dim=0))
    return {"alignment": torch.stack(cosines).mean()} if cosines else {}
