"""The front door: a model, a rule and optimizers.

`build.py` makes groups and optimizers out of the first batch, `learner.py` steps and predicts, `state.py` saves and
loads. `alone.py` has null objects for a learner without replicas, stages or offloading.
"""

from layerwise.learner.learner import Learner
from layerwise.learner.metrics import Metrics
from layerwise.parallel.alone import OneProcess

__all__ = ["Learner", "Metrics", "OneProcess"]
