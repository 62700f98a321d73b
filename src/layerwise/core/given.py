"""Gradients of parameters that a rule has computed itself."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from layerwise.core.groups import Group
from layerwise.core.pieces import StepsByParameter
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError


def add_given(
    rule: Rule, group: Group, given: Sequence[tuple[Tensor, Tensor]], own: Sequence[Tensor], factor: float | Tensor
) -> None:
    """Add the gradients that a rule gives in `Signal.gradients` to those that the group's parameters have.

    Args:
        rule: gave them.
        group: the blocks.
        given: pairs of a parameter and its gradient.
        own: what the group learns; frozen parameters and those that the user keeps out are left alone.
        factor: weight of the batch, or of this part of it.

    Raises:
        LayerwiseError: a parameter is of another group, or the rule's parameters step in the backward pass.
    """
    if isinstance(rule, StepsByParameter):
        raise LayerwiseError(
            f"rule {rule.name!r} gives gradients itself, and its parameters step in the backward pass; leave "
            "StepsByParameter out."
        )
    learning = {id(parameter) for parameter in own}
    here = None if group.checked else {id(p) for unit in group.units for p in unit.parameters()}
    for parameter, gradient in given:
        if here is not None and id(parameter) not in here:
            raise LayerwiseError(
                f"rule {rule.name!r} gives block {group.name!r} a gradient, of shape {tuple(gradient.shape)}, of a "
                "parameter that is not there; give those of the block and of the rule's module at its site."
            )
        if parameter.requires_grad and id(parameter) in learning:
            found = group.scaler.scale((gradient * factor).to(parameter.dtype))
            give(parameter, found, hooked=rule.builds_graph)


def give(parameter: Any, gradient: Tensor, hooked: bool = False) -> None:
    """Add a gradient to that of a parameter as a backward pass does: with the hooks that the user has registered there.

    Args:
        parameter: gets it.
        gradient: of its shape.
        hooked: whether autograd has computed it, and called the tensor's own hooks.

    >>> import torch
    >>> weight = torch.ones(2, requires_grad=True)
    >>> _ = weight.register_hook(lambda gradient: gradient * torch.tensor([1.0, 0.0]))
    >>> give(weight, torch.ones(2))
    >>> weight.grad
    tensor([1., 0.])
    """
    for hook in () if hooked else (parameter._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        hook(parameter)
