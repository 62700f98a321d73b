"""Train deep PyTorch networks without global backpropagation.

In a training loop of your own:

    import torch, layerwise

    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(),
        torch.nn.Linear(256, 256), torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    )
    learner = layerwise.Learner(model, "sll", optimizer="adamw", lr=1e-3)
    for x, y in loader:
        learner.step(x, y)          # instead of loss.backward(); optimizer.step()
    logits = learner(x)

Names are imported when they are first used (PEP 562), because importing torch takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.core.blocks import Block, Partition
    from layerwise.core.calls import CallPartition
    from layerwise.core.cutting import cut_at_calls, legal_cuts, partition
    from layerwise.core.optim import Schedule
    from layerwise.core.rule import BatchContext, BlockContext, Rule, Signal, Site
    from layerwise.core.tasks import Classification, LanguageModel, Loss, MultiLabel, Regression, Segmentation, Task
    from layerwise.errors import LayerwiseError
    from layerwise.learner import Learner, Metrics
    from layerwise.learner.fitting import fit_micro
    from layerwise.memory.malloc import keep_freed_memory
    from layerwise.memory.meter import MemoryUse, measure_memory
    from layerwise.replacements import replace
    from layerwise.rules import create as create_rule
    from layerwise.rules import names as rule_names

__version__ = "0.2.0"

__all__ = [
    "BatchContext",
    "Block",
    "BlockContext",
    "CallPartition",
    "Classification",
    "LanguageModel",
    "LayerwiseError",
    "Learner",
    "Loss",
    "MemoryUse",
    "Metrics",
    "MultiLabel",
    "Partition",
    "Regression",
    "Rule",
    "Schedule",
    "Segmentation",
    "Signal",
    "Site",
    "Task",
    "create_rule",
    "cut_at_calls",
    "fit_micro",
    "keep_freed_memory",
    "legal_cuts",
    "measure_memory",
    "partition",
    "replace",
    "rule_names",
]

_HOMES = {
    "layerwise.core.blocks": ("Block", "Partition"),
    "layerwise.core.calls": ("CallPartition",),
    "layerwise.core.cutting": ("cut_at_calls", "legal_cuts", "partition"),
    "layerwise.core.optim": ("Schedule",),
    "layerwise.core.rule": ("BatchContext", "BlockContext", "Rule", "Signal", "Site"),
    "layerwise.core.tasks": (
        *("Classification", "LanguageModel", "Loss", "MultiLabel", "Regression", "Segmentation", "Task"),
    ),
    "layerwise.errors": ("LayerwiseError",),
    "layerwise.learner": ("Learner", "Metrics"),
    "layerwise.learner.fitting": ("fit_micro",),
    "layerwise.memory.malloc": ("keep_freed_memory",),
    "layerwise.memory.meter": ("MemoryUse", "measure_memory"),
    "layerwise.replacements": ("replace",),
}
_PLACES = {name: (module, name) for module, names in _HOMES.items() for name in names} | {
    "create_rule": ("layerwise.rules", "create"),
    "rule_names": ("layerwise.rules", "names"),
}
_PACKAGES = (
    *("core", "data", "errors", "hf", "learner", "lightning", "measure", "memory", "models", "parallel", "report"),
    *("replacements", "rules", "runs", "sklearn"),
)


def __getattr__(name: str) -> Any:
    """Import a public name, or a package of layerwise, when it is first used."""
    if name in _PLACES:
        module, attribute = _PLACES[name]
        value = getattr(importlib.import_module(module), attribute)
    elif name in _PACKAGES:
        value = importlib.import_module(f"layerwise.{name}")
    else:
        raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names for completion, also those not imported yet."""
    return sorted({*globals(), *__all__, *_PACKAGES})
