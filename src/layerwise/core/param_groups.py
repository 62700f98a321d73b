"""The parameter groups of an optimizer: rates under a schedule, and settings that others may change.

A group is a dictionary that the user, a scheduler of torch or a checkpoint may write into. Torch checks it only once,
when the optimizer is made: a later momentum of NaN would make the network NaN.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from operator import itemgetter
from typing import Any

import torch

from layerwise.core.ranges import Range
from layerwise.errors import LayerwiseError, short

RANGES: Mapping[str, Range] = {"weight_decay": Range(least=0), "momentum": Range(least=0)}
"""Of settings that mean the same in every optimizer; others are finite, and torch's own classes check theirs."""
OWN = ("params", "lr", "scheduled", "set_from_outside", "initial_lr", "lr_multiplier")
"""What is no setting: the rate has its own rules, `initial_lr` belongs to schedulers."""
SWITCHES = ("foreach", "fused", "capturable", "differentiable")
"""How a step is computed, which depends on the tensors."""
KEPT = "settings_at_the_start"


@dataclass
class Settings:
    """The settings of an optimizer's groups."""

    begun: list[dict[str, Any]]
    """With which it was made."""
    read: list[tuple[int, Callable[[Mapping[str, Any]], Any], Any]]
    """Entries of a group, how to read its settings, and what was read when they were last checked."""


def begin_schedule(optimizer: torch.optim.Optimizer) -> None:
    """Apply the blocks' multipliers to a new optimizer, and note the rates from which its schedule begins.

    Raises:
        LayerwiseError: it was made with a rate or a setting that is no number, which torch lets pass.
    """
    for group in optimizer.param_groups:
        multiplier = group.pop("lr_multiplier", 1.0)
        if multiplier != 1 or isinstance(group["lr"], torch.Tensor):  # torch gives one tensor to all groups
            group["lr"] = group["lr"] * multiplier
        group["scheduled"] = (_rate(group), _rate(group))
    vars(optimizer).pop(KEPT, None)
    _settings(optimizer)


def check_new(optimizer: torch.optim.Optimizer) -> None:
    """Raise LayerwiseError if an optimizer was made with a rate or a setting that is no number, which torch lets pass.

    >>> check_new(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=float("nan")))
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: an optimizer was given momentum = nan; give a finite number, 0 or larger.
    """
    for group in optimizer.param_groups:
        _rate(group)
        for name, value in group.items():
            if name not in (*OWN, "names"):
                _check(optimizer, name, value, None)


def check_settings(optimizer: torch.optim.Optimizer) -> None:
    """Raise LayerwiseError if a setting in a parameter group is not what the optimizer can use.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    >>> check_settings(optimizer)
    >>> optimizer.param_groups[0]["momentum"] = float("nan")
    >>> check_settings(optimizer)
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: an optimizer was given momentum = nan; give a finite number, 0 or larger.
    """
    kept = _settings(optimizer)
    for place, (group, (count, read, seen)) in enumerate(zip(optimizer.param_groups, kept.read, strict=True)):
        try:
            if len(group) == count and read(group) == seen:  # so in almost every step
                continue
        except (KeyError, RuntimeError, ValueError):  # one is gone, or an array that is not one number
            pass
        check_group(optimizer, place, group)
        kept.read[place] = _reading(group)


def check_group(optimizer: torch.optim.Optimizer, place: int, group: Mapping[str, Any]) -> None:
    """Raise LayerwiseError unless the optimizer's parameter group number `place` may have the settings of `group`."""
    begun = _settings(optimizer).begun[place]
    for name, made in begun.items():
        if name not in group:
            raise LayerwiseError(f"an optimizer's parameter group has no {name} any more; set it, such as to {made!r}.")
    for name, value in group.items():
        if isinstance(name, str) and name not in OWN and value is not begun.get(name):
            _check(optimizer, name, value, begun.get(name))
    cls = type(optimizer)
    if cls.__module__.startswith("torch.optim"):
        legal = _parameters(cls)
        given = {name: group[name] for name in begun if name in legal and name not in SWITCHES}
        try:
            cls([], **given)  # looks at the options first, and then at the parameters
        except (TypeError, ValueError) as reason:
            if "empty parameter list" not in str(reason):
                raise LayerwiseError(
                    f"{cls.__name__} refuses what its parameter group was set to: {reason}."
                ) from reason


def _check(optimizer: torch.optim.Optimizer, name: str, value: Any, made: Any) -> None:
    """Raise LayerwiseError unless a setting is alike to the one that the optimizer was made with, and finite."""
    usual = _parameters(type(optimizer)).get(name)
    if usual is not None and type(value) is type(usual.default) and value == usual.default:
        return  # such as a growth_rate of infinity
    allowed = RANGES.get(name, Range())
    if not _fits(value, made, allowed):
        if isinstance(made, (tuple, list, str)):
            wanted = f"something like {made!r}" + (", of finite numbers" if not isinstance(made, str) else "")
        else:
            wanted = "True or False" if isinstance(made, bool) else allowed.words
        raise LayerwiseError(f"an optimizer was given {name} = {short(value)}; give {wanted}.")


@cache
def _parameters(cls: type[torch.optim.Optimizer]) -> Mapping[str, inspect.Parameter]:
    """What a class is made with; read once, since reading takes longer than all checks of a group."""
    return inspect.signature(cls).parameters


