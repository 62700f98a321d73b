"""Checks whether a state fits a learner: names, shapes, types and ranges, before anything is loaded."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.param_groups import OWN, check_group, with_settings
from layerwise.errors import LayerwiseError, short

PARTS = ("model", "auxiliary", "optimizer", "gradients", "scaler", "rates", "accumulation")
PRIMES = (
    2,
    3,
    5,
    7,
    11,
    13,
)  # distinct sizes, which show to which dimension of a parameter a dimension of its state belongs
LARGEST = torch.finfo(torch.float32).max  # a scaler computes in float32
COUNTED = {torch.float32: 2**24, torch.float64: 2**53}  # beyond these a counter of torch no longer increases
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance", "row_var", "col_var")
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


@dataclass(frozen=True)
class Place:
    """Where a parameter is updated."""

    group: str
    """Name of the group."""
    optimizer: int
    """Which of the group's optimizers."""
    parameters: int
    """Which of its parameter groups."""


@dataclass(frozen=True)
class Expected:
    """Facts of a learner that a state has to fit.

    Attributes:
        rule: name of the rule.
        model: the model's own `state_dict`.
        auxiliary: that of the rule's modules.
        parameters: of both, by name, in full shape.
        places: where parameters are updated, by name.
        optimizers: by group.
        scalers: names of the groups that scale their gradients (fp16).
        accumulate: batches per update.
        whole: whether all blocks are here; a rank does not know the auxiliary modules of other ranks.
    """

    rule: str
    model: Mapping[str, Tensor]
    auxiliary: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    places: Mapping[str, Place]
    optimizers: Mapping[str, Sequence[torch.optim.Optimizer]]
    scalers: tuple[str, ...]
    accumulate: int
    whole: bool


def check_parts(state: Any) -> None:
    """Raise LayerwiseError unless `state` has the entries and counters of a learner's state."""
    if not isinstance(state, Mapping):
        raise unfit(f"it is {type(state).__name__}, not a mapping")
    for name in (*PARTS, "rule", "steps", "skipped"):
        if name not in state:
            raise unfit(f"{name!r} is missing")
    for name in PARTS:
        if not isinstance(state[name], Mapping):
            raise unfit(f"{name!r} is not a mapping")
    for name in ("steps", "skipped"):
        if not _is_count(state[name]):
            raise unfit(f"{name} = {short(state[name])} is not a whole number, 0 or larger")
    stateless = state.get("stateless", [])  # missing in checkpoints of older versions, which may have no settings
    if not isinstance(state.get("settings", None if "stateless" in state else {}), Mapping):
        raise unfit("'settings' is missing or not a mapping")
    if not isinstance(stateless, (list, tuple)) or not all(isinstance(name, str) for name in stateless):
        raise unfit(f"'stateless' is {short(stateless)}")
    _check_accumulation(state["accumulation"], state["steps"])
    if state["skipped"] > state["steps"]:
        raise unfit(f"{state['skipped']} of {state['steps']} steps are skipped ones")


def check_state(state: Mapping[str, Any], expected: Expected) -> None:
    """Raise LayerwiseError unless a learner can continue from `state`, after `check_parts`; nothing is changed."""
    if state["rule"] != expected.rule:
        raise LayerwiseError(
            f"the checkpoint was trained with rule {short(state['rule'])}, not {expected.rule!r}; choose the same rule."
        )
    check_same_tensors(expected.model, state["model"], "model")
    check_same_tensors(expected.auxiliary, state["auxiliary"], "rule")
    for what in ("gradients", "optimizer"):
        for name in state[what]:
            foreign = not expected.whole and str(name).startswith("auxiliary.")
            if name not in expected.parameters and not foreign:
                raise unfit(f"{what!r} names {short(name)}, which is not a parameter")
    for name, gradient in state["gradients"].items():
        if name in expected.parameters:
            own = expected.parameters[name]
            _check_tensor(gradient, own.shape, own.dtype, f"the gradient of {name!r}")
            if not expected.scalers:  # a scaled gradient may overflow, and its update is then skipped
                _check_finite(gradient, f"the gradient of {name!r}")
    for name in (name for name, parameter in expected.parameters.items() if parameter.requires_grad):
        part, own = ("auxiliary", name.removeprefix("auxiliary.")) if name.startswith("auxiliary.") else ("model", name)
        if own in state[part]:
            _check_finite(state[part][own], f"the parameter {name!r}")
    _check_rates(state["rates"], expected)
    _check_settings(state.get("settings", {}), expected)
    _check_optimizers(state, expected)
    for name in expected.scalers:
        _check_scaler(name, state["scaler"].get(name))


