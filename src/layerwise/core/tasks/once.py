"""Keeps what every block would otherwise compute again from the labels of a batch."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

LARGEST = 65_536
"""Most numbers in a result that is kept, so that it is small compared with a batch's activations."""


def of_one_batch(y: Tensor) -> Tensor:
    """The labels of one batch, which keep what `once` computes from them.

    They are an alias that lives as long as the batch does: a loader may write the next labels into the same memory.

    >>> import torch
    >>> y = of_one_batch(torch.tensor([1, 2]))
    >>> once(y, "sum", torch.sum) is once(y, "sum", torch.sum)
    True
    """
    alias = y.detach()
    alias.made_once = {}  # pyright: ignore[reportAttributeAccessIssue]
    return alias


def once(y: Tensor, what: Hashable, make: Callable[[Tensor], Any]) -> Any:
    """`make(y)`, kept for the next call if the labels are those of `of_one_batch`; other labels keep nothing.

    Args:
        y: labels.
        what: name of the result.
        make: a pure function from the labels to one tensor or several.
    """
    kept: dict[Hashable, Any] | None = getattr(y, "made_once", None)
    if kept is None:
        return make(y)
    if what not in kept:
        made = make(y)
        if sum(tensor.numel() for tensor in (made if isinstance(made, tuple) else (made,))) > LARGEST:
            return made
        kept[what] = made
    return kept[what]
