"""The front door: a model, a rule and optimizers."""

from layerwise.learner.alone import OneProcess
from layerwise.learner.learner import Learner
from layerwise.learner.metrics import Metrics

__all__ = ["Learner", "Metrics", "OneProcess"]
