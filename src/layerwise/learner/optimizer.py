"""All optimizers of a learner as one, for code that wants to hold an optimizer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch


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
        self._own = own  # asked anew each time: loading a state replaces an optimizer's groups
        super().__init__([torch.zeros(0)], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in the order of the blocks."""
        return [group for optimizer in self._own() for group in optimizer.param_groups]

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
        """The groups are those of the blocks; none is added."""

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
        """Put optimizers that have a mode (schedule-free ones) into training mode."""
        for optimizer in self._own():
            if callable(mode := getattr(optimizer, "train", None)):
                mode()

    def eval(self) -> None:
        """Put optimizers that have a mode (schedule-free ones) into evaluation mode: weights become the averages."""
        for optimizer in self._own():
            if callable(mode := getattr(optimizer, "eval", None)):
                mode()
