"""Finds what each block of a forward pass uses: parameters, buffers, and tensors from earlier blocks."""

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
    """Whether it keeps the graph of its block in memory, because the forward pass itself holds it."""
    used: set[int] = field(default_factory=set)
    """Numbers of the later blocks that use it."""
    needs: set[str] = field(default_factory=set)
    """Names of the parameters and buffers that it is computed from."""
    after: set[int] = field(default_factory=set)
    """Numbers of the blocks whose outputs it is computed from."""
    inside: bool = False
    """Whether a cut's own module has made it, not what the forward pass does between the cuts."""

    def __str__(self) -> str:
        return f"{self.what} {self.dtype} {self.shape}"


class Uses(TorchDispatchMode):
    """Records the tensors that each block's operations use, while a pass runs block by block.

    Args:
        named: the model's parameters and buffers under one name each.
        batch: the tensors of the batch by their places in it.
    """

    def __init__(self, named: Mapping[str, Tensor], batch: Sequence[tuple[str, Tensor]]):
        super().__init__()
        self.block = 0
        self.inside = False
        """Whether the module of a cut runs."""
        self.used: dict[str, set[int]] = {name: set() for name in named}
        self._names = {id(tensor): name for name, tensor in named.items()}
        self._made: Any = WeakIdKeyDictionary()
        self._outputs: Any = WeakIdKeyDictionary()
        self._crossings: dict[int, Crossing] = {}
        for place, tensor in batch:
            self._made[tensor] = Crossing(place, tuple(tensor.shape), _dtype(tensor), -1)

    @property
    def crossings(self) -> list[Crossing]:
        """What crosses, in the order in which it was first used across a cut."""
        return list(self._crossings.values())

    def enter(self, module: Any, args: Any) -> None:
        """The module of a cut begins to run."""
        self.inside = True

    def hand_over(self, out: Tensor, h: Tensor) -> None:
        """The tensor that a block passes to the next one is not a crossing; `h` is its detached output `out`."""
        self._made.pop(out, None)
        self._outputs[h] = self.block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # a cut takes a tensor's history away; that alone is no use of it
            return self._detached(args[0], func(*args))
        needs: set[str] = set()
        after: set[int] = set()
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor)
                self._add_sources(tensor, needs, after)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and id(tensor) not in self._names:
                made = self._made.get(tensor)
                if made is None:
                    name = str(func).split(".")[1]
                    made = self._made[tensor] = self._crossing(name, tensor)
                made.needs |= needs
                made.after |= after
        return out

    def _crossing(self, what: str, tensor: Tensor) -> Crossing:
        return Crossing(what, tuple(tensor.shape), _dtype(tensor), self.block, inside=self.inside)

    def _add_sources(self, tensor: Tensor, needs: set[str], after: set[int]) -> None:
        made = self._made.get(tensor)
        if made is not None:
            needs |= made.needs
            after |= made.after
        if id(tensor) in self._names:
            needs.add(self._names[id(tensor)])
        if tensor in self._outputs:
            after.add(self._outputs[tensor])

    def _detached(self, tensor: Tensor, out: Tensor) -> Tensor:
        name, made = self._names.get(id(tensor)), self._made.get(tensor)
        if tensor in self._outputs:
            self._outputs[out] = self._outputs[tensor]
        if name is not None:
            self.used[name].add(self.block)
            self._made[out] = self._crossing("detach", out)
            self._made[out].needs.add(name)
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
        # Every block may use the batch; only uses after the first block count.
        if made is not None and max(made.made, 0) < self.block:
            made.kept = made.kept or tensor.requires_grad
            made.stopped = made.stopped or made.kept
            made.used.add(self.block)
            self._crossings[id(made)] = made


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
