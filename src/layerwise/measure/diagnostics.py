r"""Measures the layers of a trained network: probes, similarity, gradient alignment, sparsity.

A *layer* is a block of the partition; its features are the block's outputs in evaluation mode, averaged over space or
tokens to one vector per sample if a function takes vectors `(N, D)`. Everything is measured on the host in float64,
except the gradients, which the engine computes as in training.
"""

import contextlib
import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from layerwise import data
from layerwise.core.functional import log_bhattacharyya, pool_features
from layerwise.core.layout import to_standard
from layerwise.core.rule import Rule
from layerwise.core.tasks import UNLABELLED
from layerwise.errors import LayerwiseError
from layerwise.files import MissingFile
from layerwise.learner import Learner
from layerwise.measure.filters import first_filters
from layerwise.report.reading import MOST_CLASSES, read_result
from layerwise.runs.building import load_data, load_run
from layerwise.runs.writing import write_atomically

SAMPLES = 1024
"""The largest number of samples of each split that are measured."""


def _tensor(value: Any, name: str) -> Tensor:
    """Numbers as a tensor on the host in float64, from a tensor, an array or nested lists."""
    try:
        return torch.as_tensor(value).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as reason:
        raise LayerwiseError(f"{name} is not a table of numbers ({reason}); give a tensor or an array.") from reason


def _vectors(value: Any, name: str) -> Tensor:
    """One row per sample, `(N, D)` with N > 0."""
    found = _tensor(value, name)
    if found.dim() != 2 or not found.numel():
        raise LayerwiseError(
            f"{name} has shape {tuple(found.shape)}; give one row per sample, (N, D) with N and D > 0."
        )
    return found


def _labels(value: Any, count: int) -> Tensor:
    """One class number per sample, int64 `(N,)`."""
    found = _tensor(value, "y")
    if found.shape != (count,) or not bool((found == found.round()).all()):
        raise LayerwiseError(
            f"y has shape {tuple(found.shape)}; give a class number for each of the {count} rows of x."
        )
    return found.long()


