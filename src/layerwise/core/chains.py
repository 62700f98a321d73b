"""Chains of modules, which can be cut without a trace, and checks whether a model can be cut."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerwise.errors import LayerwiseError

INSTEAD = (
    "cut it at its own calls: cuts='layers.*' (a pattern of your names) with output=..., see \"Your own network\", or "
    "wrap the model as nn.Sequential of its parts."
)
"""Advice for a model that cannot be traced."""


def listed(names: Sequence[str], most: int = 24) -> str:
    """Names in a sentence, the first `most` of them."""
    if not names:
        return "none (wrap the model as nn.Sequential of its parts)"
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs through `torch.compile`."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def check_model(model: Any) -> None:
    """Raise LayerwiseError if `model` is not a module, or wraps the module to be trained."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise LayerwiseError(f"the model is a {name}; give a torch.nn.Module.")
    if name == "OptimizedModule":
        raise LayerwiseError(
            "the model is compiled as a whole, which hides its blocks; give the module itself (model._orig_mod) and "
            "Learner(..., compile=True), which compiles each block."
        )
    if isinstance(model, nn.DataParallel):
        raise LayerwiseError(
            "the model is wrapped in DataParallel, whose replicas live for one call only; give model.module, and "
            "several processes with Learner(..., replicas=...) or --parallel data."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel) or name == "FullyShardedDataParallel":
        raise LayerwiseError(
            f"the model is wrapped in {name}, which waits for the gradients of the whole network; give model.module "
            "and Learner(..., replicas=...) or --parallel data, which average block by block."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise LayerwiseError(
            "the model is a ScriptModule, which cannot be cut; give the Python module that it was made from."
        )
    scripted = (
        name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule) and [*m.parameters()]
    )
    if (inner := next(scripted, None)) is not None:
        raise LayerwiseError(
            f"{inner!r} is a ScriptModule, which hides where its parameters are used; give the Python module that it "
            "was made from."
        )
    if any(not is_lazy(t) and t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise LayerwiseError(
            "the model has tensors that were made in torch.inference_mode(), which cannot be trained; build it outside."
        )


def is_sequential(module: nn.Module) -> bool:
    """Whether the module runs its children one after the other and does nothing else."""
    own = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return own and not is_overridden(module)


def is_overridden(module: nn.Module) -> bool:
    """Whether a call of the module does something other than its class's `forward`."""
    return "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__


def expanded(
    model: nn.Module, cuts: Sequence[str] = (), deep: bool = False, prefix: str = ""
) -> list[tuple[str, nn.Module]]:
    """The children of nested `nn.Sequential` containers, opened only if they contain a cut (or all, if `deep`)."""
    found: list[tuple[str, nn.Module]] = []
    holding = holders(cuts)
    for name, child in model._modules.items():  # named_children() leaves out a child held twice
        if child is None:
            continue
        path = prefix + name
        if is_sequential(child) and child._modules and (path in holding or deep):
            found += expanded(child, cuts, deep, path + ".")
        else:
            found.append((path, child))
    return found


class Chain:
    """The composition of modules."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules

    def __call__(self, h: Tensor) -> Tensor:
        for module in self.modules:
            h = module(h)
        return h


def cut_sequential(model: nn.Module, cuts: tuple[str, ...]) -> list[tuple[Callable[[Tensor], Any], set[str]]]:
    """What runs between the cuts of nested `nn.Sequential` containers, and the names of its tensors."""
    children = expanded(model, cuts)
    order = [name for name, _ in children]
    ends = [order.index(cut) + 1 for cut in cuts]
    if ends != sorted(ends):
        raise LayerwiseError(
            f"the cuts {list(cuts)} are not in the order in which the model runs; give them as "
            f"{[name for name in order if name in cuts]}."
        )
    parts = []
    for start, end in zip([0, *ends], [*ends, len(order)], strict=True):
        owned = {
            f"{path}.{name}"
            for path, child in children[start:end]
            for name, _ in [*child.named_parameters(), *child.named_buffers()]
        }
        parts.append((Chain([child for _, child in children[start:end]]), owned))
    return parts


def opened(model: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The modules that are not called when the model is run part by part: the root, and those that contain a cut."""
    holding = {"", *holders(cuts)}
    return [module for path, module in model.named_modules(remove_duplicate=False) if path in holding]


def holders(cuts: Sequence[str]) -> set[str]:
    """Names of the modules that contain a cut.

    >>> sorted(holders(["stem", "stages.0.1"]))
    ['stages', 'stages.0']
    """
    return {cut[:i] for cut in cuts for i, letter in enumerate(cut) if letter == "."}


Opened = tuple[str, nn.Module, Any]
"""A module that is not called itself: its name, the module, and the `forward` of its class when it was cut."""


def check_hooks(held: Sequence[Opened]) -> None:
    """Raise LayerwiseError if a module that is not called itself has hooks or a replaced `forward`."""
    for name, module, forward in held:
        who = f"module {name!r}" if name else f"the model ({type(module).__name__})"
        if is_overridden(module):
            raise LayerwiseError(
                f"{who} has a forward or a __call__ that replaces that of its class, which would not run, because "
                f"it is run block by block; {INSTEAD}"
            )
        if type(module).forward is not forward:
            raise LayerwiseError(
                f"{who} has another class, or its class another forward, than when it was cut, which would not run, "
                "because it is run block by block; make a new Learner for the model."
            )
        if module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise LayerwiseError(
                f"{who} has hooks, which would not run, because it is run block by block; register them on the modules "
                "inside it."
            )
