"""The front door: a model, a rule and optimizers."""

from layerwise.learner.learner import Learner, Metrics

__all__ = ["Learner", "Metrics"]
