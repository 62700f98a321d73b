"""The state of a learner as a mapping: checking it, loading this rank's part, joining the parts."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.groups import Group, parameters_of
from layerwise.core.optim import in_memory_order_of, lay_out_state
from layerwise.core.param_groups import base_rates, own_settings, set_base_rates, set_own_settings
from layerwise.core.trees import mapped
from layerwise.learner.build import Built
from layerwise.learner.checks import Expected, Place, check_state
from layerwise.learner.skipping import check_under_way, continue_under_way, joined_under_way, under_way


def without_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on this rank."""
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


def set_aside(state: Mapping[str, Any], network: Partition) -> dict[str, Any]:
    """A copy of a state for later, so that nothing changes it until then; those of the network itself stay its own."""
    own = {t.data_ptr() for t in (*network.parameters(), *network.buffers()) if _is_plain(t)}
    return {
        part: mapped(held, lambda t: t if _is_plain(t) and t.data_ptr() in own else t.clone())
        for part, held in state.items()
    }


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a place in memory."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.layout == torch.strided


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the states of all stages, in the order of the ranks, to that of a whole learner."""
    merged = dict(states[-1])
    for part in ("model", "auxiliary", "optimizer", "gradients", "scaler", "rates", "settings"):
        merged[part] = {name: value for state in states for name, value in state.get(part, {}).items()}
    merged |= joined_under_way(states)
    merged["stateless"] = [name for state in states for name in state["stateless"]]
    return merged


def state_of(built: Built, skipped: int, steps: int) -> dict[str, Any]:
    """Everything that training needs to continue; see `Learner.state_dict`."""
    setup, replicas = built.setup, built.setup.replicas
    offloaded = built.offload.active
    own = [(name, replicas.shard_of(parameter)) for name, parameter in built.named_parameters()]
    moments, updated = optimizer_states(built), set(parameters_of(list(built.optimizers())))
    settings = {group.name: [own_settings(optimizer) for optimizer in group.optimizers] for group in built.groups}
    rates = {group.name: [base_rates(optimizer) for optimizer in group.optimizers] for group in built.groups}
    state = {
        "model": without_meta(setup.network.state_dict(keep_vars=offloaded)),
        "auxiliary": built.auxiliary.state_dict(keep_vars=offloaded),
        "optimizer": moments,
        "stateless": [name for name, p in own if p in updated and name not in moments],
        "gradients": {n: to_full(built, p, p.grad) for n, p in own if p.grad is not None},
        "scaler": built.grouping.scalers(),
        "rates": {name: found for name, found in rates.items() if any(found)},
        "settings": {name: found for name, found in settings.items() if any(found)},
        "accumulation": built.engine.accumulation.state(),
        "rule": setup.rule.name,
        "steps": steps,
        "skipped": skipped,
    }
    state |= built.matrix.state() | under_way(built)
    return built.offload.to_full(state)


def load_state(built: Built, state: Mapping[str, Any]) -> None:
    """Continue from `state_of()`.

    Raises:
        LayerwiseError: the state is damaged, or of another rule or model; then nothing is changed.
    """
    auxiliary = built.setup.stage.own(state["auxiliary"], built.auxiliary)
    expected = expected_of(built)
    check_state({**state, "auxiliary": auxiliary}, expected)
    check_under_way(state, expected)
    for groups in built.offload.loading(built.groups, built.resident):
        _load(built, groups, state, auxiliary)
    for group in built.groups:
        for optimizer, rates in zip(group.optimizers, state.get("rates", {}).get(group.name, []), strict=False):
            if rates is not None:
                set_base_rates(optimizer, rates)
        if "settings" in state:  # missing in the checkpoints of older versions
            of_optimizers = state["settings"].get(group.name) or [None] * len(group.optimizers)
            for optimizer, settings in zip(group.optimizers, of_optimizers, strict=True):
                set_own_settings(optimizer, settings)
    built.grouping.load_scalers(state["scaler"])
    built.engine.accumulation.load(state["accumulation"])
    built.matrix.load(state)
    continue_under_way(built, state)


def expected_of(built: Built) -> Expected:
    """Facts of the learner that a state has to fit."""
    setup, parameters = built.setup, dict(built.named_parameters())
    updated = {
        p: Place(group.name, number, place)
        for group in built.groups
        for number, optimizer in enumerate(group.optimizers)
        for place, own in enumerate(optimizer.param_groups)
        for p in own["params"]
    }
    kept = {name: setup.replicas.shard_of(parameter) for name, parameter in parameters.items()}
    return Expected(
        setup.rule.name,
        setup.network.state_dict(),
        built.auxiliary.state_dict(),
        parameters,
        {name: updated[p] for name, p in kept.items() if p in updated},
        {group.name: group.optimizers for group in built.groups},
        tuple(group.name for group in built.groups if group.scaler.is_enabled()),
        setup.execution.accumulate,
        whole=setup.stage.first and setup.stage.last,
    )


def optimizer_states(built: Built) -> dict[str, dict[str, Any]]:
    """Optimizer state per parameter name, whatever the grouping of the blocks."""
    shard_of = built.setup.replicas.shard_of
    names: dict[Tensor, str] = {shard_of(parameter): name for name, parameter in built.named_parameters()}
    return {
        names[parameter]: {name: to_full(built, parameter, value) for name, value in state.items()}
        for optimizer in built.optimizers()
        for parameter, state in optimizer.state.items()
    }


def _load(built: Built, groups: Sequence[Group], state: Mapping[str, Any], auxiliary: Mapping[str, Tensor]) -> None:
    """Load the state of these groups, whose tensors are on the device."""
    away, shard_of = built.offload.away(), built.setup.replicas.shard_of
    for module, given in ((built.setup.network, state["model"]), (built.auxiliary, auxiliary)):
        own = without_meta(module.state_dict(keep_vars=True))
        here = {name: to_shard(built, t, given[name]) for name, t in own.items() if id(t) not in away}
        module.load_state_dict(here, strict=False)
    here = {p: name for name, p in built.named_parameters() if not p.is_meta and id(p) not in away}
    names = {shard_of(p): name for p, name in here.items()}
    for group in groups:
        for optimizer in group.optimizers:
            packed = optimizer.state_dict()
            states = [(p, state["optimizer"].get(names[p])) for p in parameters_of([optimizer])]
            packed["state"] = {
                i: {name: to_shard(built, p, value) for name, value in s.items()}
                for i, (p, s) in enumerate(states)
                if s is not None
            }
            optimizer.load_state_dict(copy.deepcopy(packed))  # torch would use the given tensors themselves
            lay_out_state(optimizer)
    for parameter, name in names.items():
        gradient = state["gradients"].get(name)
        if gradient is not None:
            own = to_shard(built, parameter, gradient)
            gradient = in_memory_order_of(parameter, own.to(parameter.device, parameter.dtype, copy=True))
        parameter.grad = gradient


def to_full(built: Built, own: Tensor, value: Any) -> Any:
    """Convert a value of `own` to a part of the full tensor on all ranks; return other values unchanged."""
    return built.setup.replicas.to_full(own, value) if isinstance(value, Tensor) else value


def to_shard(built: Built, own: Tensor, given: Any) -> Any:
    """Take the shard of the whole tensor `given` that corresponds to `own`; return other values unchanged."""
    return built.setup.replicas.to_shard(own, given) if isinstance(given, Tensor) else given
