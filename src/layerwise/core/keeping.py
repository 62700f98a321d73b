"""What a forward pass leaves in the modules of a model, where the rest of the pass may look for it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

OF_TORCH = ("_parameters", "_modules")
"""Registries of a module whose entries a forward pass does not exchange."""


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
