"""The front door: a model, a rule and optimizers.

`learner.py` has the class `Learner`. `arguments.py` checks its arguments, `setup.py` prepares everything that needs no
batch, `build.py` makes groups and optimizers from the first batch. `prediction.py` predicts and evaluates,
`state.py` saves and loads.
"""

from layerwise.learner.learner import Learner
from layerwise.learner.metrics import Metrics
from layerwise.parallel.alone import OneProcess

__all__ = ["Learner", "Metrics", "OneProcess"]
