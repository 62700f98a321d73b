"""Blocks whose layers are perturbed: a random number is added to every output of a layer, drawn from a seed."""

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerwise.core.blocks import Block
from layerwise.core.functional import wide
from layerwise.core.layers import has_gradients, holding_parameters, layer_gradients, seeing_layers
from layerwise.core.randomness import derive_seed
from layerwise.core.tasks import Classification, Task
from layerwise.core.tasks.classes import check_shapes
from layerwise.errors import LayerwiseError

Add = Callable[[Tensor, Tensor], Tensor]
"""Adds a random direction to a tensor."""


def as_tangent(value: Tensor, direction: Tensor) -> Tensor:
    """The value with a direction added to its tangent, in a level of forward-mode differentiation.

    Raises:
        LayerwiseError: this runs inside a function of autograd, which would drop the tangent.
    """
    if not torch._C._is_fwd_grad_enabled():  # pyright: ignore[reportAttributeAccessIssue]
        raise LayerwiseError(
            "a layer runs inside a function of autograd that lets no tangent out, such as torch's checkpoint with "
            "use_reentrant=True, so that it would not learn; call checkpoint with use_reentrant=False, or leave it out."
        )
    return value + forward_mode.make_dual(torch.zeros_like(value), direction)


def scaled(size: float) -> Add:
    """A function that adds `size` times the direction."""
    return lambda value, direction: value.add(direction, alpha=size)


@cache
def _prepare() -> None:
    """Import what torch imports at the first level, without its warning about its own use of `torch.jit.script`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


@contextmanager
def differentiable_forward() -> Iterator[None]:
    """A level of forward-mode differentiation, with the kind of attention that torch can differentiate there."""
    _prepare()
    with forward_mode.dual_level(), sdpa_kernel(SDPBackend.MATH):
        yield


def tangent_of(value: Tensor) -> Tensor:
    """The tangent, zero if there is none."""
    found = forward_mode.unpack_dual(value).tangent
    return torch.zeros_like(value) if found is None else found


@dataclass
class Call:
    """A perturbed layer's input and output, the direction on the output, and where the ReLU after it is active."""

    layer: nn.Module
    x: Tensor
    out: Tensor
    direction: Tensor
    active: Tensor | None = None


