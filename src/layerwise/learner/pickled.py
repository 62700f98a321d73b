"""Pickles and unpickles a learner."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from layerwise.core.blocks import Partition
from layerwise.core.groups import Group
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError
from layerwise.memory.offload import NotOffloaded, Offload
from layerwise.parallel.alone import OneProcess, WholeNetwork
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage


class Restorable(Protocol):
    """A learner, as far as `restored` uses it."""

    _prepared: bool

    def __init__(self, model: Partition, rule: Rule, **arguments: Any): ...

    @property
    def groups(self) -> list[Group]:
        """The groups of blocks."""
        ...

    def build(self, x: Any) -> None:
        """Make the groups and their optimizers for one batch of inputs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        ...


Kind = TypeVar("Kind", bound=Restorable)


def check_can_be_pickled(
    stage: Stage | WholeNetwork, replicas: Replicas | OneProcess, offload: Offload | NotOffloaded
) -> None:
    """Raise LayerwiseError if blocks are offloaded, or on several ranks."""
    if offload.active or not stage.whole or type(replicas) is not OneProcess:
        raise LayerwiseError(
            "a learner whose blocks are offloaded or on several ranks can be neither pickled nor copied; use "
            "state_dict(), or call onload() first."
        )


def options_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The options of all parameter groups, as their owner may have set them."""
    return [{name: value for name, value in of.items() if name != "params"} for of in _parameter_groups(groups)]


def restored(
    kind: type[Kind],
    network: Partition,
    rule: Rule,
    arguments: dict[str, Any],
    example: Any,
    state: Mapping[str, Any] | None,
    prepared: bool,
    options: Sequence[Mapping[str, Any]],
) -> Kind:
    """Rebuild a learner from its parts."""
    learner = kind(network, rule, **arguments)
    if example is not None:
        learner.build(example)
    if state is not None:
        learner.load_state_dict(state)
    for group, own in zip(_parameter_groups(learner.groups), options, strict=True):
        group.update(own)
    learner._prepared = prepared
    return learner


def _parameter_groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [of for group in groups for optimizer in group.optimizers for of in optimizer.param_groups]
