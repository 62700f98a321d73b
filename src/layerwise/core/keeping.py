"""What a forward pass leaves in the modules of a model, where the rest of the pass may look for it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

OF_TORCH = ("_parameters", "_modules")
"""Registries of a module whose entries a forward pass does not exchange."""

PLAIN = (int, float, complex, str, bytes, tuple, frozenset, type(None))
"""Types of values that a forward pass replaces, as it does a counter."""
LARGE = 2**20
"""Bytes of a buffer that is not copied: quantised weights are buffers too."""


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """A context of forward passes that are not the user's: what they count and note in the modules is put back.

    These are the plain values and the lists, dictionaries and sets in attributes of modules, and buffers of up to a
    MiB. Tensors in attributes, larger buffers, and objects of the user's own classes stay as the passes leave them, and
    so does a module that makes parameters or modules of its own in its first pass.

    >>> model = nn.Sequential(nn.Dropout())
    >>> model[0].calls = 0
    >>> with put_back(model):
    ...     model[0].calls += 1
    >>> model[0].calls
    0
    """
    undo: list[tuple[nn.Module, list[int], Callable[[], None]]] = []
    places: list[tuple[dict[str, Any], str]] = []
    torchs = vars(nn.Module()).keys()
    for module in model.modules():
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if any(is_lazy(t) or t.is_meta for t in tensors):
            continue  # such a layer is completed by its first pass
        registered = _registered(module)
        for name, value in vars(module).items():
            if name not in torchs and isinstance(value, PLAIN):
                undo.append((module, registered, partial(_set, module, name, value)))
            elif name not in torchs and isinstance(value, (list, dict, set, deque)):
                undo.append((module, registered, partial(_fill, value, _held(value))))
        places += [(module._buffers, name) for name in module._buffers]
    try:
        with buffers_put_back(places):
            yield
    finally:
        for module, before, put in undo:
            if _registered(module) == before:
                put()


@contextmanager
def buffers_put_back(places: Iterable[tuple[dict[str, Any], str]]) -> Iterator[None]:
    """A context after which the buffers in these places, of up to a MiB, hold what they held before.

    Args:
        places: registries of modules, and the names there; what is no buffer is left alone.
    """
    found = [(at, name, at[name]) for at, name in places if isinstance(at[name], Tensor)]
    found = [(at, name, t) for at, name, t in found if not isinstance(t, nn.Parameter) and t.layout == torch.strided]
    # One element in place of all stands for a buffer that is elsewhere: its block is offloaded.
    found = [(at, name, t) for at, name, t in found if not (t.is_meta or (t.numel() > 1 and not any(t.stride())))]
    kept = [(at, name, t, t.data_ptr(), t.clone()) for at, name, t in found if t.nbytes <= LARGE]
    try:
        yield
    finally:
        for registry, name, buffer, place, old in kept:
            # An offloaded block may have been fetched. The comparison sees writes to .data too.
            if buffer.data_ptr() == place and not torch.equal(buffer, old):
                with torch.no_grad():
                    buffer.copy_(old)
            registry[name] = buffer


def _registered(module: nn.Module) -> list[int]:
    return [id(value) for value in (*module._parameters.values(), *module._modules.values())]


def _set(module: nn.Module, name: str, value: Any) -> None:
    registered = name in module._parameters or name in module._buffers or name in module._modules
    if not registered and vars(module).get(name, module) is not value:
        vars(module)[name] = value


def _held(value: Any) -> list[Any]:
    return list(value.items() if isinstance(value, dict) else value)


def _fill(value: Any, held: list[Any]) -> None:
    now = _held(value)
    if isinstance(value, dict):
        same = len(now) == len(held) and all(k is m and v is w for (k, v), (m, w) in zip(now, held, strict=True))
    else:
        same = len(now) == len(held) and all(a is b for a, b in zip(now, held, strict=True))
    if not same:
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(held)


def tensors_kept(model: nn.Module) -> dict[str, list[Tensor]]:
    """The tensors that modules hold as attributes or buffers, by the name of the place.

    >>> import torch
    >>> model = nn.Sequential(nn.ReLU())
    >>> model[0].seen = (torch.ones(2),)
    >>> tensors_kept(model)
    {'0.seen': [tensor([1., 1.])]}
    """
    found: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        held = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
        for name, value in [*held.pop("_buffers", {}).items(), *held.items()]:
            if tensors := _inside(value):
                found[f"{path}.{name}".lstrip(".")] = tensors
    return found


def exchanged(before: Mapping[str, list[Tensor]], model: nn.Module) -> list[str]:
    """Names of the places that hold other tensors than before."""
    now = tensors_kept(model)
    return [
        name
        for name in sorted({*before, *now})
        if [id(t) for t in before.get(name, ())] != [id(t) for t in now.get(name, ())]
    ]


def _inside(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _inside(part)]
