"""Detects changes that a user makes to a model while a learner trains it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import LayerwiseError


class Watch:
    """The modules and parameters of a model for which the learner was built.

    A module or parameter that is replaced or added later would not be trained, and a cast would not reach optimizers
    and auxiliary modules, so each is refused. Freezing, unfreezing, modes and rates are allowed.

    Args:
        model: the model to watch.
        parameters: whether parameters are watched too; not if sharding replaces them all the time.
    """

    def __init__(self, model: nn.Module, parameters: bool):
        self._modules: list[tuple[dict[str, Any], str, nn.Module | None, str]] = []
        self._sizes: list[tuple[dict[str, Any], int, str]] = []
        self._parameters: list[tuple[dict[str, Any], str, Tensor, torch.dtype, torch.device, str]] = []
        self._layouts: list[tuple[Tensor, torch.Size, tuple[int, ...], str]] = []
        self._names: list[tuple[dict[str, Any], set[str], str]] = []
        for path, module in model.named_modules():
            prefix = path + "." if path else ""
            self._sizes.append((module._modules, len(module._modules), path))
            if parameters:
                self._names.append((module._parameters, _present(module._parameters), path))
            self._modules += [(module._modules, name, child, prefix + name) for name, child in module._modules.items()]
            if parameters:
                self._parameters += [
                    (module._parameters, name, p, p.dtype, p.device, prefix + name)
                    for name, p in module._parameters.items()
                    if p is not None
                ]
                self._layouts += [
                    (p, p.shape, p.stride(), prefix + name)
                    for name, p in module._parameters.items()
                    if p is not None and p.layout == torch.strided and not p.is_meta
                ]

    def check(self) -> None:
        """Raise LayerwiseError if a module or parameter was replaced, or a parameter cast, moved or reordered."""
        for registry, name, child, path in self._modules:
            if registry.get(name) is not child:
                raise LayerwiseError(
                    f"module {path!r} was replaced after the learner was built, so it would not be trained; make a new "
                    "Learner for the model."
                )
        for registry, name, parameter, dtype, device, path in self._parameters:
            if registry.get(name) is not parameter:
                raise LayerwiseError(
                    f"parameter {path!r} was replaced after the learner was built (load_state_dict(assign=True), "
                    "parametrize, a new tensor), so it would not be trained; copy into it, or make a new Learner."
                )
            if parameter.dtype != dtype or parameter.device != device:
                now, then = (parameter.dtype, dtype) if parameter.dtype != dtype else (parameter.device, device)
                raise LayerwiseError(
                    f"parameter {path!r} was {then} when the learner was built and is {now} now; cast or move the "
                    "model before you make the Learner."
                )
        for parameter, shape, stride, path in self._layouts:
            now = parameter.stride()
            idle = not (any(now) and any(stride))  # one element in place of all: the block is offloaded
            if parameter.shape != shape or (now != stride and not idle):
                raise LayerwiseError(
                    f"parameter {path!r} had the shape {tuple(shape)} and the strides {stride} when the learner was "
                    f"built, and has {tuple(parameter.shape)} and {parameter.stride()} now, which its optimizer does "
                    "not know; make a new Learner for the model, with channels_last where that is the order."
                )
        for registry, size, path in self._sizes:
            if len(registry) != size:
                raise LayerwiseError(
                    f"module {path!r} has gained or lost a part after the learner was built, so it would not be "
                    "trained as it is now; make a new Learner for the model."
                )
        for registry, names, path in self._names:
            if added := _present(registry) - names:
                raise LayerwiseError(
                    f"module {path!r} has gained the parameter {min(added)!r} after the learner was built, so it would "
                    "not be trained; make a new Learner for the model."
                )


def _present(registry: Mapping[str, Tensor | None]) -> set[str]:
    """Names of the parameters that a module has; a registered one may be None."""
    return {name for name, parameter in registry.items() if parameter is not None}
