"""The front door: a model, a rule and optimizers.

Files:

    learner.py       the class `Learner`
    arguments.py     checks its arguments
    setup.py         everything that needs no batch
    network.py       cuts the model, and checks whether the rule can train it
    build.py         groups and optimizers, from the first batch
    batches.py       a user's batch: checked, split from its labels, moved
    rounds.py        the updates of one training step
    prediction.py    begins a pass, predicts, evaluates
    adapters.py      adapters whose own training is more than a loss
    frozen.py        what of the model learns
    own_loss.py      the model's own loss against the task's
    metrics.py       the metrics of one step
    metering.py      the memory of one step
    fitting.py       the number of parts for a peak of memory
    optimizer.py     all optimizers as one
    output_copy.py   a copy of the output matrix for the blocks
    state.py         saves and loads
    checks.py        whether a state fits
    skipping.py      the state of an update that may be skipped
    pickled.py       pickles and copies
    weights.py       weights in files, block by block
    watch.py         changes that a user makes to the model

`Learner` takes its arguments flat, though they are many: each has a default, most calls give three to five, and an
object per group would be a further name to import for the same words. Inside they are grouped (`setup.py`).
"""

from layerwise.learner.learner import Learner
from layerwise.learner.metrics import Metrics
from layerwise.parallel.alone import OneProcess

__all__ = ["Learner", "Metrics", "OneProcess"]
