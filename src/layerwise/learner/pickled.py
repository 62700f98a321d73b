"""Pickles and unpickles a learner."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerwise.core.blocks import Partition
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError
from layerwise.learner.build import NotBuilt
from layerwise.parallel.alone import OneProcess, WholeNetwork

if TYPE_CHECKING:
    from layerwise.learner.learner import Learner


def parts_of(learner: "Learner") -> tuple[Any, ...]:
    """Collect what `restored` needs.

    Raises:
        LayerwiseError: blocks are offloaded, or on several ranks.
    """
    alone = isinstance(learner.stage, WholeNetwork) and type(learner.replicas) is OneProcess
    if learner.offload.active or not alone:
        raise LayerwiseError(
            "a learner whose blocks are offloaded or on several ranks can be neither pickled nor copied; use "
            "state_dict(), or call onload() first."
        )
    state = learner._pending if isinstance(learner._built, NotBuilt) else learner.state_dict()
    set_by_hand = [{name: v for name, v in group.items() if name != "params"} for group in _groups(learner)]
    made_of = (type(learner), learner.network, learner.rule, learner._arguments, learner._example)
    return *made_of, state, learner._prepared, set_by_hand


def restored(
    kind: type["Learner"],
    network: Partition,
    rule: Rule,
    arguments: dict[str, Any],
    example: Any,
    state: Mapping[str, Any] | None,
    prepared: bool,
    set_by_hand: Sequence[Mapping[str, Any]],
) -> "Learner":
    """Rebuild a learner from its parts."""
    learner = kind(network, rule, **arguments)
    if example is not None:
        learner.build(example)
    if state is not None:
        learner.load_state_dict(state)
    for group, found in zip(_groups(learner), set_by_hand, strict=True):
        group.update(found)
    learner._prepared = prepared
    return learner


def _groups(learner: "Learner") -> list[dict[str, Any]]:
    return [group for own in learner.groups for optimizer in own.optimizers for group in optimizer.param_groups]
