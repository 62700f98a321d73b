"""Whether a group's signals reach the parameters that are to learn."""

import warnings
from collections.abc import Callable, Collection, Sequence

from torch import nn

from layerwise.core.groups import Group
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError


def check_reached(
    rule: Rule, group: Group, parameters: Sequence[nn.Parameter], reached: Collection[int], taught: bool
) -> None:
    """Refuse a block that the first signal does not reach, and name single parameters that it does not reach.

    Of each block, one parameter that it has reached is noted for `check_still_reached`.

    Args:
        rule: gave the signal.
        group: the blocks.
        parameters: what the blocks run with.
        reached: identities (`id`) of the parameters that got a gradient.
        taught: whether there was a loss or a cotangent.

    Raises:
        LayerwiseError: the rule has given no signal, or no parameter of a block got a gradient.
    """
    if not taught:
        raise LayerwiseError(
            f"rule {rule.name!r} gives block {group.name!r} neither a loss nor a cotangent, so it would not "
            "learn; look at the rule's options (a weight of 0), give one in `signal`, or say that it does not "
            "learn (`trains`, or `TakesTurns` for some updates)."
        )
    own = {id(p) for p in parameters}
    for unit in group.units:
        named = [(name, p) for name, p in unit.block.named_parameters() if p.requires_grad and id(p) in own]
        missed = [name for name, p in named if id(p) not in reached]
        group.reached[unit.site.index] = next((p for _, p in named if id(p) in reached), None)
        if missed and len(missed) == len(named) and rule.trains(unit.site):
            raise LayerwiseError(
                f"no parameter of block {unit.site.name!r} gets a gradient ({missed[0]}, ...), so it would not "
                "learn: its output has no history (a block that recomputes itself with use_reentrant=True, or "
                "detaches), or the loss does not depend on it; correct the block, or freeze it with "
                "requires_grad_(False)."
            )
        if missed:
            warnings.warn(
                f"these parameters of block {unit.site.name!r} get no gradient in the first step, so they do not "
                f"learn there: {', '.join(missed)}",
                stacklevel=2,
            )


def check_still_reached(group: Group, reached: Callable[[nn.Parameter], bool]) -> None:
    """Warn of a block that a later signal does not reach any more, because its forward pass has changed.

    One parameter of each block is looked at, the others only if it has got no gradient.

    Args:
        group: the blocks.
        reached: whether a parameter got a gradient in this step.
    """
    for unit in group.units:
        noted = group.reached.get(unit.site.index)
        if noted is None or not noted.requires_grad or not unit.block.ran or reached(noted):
            continue
        named = [(name, p) for name, p in unit.block.named_parameters() if p.requires_grad]
        group.reached[unit.site.index] = found = next((p for _, p in named if reached(p)), None)
        if found is None:
            warnings.warn(
                f"no parameter of block {unit.site.name!r} gets a gradient any more ({named[0][0]}, ...), so it does "
                "not learn in such steps: something in it was switched off or merged since the first step.",
                stacklevel=2,
            )
