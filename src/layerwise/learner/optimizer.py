"""All optimizers of a learner as one, for code that wants to hold an optimizer."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from layerwise.errors import LayerwiseError


class EveryOptimizer(torch.optim.Optimizer):
    """The optimizers of all groups, seen as one: a scheduler of torch, or code that sets rates, can hold it.

    Its parameter groups are those of the groups' optimizers themselves: a rate that is set in one is honoured at the
    next update. The learner steps the optimizers, a group at a time; `step` here counts the updates and does no more.

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
        self._own = own  # asked anew each time: loading a state replaces an optimizer's groups
        super().__init__([torch.zeros(0)], {})
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
        """The defaults of the first optimizer; schedulers of torch look for momentum there."""
        return next((optimizer.defaults for optimizer in self._own()), {})

    @defaults.setter
    def defaults(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base class sets its own mapping, which is not used."""

    @param_groups.setter  # the checker knows an attribute here, and code that holds an optimizer reads one
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
        """Refuse a group: every parameter that learns is in one of a block.

        Raises:
            LayerwiseError: always.
        """
        if hasattr(self, "_ready"):  # the base class calls this when it is made
            raise LayerwiseError("a learner's optimizers hold all parameters that learn; none can be added.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a learner whose blocks are grouped in the same way.

        Raises:
            LayerwiseError: the state has other groups of parameters.
        """
        saved, state = list(state_dict["param_groups"]), state_dict["state"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise LayerwiseError("the optimizer's state has other groups of parameters; use the same rule and model.")
        for optimizer in self._own():
            mine, saved = saved[: len(optimizer.param_groups)], saved[len(optimizer.param_groups) :]
            place = {old: new for new, old in enumerate(i for group in mine for i in group["params"])}
            groups = [group | {"params": [place[i] for i in group["params"]]} for group in mine]
            own = {place[i]: copy.deepcopy(found) for i, found in state.items() if i in place}
            optimizer.load_state_dict({"state": own, "param_groups": groups})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Count an update; the learner has made it."""

    def count_update(self) -> None:
        """Tell the schedulers that hold this optimizer of an update: they watch `step`."""
        self.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients of all groups, such as those of an update under way."""
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
