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
        learner.step(x, y)          # in place of loss.backward(); optimizer.step()
    logits = learner(x)
"""

from layerwise.core.blocks import Block, Partition
from layerwise.core.cutting import partition
from layerwise.core.optim import Schedule
from layerwise.core.rule import BatchContext, BlockContext, Rule, Signal, Site
from layerwise.core.tasks import Classification
from layerwise.core.tracing import legal_cuts
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner, Metrics
from layerwise.memory.malloc import keep_freed_memory
from layerwise.memory.meter import MemoryUse, measure_memory
from layerwise.rules import create as create_rule
from layerwise.rules import names as rule_names

__version__ = "0.1.0"

__all__ = [
    "BatchContext",
    "Block",
    "BlockContext",
    "Classification",
    "LayerwiseError",
    "Learner",
    "MemoryUse",
    "Metrics",
    "Partition",
    "Rule",
    "Schedule",
    "Signal",
    "Site",
    "create_rule",
    "keep_freed_memory",
    "legal_cuts",
    "measure_memory",
    "partition",
    "rule_names",
]