@dataclass
class Seen:
    """What a perturbed run of a block has drawn: per call of a layer, and per parameter that is perturbed itself."""

    calls: list[Call] = field(default_factory=list)
    weights: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Perturbed:
    r"""Perturbs a block: $v = a + u$ at the output a of every layer whose gradients have a closed form.

    Other parameters, such as a position embedding, are perturbed themselves. With `weights`, all parameters are, and no
    output is. Directions are standard normal numbers, a function of the seed, the block and the place. So they need not
    be stored, and are the same whenever the block runs.

    Args:
        seed: of the directions.
        add: adds a direction to an output or a parameter.
        weights: whether the parameters are perturbed instead of the outputs.
        exact: layers that are left alone, since their gradient is known.
        given: directions of the parameters, instead of drawn ones.
    """

    def __init__(
        self,
        seed: int,
        add: Add,
        weights: bool = False,
        exact: Sequence[nn.Module | None] = (),
        given: dict[Tensor, Tensor] | None = None,
    ):
        self.seed, self.add, self.weights, self.exact, self.given = seed, add, weights, exact, given

    def draw(self, block: Block, place: int | str, like: Tensor) -> Tensor:
        """The direction at a place of a block."""
        generator = torch.Generator(like.device)
        generator.manual_seed(derive_seed(self.seed, "direction", block.name, place))
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def direction(self, block: Block, holder: nn.Module, name: str, place: str) -> Tensor:
        """The direction of a parameter."""
        parameter = holder._parameters[name]
        assert parameter is not None
        return self.draw(block, place, parameter) if self.given is None else self.given[parameter]

    def parameters(self, block: Block) -> list[tuple[nn.Module, str, str]]:
        """The parameters of a block that are perturbed themselves: holder, name in it, and the key of the draw."""
        holders = [(i, m) for i, m in enumerate(holding_parameters(block)) if not any(m is one for one in self.exact)]
        chosen = [(i, m) for i, m in holders if self.weights or not has_gradients(m)]
        return [(m, name, f"{i}.{name}") for i, m in chosen for name, p in m._parameters.items() if p is not None]

    def run(self, block: Block, h: Tensor, run: Callable[[Tensor], Tensor], seen: Seen | None = None) -> Tensor:
        """The block's output for `h` when it is perturbed; what happens inside goes into `seen`."""
        if block.before is not None:
            block.before()  # an offloaded block has to be fetched before its parameters are touched
        count = 0
        outputs: dict[int, Call] = {}

        def see(layer: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
            nonlocal count
            if isinstance(layer, nn.ReLU) and seen is not None and id(x) in outputs:
                outputs[id(x)].active = x > 0
            left_alone = self.weights or not has_gradients(layer) or not any(True for _ in layer.parameters())
            if left_alone or any(layer is one for one in self.exact):
                return None
            direction = self.draw(block, count, out)
            count += 1
            found = self.add(out, direction)
            if seen is not None:
                call = Call(layer, x, found, direction)
                seen.calls.append(call)
                outputs[id(found)] = call  # kept alive by `seen`, so that the identity is its own
            return found

        places = self.parameters(block)
        own = [(holder, name, holder._parameters[name]) for holder, name, _ in places]
        try:
            for holder, name, place in places:
                parameter, direction = holder._parameters[name], self.direction(block, holder, name, place)
                assert parameter is not None
                if seen is not None:
                    seen.weights.append((parameter, direction))
                holder._parameters[name] = self.add(parameter.detach(), direction)  # pyright: ignore[reportArgumentType]
            with seeing_layers(block, see):
                return run(h)
        finally:
            for holder, name, parameter in own:
                holder._parameters[name] = parameter


def estimated(seen: Seen, slopes: Tensor, gradients: dict[Tensor, Tensor]) -> None:
    r"""Add the gradients that slopes along one direction estimate: $s_n u_n$ at a layer, $\sum_n s_n v$ of a weight.

    Args:
        seen: of the perturbed run.
        slopes: of each sample's share of the mean loss, `(B,)`.
        gradients: by parameter; changed in place.
    """
    for call in seen.calls:
        signal = slopes.to(call.direction.dtype).view(-1, *[1] * (call.direction.dim() - 1)) * call.direction
        if call.active is not None:
            signal = signal * call.active
        add_all(gradients, layer_gradients(call.layer, call.x, signal))
    for parameter, direction in seen.weights:
        add_all(gradients, {parameter: slopes.sum().to(direction.dtype) * direction})


def add_all(gradients: dict[Tensor, Tensor], more: dict[Tensor, Tensor]) -> None:
    """Add gradients to those already collected."""
    for parameter, gradient in more.items():
        gradients[parameter] = gradients[parameter] + gradient if parameter in gradients else gradient


def error_without_graph(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy on logits `(..., K)` in closed form, `(softmax - target) / N`.

    >>> error_without_graph(Classification(2), torch.zeros(2, 2), torch.tensor([0, 1]))
    tensor([[-0.2500,  0.2500],
            [ 0.2500, -0.2500]])
    """
    z, shares = _wide_with_shares(task, outputs, y)
    return shares.sum(-1, keepdim=True) * z.softmax(-1) - shares


def losses_of_samples(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """Each sample's share of the mean cross-entropy, `(B,)`."""
    z, shares = _wide_with_shares(task, outputs, y)
    return -(shares * F.log_softmax(z, -1)).flatten(1).sum(1)


def _wide_with_shares(task: Task, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float32 or wider, and `Classification.target_shares` of their type."""
    assert isinstance(task, Classification)
    check_shapes(outputs, y)
    z = wide(outputs)
    return z, task.target_shares(y).to(z.dtype)
