"""Tensors in nested containers: batches, and what modules return."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with `function` applied to every tensor; other values stay as they are.

    Containers are tuples, lists, dictionaries, whatever is registered as a tree with torch, and dataclasses.

    >>> mapped({"x": (torch.ones(2), 3)}, lambda t: t + 1)
    {'x': (tensor([2., 2.]), 3)}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    if type(tree) in (tuple, list):  # the usual trees, without torch's registry
        return type(tree)([mapped(value, function) for value in tree])
    if type(tree) is dict:
        return {name: mapped(value, function) for name, value in tree.items()}
    leaves, form = tree_flatten(tree)
    return tree_unflatten([_mapped_leaf(leaf, function) for leaf in leaves], form)


def _mapped_leaf(leaf: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        return function(leaf)
    if isinstance(leaf, Mapping):  # one that torch does not know; most can be copied and assigned to
        found = copy.copy(leaf)
        for name, value in leaf.items():
            found[name] = mapped(value, function)  # pyright: ignore[reportIndexIssue]
        return found
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        found = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(found, field.name, mapped(getattr(leaf, field.name), function))
        return found
    return leaf


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(tree, note)
    return found


def copied(tree: Any) -> Any:
    """The same containers with a copy of every tensor; one that stands in several places has one copy.

    >>> x = torch.ones(2)
    >>> a, b = copied((x, x))
    >>> a is b, a is x
    (True, False)
    """
    made: dict[int, Tensor] = {}

    def copy_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = tensor.clone()
        return made[id(tensor)]

    return mapped(tree, copy_of)


def replaced(tree: Any, old: Tensor, new: Tensor, detach: bool) -> Any:
    """The tree with `new` wherever `old` was; the other tensors without their history, if `detach`."""
    return mapped(tree, lambda t: new if t is old else (t.detach() if detach else t))


def all_finite(tree: Any) -> bool:
    """Whether all numbers are finite; this waits for the device."""
    return all(bool(torch.isfinite(t).all()) for t in tensors(tree))


def detach(tree: Any) -> Any:
    """The same tree with detached tensors; this call separates the graphs of two groups."""
    return mapped(tree, Tensor.detach)
