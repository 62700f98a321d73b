"""Gradients of parameters that a rule has computed itself."""

from collections.abc import Sequence

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
            parameter.grad = found if parameter.grad is None else parameter.grad + found
