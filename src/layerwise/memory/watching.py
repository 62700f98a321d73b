"""Base of the meters: a mode that sees every operation, including those of compiled functions and tensor subclasses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class WatchingMode(TorchDispatchMode, ABC):
    """Sees each operation of the code inside, in forward, backward and optimizer.

    Functions from `torch.compile` run uncompiled inside and compiled again afterwards: torch compiles nothing under a
    dispatch mode, refuses a function that has to be one graph, and keeps refusing it. For a tensor subclass that is
    made of other tensors (quantised, sharded), the operations on the inner tensors are seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stances: list[Any] = []

    def __enter__(self) -> Self:
        self._stances.append(torch.compiler.set_stance("force_eager"))
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._stances.pop().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(t) for t in tensors_of([args, list(kwargs.values())])):
            return NotImplemented  # the subclass splits this into operations, which come back here
        return self.watch(func, args, kwargs)

    @abstractmethod
    def watch(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one operation on plain tensors, and record what the meter needs."""


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or result, which nest lists and tuples only."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def plain_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that hold the numbers; for a subclass made of others, such as a sharded one, the inner tensors.

    >>> [tuple(t.shape) for t in plain_tensors([torch.ones(2, 3)])]
    [(2, 3)]
    """
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            yield from plain_tensors(part for part in inner if isinstance(part, Tensor))
        else:
            yield tensor