def check_same_tensors(own: Mapping[str, Tensor], given: Mapping[str, Any], what: str) -> None:
    """Raise LayerwiseError unless both hold tensors of the same names, shapes and types."""
    advice = f"build the {what} with the options that the checkpoint was made with"
    missing, extra = own.keys() - given.keys(), given.keys() - own.keys()
    if missing or extra:
        name = sorted(missing or extra)[0]
        where = "is missing from the checkpoint" if missing else "is not part of this one"
        raise LayerwiseError(f"the checkpoint is of another {what}: {name!r} {where}; {advice}.")
    for name, tensor in own.items():
        if not isinstance(given[name], Tensor):
            raise LayerwiseError(f"the checkpoint is of another {what}: {name!r} is not a tensor there; {advice}.")
        if tensor.shape != given[name].shape:
            raise LayerwiseError(
                f"the checkpoint is of another {what}: {name!r} has shape {tuple(given[name].shape)} there and "
                f"{tuple(tensor.shape)} here; {advice}."
            )
        if tensor.dtype != given[name].dtype:
            raise LayerwiseError(
                f"the checkpoint is of another {what}: {name!r} has type {given[name].dtype} there and "
                f"{tensor.dtype} here; {advice}."
            )


def _check_optimizers(state: Mapping[str, Any], expected: Expected) -> None:
    """Check that each parameter's state is what its optimizer would create, and that none is missing."""
    specs: dict[Any, Made | None] = {}
    learned, settings, stateless = False, state.get("settings", {}), state.get("stateless")
    for name, place in expected.places.items():
        own, optimizer = expected.parameters[name], expected.optimizers[place.group][place.optimizer]
        key = place, own.dim(), own.dtype
        if key not in specs:
            found = settings.get(place.group)
            group = with_settings(optimizer, place.parameters, found[place.optimizer] if found else None)
            specs[key] = made_by(optimizer, place.parameters, group, own.dim(), own.dtype)
        given = state["optimizer"].get(name)
        spec = specs[key]
        learned |= spec is not None and bool(spec.always)
        if given is not None:
            check_made_state(given, spec, own, name)
        elif stateless is not None and name not in stateless:  # older versions do not record which had none
            raise unfit(f"the optimizer's state of {name!r} is missing")
    accumulated = state["accumulation"]
    took_updates = accumulated["updates"] > state["skipped"] and not expected.scalers
    if learned and took_updates and expected.whole and not state["optimizer"]:
        raise unfit("the optimizers' state is missing")
    if accumulated["batches"] >= expected.accumulate:
        raise unfit(f"{accumulated['batches']} batches have accumulated, and {expected.accumulate} make an update")
    if accumulated["batches"] and learned and expected.whole and not state["gradients"]:
        raise unfit("the accumulated gradients are missing")


@dataclass(frozen=True)
class Made:
    """The state that an optimizer creates for a parameter."""

    parts: Mapping[str, Any]
    """Values by name, with the initial settings or the present ones."""
    always: frozenset[str]
    """Names that exist with both."""


def check_made_state(given: Any, spec: Made | None, own: Tensor, name: str) -> None:
    """Raise LayerwiseError unless `given` may be an optimizer's state of a parameter `own`.

    Args:
        given: the state.
        spec: of `made_by`.
        own: the parameter.
        name: of the parameter, for the error.
    """
    if not isinstance(given, Mapping):
        raise unfit(f"the optimizer's state of {name!r} is not a mapping")
    if spec is None:
        return
    for part in sorted(map(str, (spec.always - given.keys()) | (given.keys() - spec.parts.keys()))):
        raise unfit(f"the optimizer's state of {name!r} has {part!r} here or there only")
    for part, value in given.items():
        _check_made(value, spec.parts[part], own, part, name)


def made_by(
    optimizer: torch.optim.Optimizer, place: int, settings: Mapping[str, Any], dimensions: int, dtype: torch.dtype
) -> Made | None:
    """The state that an optimizer creates for a parameter with so many dimensions; None if unknown.

    Args:
        optimizer: the optimizer.
        place: number of its parameter group.
        settings: of this group now; earlier settings may have left state too, such as a momentum.
        dimensions: of the parameter.
        dtype: of the parameter.
    """
    now = state_made_by(optimizer, settings, dimensions, dtype)
    begun = with_settings(optimizer, place, None)
    first = (
        now
        if all(settings.get(n) is v for n, v in begun.items())
        else state_made_by(optimizer, begun, dimensions, dtype)
    )
    if now is None or first is None:
        return None
    return Made({**first, **now}, frozenset(first.keys() & now.keys()))


def state_made_by(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], dimensions: int, dtype: torch.dtype
) -> dict[str, Any] | None:
    """The state that an optimizer of torch creates for a parameter whose sizes are the first primes.

    A second one of the same class, with the settings of a parameter group, takes a step on such a parameter.

    Returns:
        Names and values; None if unknown, as for a user's class.
    """
    cls = type(optimizer)
    if not cls.__module__.startswith("torch.optim") or dimensions > len(PRIMES):
        return None
    legal = inspect.signature(cls).parameters
    given = {**optimizer.defaults, **settings, "lr": optimizer.defaults.get("lr")}  # the rate may be on a device
    options = {name: given[name] for name in optimizer.defaults if name in legal}
    try:
        parameter = nn.Parameter(torch.zeros(PRIMES[:dimensions], dtype=dtype, device="cpu"))
        probe = cls([parameter], **options)  # pyright: ignore[reportArgumentType]
        parameter.grad = torch.zeros_like(parameter)
        probe.step()
    except (RuntimeError, TypeError, ValueError, AssertionError):  # for example, one only for a certain device
        return None
    return dict(probe.state[parameter])


