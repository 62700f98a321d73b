"""Encodes values for other processes as JSON: reading them never runs code.

A pickle can name any function to call when it is read, and the sockets of a job accept connections from anyone who
reaches them. So nothing that comes from another process is unpickled.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.errors import LayerwiseError


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides and type of a tensor, which replace it in the layout of a tree."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Spec of a dense copy; the order of the dimensions in memory stays, as kernels may depend on it."""
        dense = torch.empty_like(tensor, device="meta")
        return cls(tuple(dense.shape), dense.stride(), dense.dtype)


def encode(tree: Any) -> bytes:
    """JSON of nested tuples, lists and dicts of tensors, numbers, strings, booleans and None.

    A tensor becomes its `TensorSpec`. Types are kept: a tuple comes back as a tuple.

    Raises:
        LayerwiseError: the tree contains anything else.

    >>> decode(encode({"sizes": (1, 2.5), 3: None}))
    {'sizes': (1, 2.5), 3: None}
    """
    return json.dumps(_plain(tree), separators=(",", ":")).encode()


def decode(data: bytes) -> Any:
    """The tree given to `encode`, with a `TensorSpec` instead of every tensor.

    Raises:
        LayerwiseError: `data` is not such a tree.
    """
    try:
        return _tree(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as reason:
        raise LayerwiseError(
            "a message of another rank is damaged; check that all ranks belong to one job."
        ) from reason


def _plain(tree: Any) -> Any:
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) is dict:
        return ["dict", *([_plain(key), _plain(value)] for key, value in tree.items())]
    if type(tree) in (list, tuple):
        return [type(tree).__name__, *map(_plain, tree)]
    if isinstance(tree, Tensor):
        tree = TensorSpec.of(tree)
    if isinstance(tree, TensorSpec):
        return ["tensor", tree.shape, tree.stride, str(tree.dtype).removeprefix("torch.")]
    raise LayerwiseError(
        f"a value of type {type(tree).__name__} cannot be sent to another rank; use tensors, numbers, strings, None, "
        "and tuples, lists and dicts of them."
    )


def _tree(plain: Any) -> Any:
    if not isinstance(plain, list):
        return plain
    kind, *items = plain
    if kind == "dict":
        return {_tree(key): _tree(value) for key, value in items}
    if kind == "list":
        return [_tree(item) for item in items]
    if kind == "tuple":
        return tuple(_tree(item) for item in items)
    if kind != "tensor":
        raise ValueError(kind)
    shape, stride, name = items
    dtype = getattr(torch, name)
    numbers = (*shape, *stride)
    if not isinstance(dtype, torch.dtype) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(name)
    return TensorSpec(tuple(shape), tuple(stride), dtype)


def all_gather_values(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather the values of all processes of a group, in their order.

    torch's `all_gather_object` does the same with pickles.

    Args:
        value: as for `encode`, without tensors.
        group: all processes if not given; without a process group this process is the only one.

    Raises:
        RuntimeError: a process is gone.
    """
    data = torch.frombuffer(bytearray(encode(value)), dtype=torch.uint8)
    if not dist.is_initialized():
        return [decode(data.numpy().tobytes())]
    count = dist.get_world_size(group)
    sizes = list(torch.zeros(count, 1, dtype=torch.int64, device="cpu"))
    dist.all_gather(sizes, torch.tensor([len(data)], device="cpu"), group=group)
    rows = list(torch.zeros(count, int(max(sizes)), dtype=torch.uint8, device="cpu"))
    padded = torch.zeros_like(rows[0])
    padded[: len(data)] = data
    dist.all_gather(rows, padded, group=group)
    return [decode(row[: int(size)].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]
