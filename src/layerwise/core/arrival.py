"""Parameters that step in the backward pass, each as soon as its gradient is complete."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from layerwise.core.groups import parameters_of


@contextmanager
def as_gradients_arrive(
    optimizers: Sequence[torch.optim.Optimizer], arrived: Callable[[torch.optim.Optimizer, Tensor], None]
) -> Iterator[None]:
    """A context in which `arrived` is called as soon as a gradient is complete: after all uses of the parameter.

    Args:
        optimizers: whose parameters are watched, if they want a gradient.
        arrived: gets the optimizer and the parameter.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> with as_gradients_arrive([torch.optim.SGD([weight])], lambda optimizer, p: print(p.grad)):
    ...     (3 * weight).sum().backward()
    tensor([3., 3.])
    """
    hooks = []
    for optimizer in optimizers:
        for parameter in (p for p in parameters_of([optimizer]) if p.requires_grad):

            def call(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                arrived(optimizer, p)

            hooks.append(parameter.register_post_accumulate_grad_hook(call))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