def _check_finite(given: Tensor, what: str) -> None:
    """Raise LayerwiseError if a tensor that training has written holds NaN or infinity."""
    if (given.is_floating_point() or given.is_complex()) and not bool(given.isfinite().all()):
        raise unfit(f"{what} holds NaN or infinity")


def _check_made(given: Any, made: Any, own: Tensor, part: str, name: str) -> None:
    """Raise LayerwiseError unless `given` corresponds to `made`, the state of the small parameter."""
    what = f"the optimizer's {part!r} of {name!r}"
    if not isinstance(made, Tensor):
        if type(given) is not type(made) or (isinstance(made, float) and not math.isfinite(given)):
            raise unfit(f"{what} is {short(given)}")
        return
    sides = {prime: side for prime, side in zip(PRIMES, own.shape, strict=False)}
    _check_tensor(given, torch.Size(sides.get(side, side) for side in made.shape), made.dtype, what)
    if part in SQUARES:  # squares of finite gradients may overflow
        if given.is_floating_point() and not bool((given >= 0).all()):
            raise unfit(f"{what} holds NaN or a negative number, although it is made of squares")
        return
    _check_finite(given, what)
    if part == "step" and not (0 <= float(given) <= COUNTED.get(made.dtype, math.inf) and not float(given) % 1):
        raise unfit(f"{what} is {float(given):g}, to which no optimizer counts")


def _check_tensor(given: Any, shape: torch.Size, dtype: torch.dtype, what: str) -> None:
    if not isinstance(given, Tensor):
        raise unfit(f"{what} is not a tensor")
    if given.shape != shape:
        raise unfit(f"{what} has shape {tuple(given.shape)} instead of {tuple(shape)}")
    if given.dtype != dtype:
        raise unfit(f"{what} has type {given.dtype} instead of {dtype}")


def _check_accumulation(given: Mapping[str, Any], steps: int) -> None:
    """Check the current update: how many there were before, its batches and their weights."""
    if set(given) != {"updates", "batches", "first", "weight"}:
        raise unfit("'accumulation' has other fields than updates, batches, first and weight")
    for field, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST
        if not number or (field in ("updates", "batches") and (value != int(value) or value > steps)):
            raise unfit(f"'accumulation' has {field} = {short(value)}")
    if given["updates"] + given["batches"] > steps or (given["batches"] > 0) != (given["weight"] > 0):
        raise unfit(f"'accumulation' does not belong to {steps} steps")


def _check_rates(given: Mapping[str, Any], expected: Expected) -> None:
    """Check learning rates that were set from outside: one per parameter group of a group's optimizers, or None."""
    for name, optimizers in expected.optimizers.items():
        rates, counts = given.get(name), [len(optimizer.param_groups) for optimizer in optimizers]
        if rates is None:
            continue
        right = isinstance(rates, (list, tuple)) and len(rates) == len(counts)
        for own, count in zip(rates, counts, strict=False) if right else ():
            if own is not None:
                right &= isinstance(own, (list, tuple)) and len(own) == count
                right &= right and all(isinstance(rate, (int, float)) and 0 <= rate <= LARGEST for rate in own)
        if not right:
            raise unfit(f"'rates' has {short(rates)} for {name!r}")


def _check_settings(given: Mapping[str, Any], expected: Expected) -> None:
    """Check settings of parameter groups that were changed after the start: by name, for every group, or None."""
    for name, optimizers in expected.optimizers.items():
        of_optimizers = given.get(name)
        if of_optimizers is None:
            continue
        right = isinstance(of_optimizers, (list, tuple)) and len(of_optimizers) == len(optimizers)
        for optimizer, settings in zip(optimizers, of_optimizers, strict=False) if right else ():
            if settings is None:
                continue
            right &= isinstance(settings, (list, tuple)) and len(settings) == len(optimizer.param_groups)
            right &= right and all(isinstance(group, Mapping) and not group.keys() & set(OWN) for group in settings)
            for place in range(len(optimizer.param_groups)) if right else ():
                try:
                    check_group(optimizer, place, with_settings(optimizer, place, settings))
                except LayerwiseError as reason:
                    raise unfit(str(reason).removesuffix(".")) from reason
        if not right:
            raise unfit(f"'settings' has {short(of_optimizers)} for {name!r}")


def _check_scaler(name: str, given: Any) -> None:
    """Check the names and ranges of a gradient scaler's numbers."""
    if not isinstance(given, Mapping) or set(given) != set(SCALER):
        raise unfit(f"the gradient scaler of {name!r} is missing or has other fields")
    for field in SCALER:
        value = given[field]
        if field in ("growth_interval", "_growth_tracker"):
            right = _is_count(value)
        else:
            right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST
        if not right:
            raise unfit(f"the gradient scaler of {name!r} has {field} = {short(value)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def unfit(reason: str) -> LayerwiseError:
    """The error about a state that does not fit for this reason."""
    return LayerwiseError(
        f"the checkpoint does not fit this learner: {reason}; build the learner with the options that the checkpoint "
        "was made with, or take another checkpoint."
    )
