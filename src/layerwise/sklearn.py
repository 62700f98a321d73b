"""scikit-learn's estimators: `fit` and `predict` on a table, trained block by block."""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from layerwise import models
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.ranges import check_ranges
from layerwise.core.rule import Rule
from layerwise.core.tasks import Regression
from layerwise.data.numbers import EXACT
from layerwise.data.statistics import column_statistics
from layerwise.errors import LayerwiseError, short
from layerwise.learner import Learner
from layerwise.learner.arguments import check_further

CPU = torch.device("cpu")
OWN = {
    **dict.fromkeys(("rule", "optimizer", "lr", "weight_decay", "device"), "an argument of its own; give it there"),
    "seed": "random_state here; give it there",
    "model": "network here; give it there",
    "example": "taken from the rows; leave it out",
}
"""Arguments of a learner that an estimator gives, and what the user does instead."""


class _Estimator(BaseEstimator):
    """Base of classifier and regressor: standardises columns, builds a network, trains it for some epochs.

    Args:
        rule: name of a rule, or a rule.
        network: function from the number of columns and of outputs to a module (default: a multilayer perceptron).
        depth: hidden layers of the perceptron.
        width: units of each.
        epochs: passes over the samples.
        batch_size: samples per batch.
        lr: learning rate.
        weight_decay: of weights.
        optimizer: as for `Learner`.
        learner: further arguments of `Learner`, such as `cuts` for a network of your own.
        device: where to train.
        random_state: seed of initial weights, order and draws: a number, a generator of numpy, or None for a new one
            each time.

    Attributes:
        learner_: the learner after `fit`; `learner_.network.model` is the network.
        loss_curve_: mean loss at the head per epoch.
        n_features_in_: number of columns.
        n_iter_: number of epochs.
    """

    def __init__(
        self,
        rule: str | Rule = "sll",
        *,
        network: Callable[[int, int], nn.Module] | None = None,
        depth: int = 2,
        width: int = 128,
        epochs: int = 30,
        batch_size: int = 32,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        optimizer: Any = "adamw",
        learner: Mapping[str, Any] | None = None,
        device: str = "cpu",
        random_state: Any = None,
    ):
        self.rule, self.network, self.depth, self.width = rule, network, depth, width
        self.epochs, self.batch_size, self.lr, self.weight_decay = epochs, batch_size, lr, weight_decay
        self.optimizer, self.learner, self.device, self.random_state = optimizer, learner, device, random_state

    def _fit(self, X: np.ndarray, y: Tensor, outputs: int, task: Any = None) -> None:
        check_ranges(epochs=self.epochs, batch_size=self.batch_size)
        check_further(self.learner, Learner, OWN if task is None else OWN | {"task": "regression; leave it out"})
        self.mean_, self.scale_ = _statistics(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with preserved_generators(CPU):
            seed_generators(derive_seed(seed, "model"), CPU)
            network = self._network(X.shape[1], outputs)
        x = self._inputs(X)
        self.learner_ = Learner(
            network,
            self.rule,
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            seed=seed,
            device=self.device,
            example=x[:2],
            **({} if task is None else {"task": task}),
            **(self.learner or {}),
        )
        if self.learner_.prepares:
            self.learner_.prepare(x, y)
        self._check_outputs(x[:2], outputs)
        generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
        self.loss_curve_: list[float] = []
        for _ in range(self.epochs):
            losses = []
            for batch in _batches(torch.randperm(len(x), generator=generator, device="cpu"), self.batch_size):
                metrics = self.learner_.step(x[batch], y[batch])
                losses.append(metrics.loss * len(batch))
            self.learner_.flush()
            self.loss_curve_.append(float(torch.stack(losses).sum() / len(x)))
        self.n_iter_ = self.epochs

    def _network(self, columns: int, outputs: int) -> nn.Module:
        if self.network is None:
            return models.create("mlp", (columns, 1, 1), outputs, depth=self.depth, width=self.width)
        if not callable(self.network):
            raise LayerwiseError(
                f"network is {short(self.network)}; give a function of the numbers of columns and outputs."
            )
        made = self.network(columns, outputs)
        if not isinstance(made, nn.Module):
            raise LayerwiseError(f"network returns {type(made).__name__}; let it return a torch.nn.Module.")
        return made

    def _check_outputs(self, x: Tensor, outputs: int) -> None:
        found = tuple(self.learner_(x).shape[1:])
        if found != (outputs,):
            raise LayerwiseError(
                f"the network's output for a row has the shape {found} instead of {(outputs,)}; let "
                "network(columns, outputs) return a network with so many outputs."
            )

    def _inputs(self, X: np.ndarray) -> Tensor:
        return torch.from_numpy((X - self.mean_) / self.scale_).to(torch.float32)  # out of its range: infinity

    def _outputs(self, X: Any) -> np.ndarray:
        """The network's outputs for each row, as float64."""
        check_is_fitted(self)
        given, X = X, validate_data(self, X, dtype=np.float64, reset=False)
        _check_exact("features", given)
        found = torch.cat([self.learner_(part).cpu() for part in self._inputs(X).split(1024)]).double().numpy()
        wrong = ~np.isfinite(found).all(1)
        if wrong.any():
            raise LayerwiseError(
                f"the network's output for row {wrong.argmax()} is not finite; check whether its values are out of "
                "range, and train with a smaller lr if all rows are so."
            )
        return found


def _statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per column (samples, columns), as a run on a table takes them."""
    mean, deviation = column_statistics(torch.from_numpy(np.require(values, requirements=("C", "W"))))
    return np.array(mean), np.array(deviation)


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Batches of samples; a single one that is left joins the batch before, as batch norm and some rules need two."""
    batches = list(order.split(size))
    if size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _check_exact(what: str, values: Any) -> None:
    """Raise LayerwiseError if there are whole numbers of which float64, in which all is computed, would merge some."""
    if hasattr(values, "columns"):
        columns = [values.iloc[:, i] if hasattr(values, "iloc") else values[c] for i, c in enumerate(values.columns)]
    else:
        columns = [np.asarray(values, dtype=object if isinstance(values, (list, tuple)) else None)]
    for column in map(np.asarray, columns):
        if column.dtype.kind in "iu":
            beyond: Any = column[(column >= EXACT) | (column <= -EXACT)]
        else:
            beyond = [cell for cell in column.flat if _beyond(cell)] if column.dtype.kind in "OUS" else ()
        if len(beyond):
            raise LayerwiseError(
                f"the {what} have the whole number {beyond[0]}, and float64 merges those beyond 2**53 with others; "
                "leave out what is an id, or subtract a constant."
            )


def _beyond(cell: Any) -> bool:
    """Whether a number, or the word of one, is beyond the whole numbers that float64 holds exactly."""
    word = cell.decode(errors="replace") if isinstance(cell, bytes) else cell
    if isinstance(word, str):
        word = word.strip()
        digits = word.lstrip("+-")
        return len(digits) > 15 and digits.isdecimal() and abs(int(word)) >= EXACT
    return isinstance(word, Integral) and abs(int(word)) >= EXACT


class LayerwiseClassifier(ClassifierMixin, _Estimator):
    """A network that is trained block by block, as a classifier of scikit-learn.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> LayerwiseClassifier("local_ce", width=16, epochs=20, random_state=0).fit(X, y).score(X, y) > 0.9
    True
    """

    def fit(self, X: Any, y: Any) -> "LayerwiseClassifier":
        """Train a new network on rows `X` (samples, columns) with labels `y` (samples,), of any kind."""
        given, (X, y) = (X, y), validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        _check_exact("features", given[0])
        if y.dtype.kind == "f":  # others are kept as they are
            _check_exact("labels", given[1])
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"the labels are of one class, {self.classes_[0]!r}; a classifier needs two or more.")
        self._fit(X, torch.from_numpy(numbers.astype(np.int64)), len(self.classes_))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (samples, classes), in the order of `classes_`."""
        outputs = self._outputs(X)
        outputs = np.exp(outputs - outputs.max(1, keepdims=True))
        return outputs / outputs.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of every row."""
        chosen = self._outputs(X).argmax(1)
        return self.classes_[chosen]


class LayerwiseRegressor(RegressorMixin, _Estimator):
    """A network that is trained block by block on numbers, as a regressor of scikit-learn; one target or several.

    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> LayerwiseRegressor("local_ce", width=32, epochs=5, random_state=0).fit(X, y).score(X, y) > 0.4
    True
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> "LayerwiseRegressor":
        """Train a new network on rows `X` (samples, columns) with targets `y` (samples,) or (samples, targets)."""
        given = X, y
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
        _check_exact("features", given[0])
        _check_exact("targets", given[1])
        self._one = y.ndim == 1
        targets = y.reshape(len(y), -1).astype(np.float64)
        if not np.isfinite(targets).all():
            raise ValueError("some targets are not finite (NaN or infinity); leave these samples out.")
        self.target_mean_, self.target_scale_ = _statistics(targets)
        scaled = torch.from_numpy(((targets - self.target_mean_) / self.target_scale_).astype(np.float32))
        self._fit(X, scaled, targets.shape[1], Regression())
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The target of every row, or its targets."""
        found = self._outputs(X) * self.target_scale_ + self.target_mean_
        return found[:, 0] if self._one else found
