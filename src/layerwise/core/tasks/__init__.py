"""What the labels mean: the loss on outputs, the metrics, the label of a block's readout.

`Classification` (and `LanguageModel`), `Regression`, `MultiLabel`, `Segmentation`, and `Loss` for any function.
"""

from layerwise.core.tasks.base import Positions, Task
from layerwise.core.tasks.classes import UNLABELLED, Classification, LanguageModel
from layerwise.core.tasks.function import Loss
from layerwise.core.tasks.labels import MultiLabel
from layerwise.core.tasks.metric import ACCURACY, Metric
from layerwise.core.tasks.numbers import Regression
from layerwise.core.tasks.once import of_one_batch
from layerwise.core.tasks.pixels import Segmentation

KINDS: dict[str, type[Task]] = {
    task.kind: task for task in (Classification, LanguageModel, Regression, MultiLabel, Segmentation, Loss)
}
"""Tasks by the name under which rules declare them."""


def metric_of(kind: str) -> Metric:
    """The main metric of a kind of task.

    >>> metric_of("regression").name
    'rmse'
    """
    task = KINDS[kind]
    return Metric(task.main, task.larger_is_better, task.share)


__all__ = [
    "ACCURACY",
    "KINDS",
    "UNLABELLED",
    "Classification",
    "LanguageModel",
    "Loss",
    "Metric",
    "MultiLabel",
    "Positions",
    "Regression",
    "Segmentation",
    "Task",
    "metric_of",
    "of_one_batch",
]
