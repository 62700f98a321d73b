"""The front door: a model, a rule and optimizers.

`learner.py` has the door and steps. `arguments.py` checks what is given, `setup.py` makes of it what is known before
the first batch, `build.py` makes groups and optimizers out of that batch. `prediction.py` predicts and evaluates,
`state.py` saves and loads.
"""

from layerwise.learner.learner import Learner
from layerwise.learner.metrics import Metrics
from layerwise.parallel.alone import OneProcess

__all__ = ["Learner", "Metrics", "OneProcess"]