def _fits(value: Any, made: Any, allowed: Range) -> bool:
    """Whether a value is of the kind of `made`, and its numbers are in the range; None is of every kind."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(made, torch.Tensor) and made.numel() == 1:
        made = made.item()
    if isinstance(made, (bool, str)):
        return isinstance(value, type(made))
    if isinstance(made, Real):
        return value in allowed
    if isinstance(made, (tuple, list)):
        same = isinstance(value, (tuple, list)) and len(value) == len(made)
        return same and all(_fits(v, m, allowed) for v, m in zip(value, made, strict=True))
    if isinstance(value, Real) and not isinstance(value, bool):
        return value in allowed
    return all(_fits(v, None, allowed) for v in value) if isinstance(value, (tuple, list)) else True


def _settings(optimizer: torch.optim.Optimizer) -> Settings:
    """The settings that an optimizer began with; noted, and checked, when first asked for."""
    kept = vars(optimizer).get(KEPT)
    if kept is None:
        begun = [{n: v for n, v in group.items() if n not in OWN} for group in optimizer.param_groups]
        for group in begun:
            for name, value in group.items():
                _check(optimizer, name, value, None)
        kept = Settings(begun, [_reading(group) for group in optimizer.param_groups])
        vars(optimizer)[KEPT] = kept
    return kept


def _reading(group: Mapping[str, Any]) -> tuple[int, Callable[[Mapping[str, Any]], Any], Any]:
    """How to read the settings of a group, fast, and what they are now."""
    names = [name for name in group if name not in OWN]
    read = itemgetter(*names) if names else lambda _: ()
    return len(group), read, read(group)


def own_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]] | None:
    """Per group, the settings that are no longer what the optimizer was made with; None where all of them are.

    They were set from outside, or the optimizer of another package counts there, such as its steps.
    """
    found = []
    for group, begun in zip(optimizer.param_groups, _settings(optimizer).begun, strict=True):
        kept = {name: value for name, value in group.items() if name not in OWN and _plain(value)}
        found.append({n: v for n, v in kept.items() if n not in begun or (v is not begun[n] and v != begun[n])})
    return found if any(found) else None


def set_own_settings(optimizer: torch.optim.Optimizer, settings: Sequence[Mapping[str, Any]] | None) -> None:
    """Continue from `own_settings()`."""
    groups, begun = optimizer.param_groups, _settings(optimizer).begun
    for group, made, found in zip(groups, begun, settings or [{}] * len(groups), strict=True):
        group.update(made)
        group.update({name: tuple(v) if isinstance(v, list) else v for name, v in found.items()})


def with_settings(
    optimizer: torch.optim.Optimizer, place: int, settings: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """What the parameter group number `place` would hold after `set_own_settings`."""
    group, made = optimizer.param_groups[place], _settings(optimizer).begun[place]
    return {**group, **made, **(settings[place] if settings else {})}


def _plain(value: Any) -> bool:
    """Whether JSON can hold a setting."""
    if isinstance(value, (tuple, list)):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times the schedule's factor; settings and rates are checked.

    A rate that was set from outside since the last update (by hand, or by a scheduler of `torch.optim.lr_scheduler`)
    is the rate of this update, and the schedule continues from it.
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise LayerwiseError(f"the schedule gives the factor {factor}; it is a finite number, 0 or larger.")
    check_settings(optimizer)
    for group in optimizer.param_groups:
        base, rate = group["scheduled"]
        now = _rate(group)
        if now == rate == base * factor:  # so in almost every step of a constant schedule
            continue
        if now == rate:
            _set_rate(group, base * factor)
        else:
            base = now / factor if factor else now
            group["set_from_outside"] = True
        group["scheduled"] = (base, _rate(group))


def check_schedule(group: Mapping[str, Any]) -> None:
    """Raise LayerwiseError unless the rates of a parameter group are numbers from which a schedule can continue."""
    _rate(group)
    rates = group.get("scheduled")
    right = isinstance(rates, (tuple, list)) and len(rates) == 2 and all(rate in Range(least=0) for rate in rates)
    if not right or not isinstance(group.get("set_from_outside", False), bool):
        raise LayerwiseError(f"the scheduled rates of a parameter group are {short(rates)}; they are two numbers.")


def base_rates(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """The groups' base rates where one of them was set from outside, else None."""
    groups = optimizer.param_groups
    if not any(group.get("set_from_outside") or _rate(group) != group["scheduled"][1] for group in groups):
        return None
    return [_rate(group) if _rate(group) != group["scheduled"][1] else group["scheduled"][0] for group in groups]


def set_base_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Continue from `base_rates()`."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _set_rate(group, rate)
        group["scheduled"], group["set_from_outside"] = (rate, _rate(group)), True


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group, which torch allows to be a tensor that schedulers fill."""
    rate = group.get("lr")
    if type(rate) is float and 0 <= rate < math.inf:
        return rate
    one = isinstance(rate, torch.Tensor) and rate.numel() == 1 and bool(rate.isreal().all())
    if not one and (isinstance(rate, bool) or not isinstance(rate, Real)):
        raise LayerwiseError(f"a learning rate was set to {short(rate)}; give a number.")
    number = float(rate)  # pyright: ignore[reportArgumentType]
    if not (math.isfinite(number) and number >= 0):
        raise LayerwiseError(f"a learning rate was set to {short(number)}; it is a finite number, 0 or larger.")
    return number


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group; a tensor stays the one that it is."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
