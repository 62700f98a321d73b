"""State of an unfinished update that may be skipped: the values from before its first batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from layerwise.learner.build import Built
from layerwise.learner.checks import Expected, unfit

BEFORE, BROKEN = "before", "broken"
"""Keys of a state: buffers from before the first batch, by name; names of the groups whose update is abandoned."""


def under_way(built: Built) -> dict[str, Any]:
    """Both entries; empty between two updates, and if updates are not skipped."""
    engine = built.engine
    if not (engine.finite.skips and engine.accumulation.batches):
        return {}
    groups = built.groups_at(engine.accumulation.updates)
    before = {id(buffer): old for group in groups for buffer, old in group.buffers}
    buffers = {name: before[id(buffer)] for name, buffer in _buffers(built).items() if id(buffer) in before}
    return {BEFORE: buffers, BROKEN: [group.name for group in groups if group.broken]}


def joined_under_way(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the entries of all stages to those of a whole learner."""
    if BROKEN not in states[-1]:
        return {}
    return {
        BEFORE: {name: kept for state in states for name, kept in state[BEFORE].items()},
        BROKEN: [name for state in states for name in state[BROKEN]],
    }


def check_under_way(state: Mapping[str, Any], expected: Expected) -> None:
    """Raise LayerwiseError unless both entries fit, if they exist: older checkpoints lack them."""
    before, broken = state.get(BEFORE, {}), state.get(BROKEN, [])
    if not isinstance(broken, (list, tuple)) or not all(isinstance(name, str) for name in broken):
        raise unfit(f"{BROKEN!r} is not a list of names")
    if not isinstance(before, Mapping):
        raise unfit(f"{BEFORE!r} is not a mapping")
    own = {**expected.model, **{f"auxiliary.{name}": tensor for name, tensor in expected.auxiliary.items()}}
    for name, tensor in before.items():
        if name not in own:
            if expected.whole:
                raise unfit(f"{BEFORE!r} names {name!r}, which is not a buffer")
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise unfit(f"{name!r} in {BEFORE!r} is not a tensor of the shape and type that it has here")


def continue_under_way(built: Built, state: Mapping[str, Any]) -> None:
    """Restore the unfinished update from a state that has been checked; the rest is loaded already."""
    if not (built.engine.finite.skips and built.engine.accumulation.batches):
        return
    old = {id(buffer): state.get(BEFORE, {}).get(name) for name, buffer in _buffers(built).items()}
    for group in built.groups_at(built.engine.accumulation.updates):
        buffers = [buffer for unit in group.units for buffer in unit.buffers()]
        # A buffer that the state does not hold keeps its value.
        before = [buffer if old.get(id(buffer)) is None else old[id(buffer)].to(buffer.device) for buffer in buffers]
        group.buffers = [(buffer, own.clone()) for buffer, own in zip(buffers, before, strict=True)]
        group.broken = group.name in state.get(BROKEN, [])


def _buffers(built: Built) -> dict[str, Tensor]:
    """The tensors of model and auxiliary modules, by their names in a state."""
    auxiliary = built.auxiliary.state_dict(keep_vars=True)
    return {
        **built.setup.network.state_dict(keep_vars=True),
        **{f"auxiliary.{name}": tensor for name, tensor in auxiliary.items()},
    }
