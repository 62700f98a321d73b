"""Finds norms whose output is read only by linear layers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from layerwise.core.failures import KNOWN, told_by
from layerwise.errors import LayerwiseError

HARMLESS = {"__get__", "size", "dim", "numel", "__len__", "stride", "is_contiguous", "is_floating_point"}
"""Functions that use a tensor's shape or type, not its numbers."""


class _Noted(TorchFunctionMode):
    """Records the uses of norms' outputs, and the inputs of linear layers."""

    def __init__(self, linear: Mapping[int, nn.Linear]):
        super().__init__()
        self.linear = linear
        self.made: dict[int, tuple[Tensor, nn.Module]] = {}
        """The outputs by their ids, kept so that no id is reused."""
        self.reads: dict[nn.Linear, set[int | None]] = {}
        """Per linear layer, the ids of the norms that it has read; None for anything else."""
        self.others: set[int] = set()
        """Norms whose output something else has read."""

    def norm_of(self, tensor: Any) -> nn.Module | None:
        """The norm that made a tensor."""
        found = self.made.get(id(tensor))
        return None if found is None else found[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        layer = self.linear.get(id(args[1])) if func is F.linear and len(args) > 1 else None
        if layer is not None:
            norm = self.norm_of(args[0])
            self.reads.setdefault(layer, set()).add(None if norm is None else id(norm))
            given = (args[1:], kwargs or {})
        if getattr(func, "__name__", "") not in HARMLESS:
            for value in tree_iter(given):
                if isinstance(value, Tensor) and (norm := self.norm_of(value)) is not None:
                    self.others.add(id(norm))
        return func(*args, **(kwargs or {}))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def readers_of(model: nn.Module, example: Any) -> dict[nn.Module, list[nn.Linear]]:
    """The linear layers into which the scale and shift of each norm can be merged without changing the model's output.

    Only they read the norm's output, and they read nothing else. A norm that anything else reads, or whose output
    leaves the model, is left out.

    Args:
        model: the model.
        example: a batch: a tensor, a tuple of arguments, or a mapping of keywords.

    Raises:
        LayerwiseError: the model cannot run the example.
    """
    places = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    # A weight that another module also holds, such as an embedding, must not change.
    plain = {id(m.weight): m for m in model.modules() if type(m) is nn.Linear and places[id(m.weight)] == 1}
    noted = _Noted(plain)

    def made(norm: nn.Module, _: Any, out: Tensor) -> None:
        noted.made[id(out)] = out, norm

    norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    handles = [norm.register_forward_hook(made) for norm in norms]
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((example,), {})
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    try:
        with _evaluating(model), noted:
            out = model(*args, **kwargs)
    except KNOWN as reason:
        raise LayerwiseError(
            f"{type(model).__name__} cannot take the example ({told_by(reason)}); give a batch of its data."
        ) from reason
    finally:
        for handle in handles:
            handle.remove()
    noted.others |= {id(norm) for value in tree_iter(out) if (norm := noted.norm_of(value)) is not None}
    found: dict[nn.Module, list[nn.Linear]] = {}
    for norm in norms:
        readers = [layer for layer, read in noted.reads.items() if id(norm) in read]
        alone = all(len(noted.reads[layer]) == 1 for layer in readers)
        shifts = getattr(norm, "bias", None) is not None
        if readers and alone and id(norm) not in noted.others and not (shifts and any(r.bias is None for r in readers)):
            found[norm] = readers
    return found