def linear_cka(x: Tensor, y: Tensor) -> float:
    r"""Linear centred kernel alignment of two representations of the same samples.

    $$\mathrm{CKA}(X, Y) = \frac{\lVert Y^\top X\rVert_F^2}{\lVert X^\top X\rVert_F\,\lVert Y^\top Y\rVert_F}$$

    for X and Y with centred columns. It is 1 where Y is X up to rotation, scale and shift, and 0 where every feature of
    one is uncorrelated with every feature of the other. With fewer samples than features it is biased upwards.

    Args:
        x: `(N, D1)`, one row per sample.
        y: `(N, D2)`, the same samples in the same order.

    Returns:
        A number in [0, 1]; nan where one of them is constant.

    Source: Kornblith et al., ICML (2019), linear kernel, biased estimator.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    >>> round(linear_cka(x, 3 * x.flip(1) + 5), 6)
    1.0
    """
    x, y = _vectors(x, "x"), _vectors(y, "y")
    if len(x) != len(y):
        raise LayerwiseError(f"x has {len(x)} rows and y {len(y)}; give the same samples in the same order.")
    x, y = (t - t.mean(0) for t in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same numbers from the smaller Gram matrices
        gram_x, gram_y = x @ x.T, y @ y.T
        return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def hoyer_sparsity(h: Tensor) -> float:
    r"""Mean over samples of Hoyer's sparsity $(\sqrt D - \lVert h\rVert_1/\lVert h\rVert_2) / (\sqrt D - 1)$.

    It is 0 where all D entries have the same size and 1 where all but one are zero.

    Args:
        h: `(N, D)` with D > 1; rows without any non-zero entry are left out.

    Returns:
        A number in [0, 1]; nan where every row is zero.

    Source: Hoyer, JMLR 5 (2004).

    >>> hoyer_sparsity(torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]]))  # 1 and 0
    0.5
    """
    h = _vectors(h, "h")
    if h.shape[1] < 2:
        raise LayerwiseError("h has one column, and sparsity compares columns; give two or more.")
    length = h.norm(dim=1)
    root = h.shape[1] ** 0.5
    values = (root - h.abs().sum(1) / length) / (root - 1)
    return float(values[length > 0].mean())


def dead_units(h: Tensor) -> float:
    """Share of units with the same value for every sample and position, which carry no information.

    Args:
        h: a block's output: `(N, D)`, `(N, C, H, W)` (a unit is a channel) or `(N, T, D)`.

    >>> dead_units(torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    0.5
    """
    h = _tensor(h, "h")
    if h.dim() < 2 or not h.numel():
        raise LayerwiseError(f"h has shape {tuple(h.shape)}; give outputs of a block, (N, D) or more, with N > 0.")
    units = h.transpose(1, -1).flatten(0, -2) if h.dim() == 4 else h.flatten(0, -2)
    return float((units.amax(0) == units.amin(0)).double().mean())


def bhattacharyya(log_p: Tensor, log_q: Tensor) -> float:
    r"""Mean over samples of the Bhattacharyya coefficient $\sum_k \sqrt{p_k q_k}$ of two posteriors.

    Args:
        log_p: log-probabilities `(N, K)`.
        log_q: log-probabilities `(N, K)`.

    Returns:
        A number in [0, 1], 1 if the two are the same.

    >>> p, q = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(bhattacharyya(p, q), 6)  # sqrt(1/2)
    0.707107
    """
    log_p, log_q = _vectors(log_p, "log_p"), _vectors(log_q, "log_q")
    if log_p.shape != log_q.shape:
        raise LayerwiseError(f"log_p has shape {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}; give equal ones.")
    return float(log_bhattacharyya(log_p, log_q).exp().mean())


class LinearProbe:
    """Multinomial logistic regression on frozen features: how well a linear readout of a layer can classify.

    Features are standardised with the training samples' mean and deviation; L2 penalty of scikit-learn's default
    strength (C = 1); a hundred L-BFGS iterations at most.

    Args:
        x: features `(N, D)` of training samples.
        y: their labels `(N,)`; at least two classes.

    Source: Alain & Bengio, arXiv 1610.01644 (2016).

    >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    >>> LinearProbe(x, torch.tensor([0, 0, 1, 1])).accuracy(x, torch.tensor([0, 0, 1, 1]))
    1.0
    """

    def __init__(self, x: Tensor, y: Tensor):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        x, y = _vectors(x, "x"), _labels(y, len(x))
        if len(y.unique()) < 2:
            raise LayerwiseError(
                "all labels are the same, so there is nothing to tell apart; give two classes or more."
            )
        self.mean, self.deviation = x.mean(0), x.std(0, correction=0)
        self.deviation[self.deviation == 0] = 1.0
        self.fit = LogisticRegression(max_iter=100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near the optimum is near enough for a probe
            self.fit.fit(self._scaled(x), y.numpy())

    def log_posterior(self, x: Tensor) -> Tensor:
        """Log-probabilities `(N, K)` of the classes that occur in training, in ascending order."""
        return torch.from_numpy(np.asarray(self.fit.predict_log_proba(self._scaled(x))))

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of samples whose most probable class is the label."""
        return float(self.fit.score(self._scaled(x), _labels(y, len(x)).numpy()))

    def confusion(self, x: Tensor, y: Tensor) -> list[list[int]]:
        """How many samples of each class (row) are taken for each class (column), `(K, K)`; labels are 0 to K - 1.

        >>> x, y = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([0, 0, 1, 1])
        >>> LinearProbe(x, y).confusion(x, torch.tensor([1, 0, 1, 1]))
        [[1, 0], [1, 2]]
        """
        labels = _labels(y, len(x))
        if labels.min() < 0:
            raise LayerwiseError(f"a label is {int(labels.min())}; number the classes from 0.")
        taken = torch.from_numpy(np.asarray(self.fit.predict(self._scaled(x)))).long()
        classes = 1 + int(max(labels.max(), *self.fit.classes_))
        return torch.bincount(labels * classes + taken, minlength=classes**2).view(classes, classes).tolist()

    def _scaled(self, x: Tensor) -> Any:
        x = _vectors(x, "x")
        if x.shape[1] != len(self.mean):
            raise LayerwiseError(f"x has {x.shape[1]} columns and the probe {len(self.mean)}; give the same features.")
        return ((x - self.mean) / self.deviation).numpy()


class _Kept(torch.optim.Optimizer):
    """Replaces an optimizer: stores the gradients from the engine, and changes nothing."""

    kept: ClassVar[str] = "gradient"

    def __init__(self, groups: Any):
        super().__init__(groups, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter][self.kept] = parameter.grad.clone()


def gradients(learner: Learner, x: Tensor, y: Tensor, rule: Rule | str | None = None) -> dict[str, Tensor]:
    """The gradient that one training step would use, by name of the parameter; the learner is not changed.

    Args:
        learner: gives network, auxiliary modules, seed and task.
        x: inputs `(B, ...)`.
        y: labels `(B,)`.
        rule: another rule on the same network (without trained auxiliary modules); the learner's own if not given.
    """
    if not learner.groups:
        learner.build(x)
    twin = Learner(
        copy.deepcopy(learner.network),
        learner.rule if rule is None else rule,
        optimizer=lambda groups: _Kept(groups),
        task=learner.task,
        example=x,
    )
    if rule is None:
        twin.auxiliary.load_state_dict(learner.auxiliary.state_dict())
    twin.step(x, y)
    return {name: state[_Kept.kept] for name, state in twin.optimizer_states().items()}


def gradient_cosines(learner: Learner, x: Tensor, y: Tensor) -> dict[str, float | None]:
    r"""Cosine between the rule's gradient and that of backpropagation, per block and for the head.

    $\cos = \langle g, b\rangle / (\lVert g\rVert\,\lVert b\rVert)$ over the block's own parameters, both gradients at
    the current weights, on the same batch and with the same random draws. The angle of alignment is its arc cosine.

    Args:
        learner: what trains the network.
        x: inputs `(B, ...)`.
        y: labels `(B,)`.

    Returns:
        Name of the block to cosine; None where one of the gradients is missing or zero.
    """
    own, backprop = gradients(learner, x, y), gradients(learner, x, y, "backprop")
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    found: dict[str, float | None] = {}
    for block in learner.network.sites:
        both = [names[id(p)] for p in block.parameters() if names[id(p)] in own.keys() & backprop.keys()]
        if not both:
            found[block.name] = None
            continue
        a, b = (torch.cat([g[name].flatten() for name in both]).double() for g in (own, backprop))
        product = float(a.norm() * b.norm())
        found[block.name] = float(a @ b) / product if product else None
    return found


def features(learner: Learner, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs of every block in evaluation mode, on the host.

    Args:
        learner: what trains the network; it is not changed.
        batches: inputs `(B, ...)`.

    Returns:
        Name of the block to `(N, ...)`, in the standard order of dimensions.
    """
    collected: dict[str, list[Tensor]] = {block.name: [] for block in learner.network.blocks}
    with learner.evaluating():
        for x in batches:
            h = x.to(learner.device)
            for block in learner.network.blocks:
                h = block(h)
                if h.dim() > 2 and block.layout is None:
                    raise LayerwiseError(
                        f"the layers of block {block.name!r} do not tell which dimension of its output holds the "
                        f"channels; declare it: layout={{{block.name!r}: ...}}."
                    )
                kept = h if h.dim() < 3 else to_standard(h, str(block.layout))
                collected[block.name].append(kept.float().cpu())
    return {name: torch.cat(parts) for name, parts in collected.items()}


def fit_probes(train: Mapping[str, Tensor], train_y: Tensor) -> dict[str, LinearProbe]:
    """A probe per block, on its pooled outputs."""
    return {name: LinearProbe(pool_features(h, "mean"), train_y) for name, h in train.items()}


def layer_table(
    train: Mapping[str, Tensor],
    train_y: Tensor,
    test: Mapping[str, Tensor],
    test_y: Tensor,
    probes: Mapping[str, LinearProbe] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Compute every diagnostic that needs only the features of the layers.

    Args:
        train: name of the block to its outputs on training samples, in order of depth.
        train_y: labels of these samples; at least two classes.
        test: the same on the samples to measure on.
        test_y: their labels.
        probes: from `fit_probes`, if they exist already.

    Returns:
        Name of the block to `probe_accuracy`, `bhattacharyya` and `cka` (to the next block; None for the last one),
        `hoyer`, `dead`. The posteriors of the Bhattacharyya coefficient are those of the probes.
    """
    vectors = {name: pool_features(h, "mean") for name, h in test.items()}
    probes = fit_probes(train, train_y) if probes is None else probes
    rows: dict[str, dict[str, float | None]] = {}
    names = list(vectors)
    for name, after in zip(names, [*names[1:], None], strict=True):
        h = vectors[name]
        rows[name] = {
            "probe_accuracy": probes[name].accuracy(h, test_y),
            "bhattacharyya": None,
            "cka": None,
            "hoyer": hoyer_sparsity(h),
            "dead": dead_units(test[name]),
        }
        if after is not None:
            later = vectors[after]
            rows[name]["cka"] = linear_cka(h, later)
            rows[name]["bhattacharyya"] = bhattacharyya(
                probes[name].log_posterior(h), probes[after].log_posterior(later)
            )
    return rows


def diagnose(folder: Path, twin: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Compute every diagnostic of a finished run, and write `diagnostics.json` in its folder.

    Args:
        folder: of the run.
        twin: folder of the backprop run of the same seed, for `cka_to_backprop`.
        device: where the network runs.

    Returns:
        `samples`, per block under `blocks` what `layer_table` gives, `cka_to_backprop` and `gradient_cosine`, and, up
        to 20 classes, under `confusion` the counts of `LinearProbe.confusion` of each block; of pictures, under
        `filters`, what `first_filters` gives.

    Raises:
        LayerwiseError: there is no run, its data set is missing, or its labels are not classes.
    """
    options, _, learner, _ = load_run(folder, device)
    if options.task != "classification":
        raise LayerwiseError(f"diagnostics probe for classes, and the run's task is {options.task}.")
    dataset = load_data(options)
    common: dict[str, Any] = {"mean": dataset.mean, "std": dataset.std, "seed": 0, "shuffle": False, "drop_last": False}
    common |= {"device": learner.device, "channels_last": options.channels_last}
    (train_x, train_y), (test_x, test_y) = (
        _first(data.Batches(part, 128, **common)) for part in (dataset.train, dataset.test)
    )
    test = _labelled(features(learner, test_x), test_y)
    train = _labelled(features(learner, train_x), train_y)
    test_labels = test_y[test_y != UNLABELLED]
    probes = fit_probes(train, train_y[train_y != UNLABELLED])
    rows = layer_table(train, train_y[train_y != UNLABELLED], test, test_labels, probes)
    cosines = gradient_cosines(learner, train_x[0], train_y[: len(train_x[0])])
    other = _labelled(features(load_run(twin, device).learner, test_x), test_y) if twin is not None else {}
    for name, row in rows.items():
        row["gradient_cosine"] = cosines[name]
        if other.keys() == rows.keys():
            row["cka_to_backprop"] = linear_cka(*(pool_features(h[name], "mean") for h in (test, other)))
    found: dict[str, Any] = {"samples": len(test_labels), "blocks": {n: _numbers(row) for n, row in rows.items()}}
    confusion = {
        name: probe.confusion(pool_features(test[name], "mean"), test_labels) for name, probe in probes.items()
    }
    if all(len(counts) <= MOST_CLASSES for counts in confusion.values()):
        found["confusion"] = confusion
    filters = first_filters(learner.network.model, dataset.shape)
    if filters is not None:
        found["filters"] = filters
    with contextlib.suppress(MissingFile):  # an unfinished run has none
        found["command"] = read_result(folder, "result.json")["command"]
    write_atomically(folder / "diagnostics.json", json.dumps(found, indent=2) + "\n")
    return found


def _labelled(found: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    """The features of the samples that have a label."""
    return {name: h[y != UNLABELLED] for name, h in found.items()}


def _first(batches: data.Batches) -> tuple[list[Tensor], Tensor]:
    """The first samples of a split: batches of inputs, and all labels."""
    inputs, labels, count = [], [], 0
    for x, y in batches.epoch(0):
        inputs.append(x)
        labels.append(y.cpu())
        count += len(x)
        if count >= SAMPLES:
            break
    return inputs, torch.cat(labels)


def _numbers(row: dict[str, float | None]) -> dict[str, float | None]:
    """Replace nan, which JSON does not have, by None."""
    return {name: None if value is None or value != value else value for name, value in row.items()}
