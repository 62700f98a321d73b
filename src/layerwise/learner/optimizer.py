"""Presents all optimizers of a learner as one, for code that needs an optimizer."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

import torch

from layerwise.core.optim import lay_out_state
from layerwise.core.param_groups import check_group, check_schedule
from layerwise.errors import LayerwiseError
from layerwise.learner.checks import check_made_state, made_by


class EveryOptimizer(torch.optim.Optimizer):
    """Presents the optimizers of all groups as one, for schedulers of torch and code that sets rates.

    Its parameter groups are those of the groups' optimizers: a rate that is set in one takes effect at the
    next update. The learner steps the optimizers, a group at a time; `step` here only counts the updates.

    >>> from layerwise import Learner
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> learner = Learner(net, "local_ce", lr=0.1, example=torch.randn(2, 4))
    >>> schedule = torch.optim.lr_scheduler.StepLR(learner.optimizer, step_size=1, gamma=0.5)
    >>> _ = learner.step(torch.randn(8, 4), torch.randint(3, (8,)))
    >>> schedule.step()
    >>> learner.optimizer.param_groups[0]["lr"]
    0.05
    """

    def __init__(self, own: Callable[[], Iterator[torch.optim.Optimizer]]):
        self.training = True
        """Whether optimizers that have a mode are in training mode."""
        self._own = own  # read anew each time, because loading a state replaces an optimizer's groups
        super().__init__([torch.zeros(0, device="cpu")], {})
        self._ready = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in the order of the blocks."""
        groups = [group for optimizer in self._own() for group in optimizer.param_groups]
        if not groups and hasattr(self, "_ready"):
            raise LayerwiseError(
                "the learner has no optimizers yet; give it example=..., a batch of inputs, or take a step first."
            )
        return groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the first optimizer; schedulers of torch read momentum from them."""
        return next((optimizer.defaults for optimizer in self._own()), {})

    @defaults.setter
    def defaults(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base class sets its own mapping, which is not used."""

    @param_groups.setter  # type checkers and users expect an attribute here
    def param_groups(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base class sets its own list, which is not used."""

    @property
    def state(self) -> dict[Any, Any]:
        """The states of all optimizers, by parameter."""
        return {parameter: state for optimizer in self._own() for parameter, state in optimizer.state.items()}

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base class sets its own mapping, which is not used."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group: every parameter that learns is already in a group of a block.

        Raises:
            LayerwiseError: always.
        """
        if hasattr(self, "_ready"):  # the base class calls this in its constructor
            raise LayerwiseError("a learner's optimizers hold all parameters that learn; none can be added.")

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's form; a parameter without state has an empty entry, so that none can be lost."""
        packed = super().state_dict()
        for number in (number for group in packed["param_groups"] for number in group["params"]):
            packed["state"].setdefault(number, {})
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a learner whose blocks are grouped in the same way.

        Raises:
            LayerwiseError: the state has other groups of parameters, or is damaged; then nothing is changed.
        """
        parts, optimizers = [], list(self._own())
        saved, state = _read(state_dict)
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise _unfit("it has other groups of parameters")
        for optimizer in optimizers:
            mine, saved = saved[: len(optimizer.param_groups)], saved[len(optimizer.param_groups) :]
            groups = [{**now, **given} for now, given in zip(optimizer.param_groups, mine, strict=True)]
            own: dict[int, Any] = {}
            for place, group in enumerate(groups):
                check_group(optimizer, place, group)
                check_schedule(group)
                specs = {}
                parameters = optimizer.param_groups[place]["params"]
                for parameter, number in zip(parameters, mine[place]["params"], strict=True):
                    given = state.get(number)
                    if given is None and parameter.requires_grad:
                        raise _unfit(f"the state of parameter {number} is missing")
                    if given or not isinstance(given, (Mapping, NoneType)):
                        key = parameter.dim(), parameter.dtype
                        if key not in specs:
                            specs[key] = made_by(optimizer, place, group, *key)
                        check_made_state(given, specs[key], parameter, f"parameter {number}")
                    own[number] = given or {}
            numbers = {old: new for new, old in enumerate(own)}
            if len(numbers) != sum(len(group["params"]) for group in mine):
                raise _unfit("a parameter occurs twice")
            groups = [{**group, "params": [numbers[i] for i in group["params"]]} for group in groups]
            parts.append((optimizer, {"state": {numbers[i]: s for i, s in own.items() if s}, "param_groups": groups}))
        for optimizer, part in parts:
            optimizer.load_state_dict(copy.deepcopy(part))
            lay_out_state(optimizer)

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Count an update that the learner has made."""

    def count_update(self) -> None:
        """Notify the schedulers of this optimizer of an update: they watch `step`."""
        self.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients of all groups, such as those of the current update."""
        for optimizer in self._own():
            optimizer.zero_grad(set_to_none)

    def train(self) -> None:
        """Put optimizers that have a mode (schedule-free ones) into training mode, in which they begin."""
        self.training = True
        for optimizer in self._own():
            if callable(mode := getattr(optimizer, "train", None)):
                mode()

    def eval(self) -> None:
        """Put optimizers that have a mode (schedule-free ones) into evaluation mode: weights become the averages."""
        self.training = False
        for optimizer in self._own():
            if callable(mode := getattr(optimizer, "eval", None)):
                mode()


def _read(state_dict: Any) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    """The groups and the states of a state dictionary."""
    if not isinstance(state_dict, Mapping):
        raise _unfit(f"it is {type(state_dict).__name__}, not a mapping")
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(states, Mapping) or not isinstance(groups, Sequence):
        raise _unfit("'state' or 'param_groups' is missing")
    for group in groups:
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, Sequence) or not all(isinstance(number, int) for number in numbers):
            raise _unfit("a group has no numbers of parameters")
    return list(groups), states


def _unfit(reason: str) -> LayerwiseError:
    return LayerwiseError(
        f"the optimizers' state does not fit this learner: {reason}; use the rule and the model that it was made with, "
        "or take an older one."
    )
