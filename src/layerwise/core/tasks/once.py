"""What every block would compute anew out of the same labels."""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

LARGEST = 65_536
"""Numbers in a result that is kept, so that it is small beside a batch's activations."""
_FOUND: dict[Hashable, tuple[weakref.ref[Tensor], int, Any]] = {}


def once(y: Tensor, what: Hashable, make: Callable[[Tensor], Any]) -> Any:
    """`make(y)`, kept as long as these labels live and nobody writes into them; of every `what` the last one.

    Args:
        y: labels.
        what: name of the result.
        make: a pure function of the labels, to a tensor or several.

    >>> y = torch.tensor([1, 2])
    >>> once(y, "sum", torch.sum) is once(y, "sum", torch.sum)
    True
    >>> _ = y.add_(1)
    >>> once(y, "sum", torch.sum)
    tensor(5)
    """
    if torch.is_inference_mode_enabled() or y.is_inference():  # nobody counts the changes of these
        return make(y)
    found = _FOUND.get(what)
    if found is not None and found[0]() is y and found[1] == y._version:
        return found[2]
    made = make(y)
    if sum(tensor.numel() for tensor in (made if isinstance(made, tuple) else (made,))) > LARGEST:
        return made
    _FOUND[what] = (weakref.ref(y, lambda gone: _drop(what, gone)), y._version, made)
    return made


def _drop(what: Hashable, gone: weakref.ref[Tensor]) -> None:
    """Keep nothing for labels that are no more."""
    if what in _FOUND and _FOUND[what][0] is gone:
        del _FOUND[what]
