"""What each block of a forward pass uses: parameters, buffers, and tensors that blocks before it have made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class Crossing:
    """A tensor that blocks use although an earlier block, or none, has made it."""

    what: str
    """The operation that made it, or its place in the batch."""
    shape: tuple[int, ...]
    dtype: str
    made: int
    """Number of the block that made it; -1 for the batch itself."""
    stopped: bool = False
    """Whether a gradient would cross with it, and is stopped."""
    kept: bool = False
    """Whether it keeps the graph of its block alive, since the forward pass itself holds it, not a cut's output."""
    used: set[int] = field(default_factory=set)
    """Numbers of the later blocks that use it."""

    def __str__(self) -> str:
        return f"{self.what} {self.dtype} {self.shape}"


class Uses(TorchDispatchMode):
    """Notes what the operations of each block work on, while a pass is run block by block under it.

    Args:
        named: the model's parameters and buffers under one name each.
        batch: the tensors of the batch by their places in it.
    """

    def __init__(self, named: Mapping[str, Tensor], batch: Sequence[tuple[str, Tensor]]):
        super().__init__()
        self.block = 0
        self.used: dict[str, set[int]] = {name: set() for name in named}
        self._names = {id(tensor): name for name, tensor in named.items()}
        self._made: Any = WeakIdKeyDictionary()
        self._crossings: dict[int, Crossing] = {}
        for place, tensor in batch:
            self._made[tensor] = Crossing(place, tuple(tensor.shape), _dtype(tensor), -1)

    @property
    def crossings(self) -> list[Crossing]:
        """What crosses, in the order in which it was first used across a cut."""
        return list(self._crossings.values())

    def hand_over(self, tensor: Tensor) -> None:
        """The tensor is what a block hands to the next one, which is no crossing."""
        self._made.pop(tensor, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # a cut takes a tensor's history away; that alone is no use of it
            return self._detached(args[0], func(*args))
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor not in self._made and id(tensor) not in self._names:
                name = str(func).split(".")[1]
                self._made[tensor] = Crossing(name, tuple(tensor.shape), _dtype(tensor), self.block)
        return out

    def _detached(self, tensor: Tensor, out: Tensor) -> Tensor:
        name, made = self._names.get(id(tensor)), self._made.get(tensor)
        if name is not None:
            self.used[name].add(self.block)
        elif made is not None:
            made.stopped = made.stopped or tensor.requires_grad
            self._made[out] = made
        return out

    def _note(self, tensor: Tensor) -> None:
        name = self._names.get(id(tensor))
        if name is not None:
            self.used[name].add(self.block)
            return
        made = self._made.get(tensor)
        # Every block may look at the batch; what counts is that it is looked at after the first one.
        if made is not None and max(made.made, 0) < self.block:
            made.kept = made.kept or tensor.requires_grad
            made.stopped = made.stopped or made.kept
            made.used.add(self.block)
            self._crossings[id(made)] = made


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
