"""What the labels mean: the loss on outputs, the metrics, the label of a block's readout.

`Classification` (and `LanguageModel`), `Regression`, `MultiLabel`, `Segmentation`, and `Loss` for any function.
"""

from layerwise.core.tasks.base import Positions, Task
from layerwise.core.tasks.classes import UNLABELLED, Classification, LanguageModel
from layerwise.core.tasks.function import Loss
from layerwise.core.tasks.labels import MultiLabel
from layerwise.core.tasks.numbers import Regression
from layerwise.core.tasks.pixels import Segmentation

KINDS: dict[str, type[Task]] = {
    task.kind: task for task in (Classification, LanguageModel, Regression, MultiLabel, Segmentation, Loss)
}
"""Tasks by the name under which rules declare them."""

__all__ = [
    "KINDS",
    "UNLABELLED",
    "Classification",
    "LanguageModel",
    "Loss",
    "MultiLabel",
    "Positions",
    "Regression",
    "Segmentation",
    "Task",
]
