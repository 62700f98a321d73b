"""Units that a rule renews after a step: the optimizer's state of their weights starts anew too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.core.contract import asking
from layerwise.core.groups import Group
from layerwise.core.pieces import RenewsUnits
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError


@torch.no_grad()
def renew(rule: RenewsUnits, group: Group, step: int) -> None:
    """Let the rule renew units of a group whose optimizers have stepped."""
    assert isinstance(rule, Rule)
    network = group.units[0].site.network
    assert network is not None
    auxiliary = {unit.site.index: unit.auxiliary for unit in group.units if unit.auxiliary is not None}
    with asking(rule, "`renew`"):
        renewed = rule.renew(network, auxiliary, step)
    for parameter, mask in renewed:
        forget(group.optimizers, parameter, mask)


def forget(optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor, mask: Tensor) -> None:
    """Set those entries of an optimizer's state to zero that belong to entries of a parameter.

    Counters, and state of another shape, stay as they are.

    Args:
        optimizers: one of them may have the parameter.
        parameter: whose state.
        mask: which entries, of its shape.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    >>> weight.grad = torch.ones(2)
    >>> optimizer.step()
    >>> forget([optimizer], weight, torch.tensor([True, False]))
    >>> optimizer.state[weight]["momentum_buffer"]
    tensor([0., 1.])

    Raises:
        LayerwiseError: the state is kept in a form whose entries cannot be set, such as a quantised one.
    """
    for optimizer in optimizers:
        for value in optimizer.state.get(parameter, {}).values():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if type(value) is not Tensor:
                raise LayerwiseError(
                    f"{type(optimizer).__name__} keeps its state as {type(value).__name__}, single entries of which "
                    "cannot be set to zero when a unit is renewed; choose another optimizer, such as adamw."
                )
            value.masked_fill_(mask, 0)
