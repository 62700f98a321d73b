r"""Compares beliefs with SID's theory: `layerwise beliefs RUN`.

For the beliefs $p_0, \dots, p_L$ of a sample, with $D_i$ the divergence of $p_i$ and the target (KL, in the direction
of the rule) and $C_i$ that of $p_i$ and $p_{i-1}$, the objective of module i is $L_i(p_i) = \alpha_i D_i +
(1 - \alpha_i) C_i$. A module that does not make it worse than the belief that it was given, $L_i(p_i) \le
L_i(p_{i-1})$, descends:

$$D_i \le D_{i-1} - \frac{1 - \alpha_i}{\alpha_i} C_i, \qquad
  \text{summed:} \quad D_L \le D_0 - \sum_i \frac{1 - \alpha_i}{\alpha_i} C_i$$

The two sides of the implication are the same inequality, so we measure for how many samples it holds.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise import data
from layerwise.core.rule import Site, by_depth
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.report.reading import read_metrics
from layerwise.rules.sid import Direction, Distillation, divergences
from layerwise.runs import building
from layerwise.runs.output import write_output
from layerwise.terminal import table, terminal_width


def alphas(alpha: float | tuple[float, ...], modules: int) -> list[float]:
    """The weight of the target in each of `modules` modules, from the option of the rule.

    >>> alphas((1.0, 0.5), modules=3)
    [1.0, 0.75, 0.5]
    """
    return [by_depth(alpha, Site(i, modules, "")) for i in range(modules)]


def minimiser(log_before: Tensor, target: Tensor, alpha: float, direction: Direction = "forward") -> Tensor:
    r"""The belief that minimises a module's objective, as log-probabilities `(..., K)`.

    `forward`: the arithmetic mix $\alpha y + (1 - \alpha) p_{before}$. `reverse`: the geometric one,
    proportional to $y^\alpha p_{before}^{1 - \alpha}$.

    Args:
        log_before: log-probabilities of the belief before, `(..., K)`.
        target: probabilities, `(..., K)`; without zeros for `reverse`.
        alpha: weight of the target, in (0, 1].
        direction: of the divergences.

    >>> minimiser(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]), 0.5).exp()
    tensor([0.7500, 0.2500])
    """
    if direction == "forward":
        return (alpha * target + (1 - alpha) * log_before.exp()).log()
    return (alpha * target.log() + (1 - alpha) * log_before).log_softmax(-1)


def least_loss(log_before: Tensor, target: Tensor, alpha: float, direction: Direction = "forward") -> Tensor:
    r"""The smallest value of a module's objective, `(...)` in nats, given the belief before.

    `forward`: the Jensen-Shannon divergence of target and belief with weights $\alpha$ and $1 - \alpha$,
    $H(m) - \alpha H(y) - (1 - \alpha) H(p_{before})$ with m the arithmetic mix. `reverse`:
    $-\log \sum_k y_k^\alpha p_{before,k}^{1 - \alpha}$. The objective exceeds it by $KL(m \| p)$, or
    $KL(p \| m)$.

    Args: as for `minimiser`.

    >>> round(float(least_loss(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]), 0.5)), 4)
    0.2158
    """
    if direction == "reverse":
        return -torch.logsumexp(alpha * target.log() + (1 - alpha) * log_before, -1)

    def entropy(p: Tensor) -> Tensor:
        return torch.special.entr(p).sum(-1)

    before = log_before.exp()
    return entropy(alpha * target + (1 - alpha) * before) - alpha * entropy(target) - (1 - alpha) * entropy(before)


@dataclass(frozen=True)
class Cascade:
    """The modules of SID before training, when all beliefs are nearly uniform; and the losses that follow from that.

    >>> round(Cascade(classes=10, modules=5).first_loss(), 3)
    5.756
    >>> [round(Cascade(*size).fixed_point_loss(), 3) for size in ((10, 5), (10, 10), (100, 8))]
    [0.86, 0.879, 1.058]
    """

    classes: int
    """Number of classes N."""
    modules: int
    """Number of modules L."""
    alpha: float | tuple[float, ...] = 0.5
    """Weight of the target, the option of the rule."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the classes."""
    direction: Direction = "forward"
    """Direction of the divergences."""

    def _start(self) -> tuple[Tensor, Tensor]:
        """The uniform belief's log, and a target."""
        target = torch.full((self.classes,), self.label_smoothing / self.classes, dtype=torch.float64)
        target[0] += 1 - self.label_smoothing
        return torch.full((self.classes,), -math.log(self.classes), dtype=torch.float64), target

    def first_loss(self) -> float:
        r"""The summed objective while all beliefs are uniform.

        Without label smoothing, in the forward direction, it is $\sum_i \alpha_i \ln N$.
        """
        uniform, target = self._start()
        label, _ = divergences(uniform, uniform, target, self.direction)
        return sum(alphas(self.alpha, self.modules)) * float(label)

    def fixed_point_loss(self) -> float:
        """The summed objective once every module has reached the minimum of its own objective.

        Module by module it is `least_loss`, given a belief before that is itself the minimiser. Training settles there
        if the network can learn every label, since no module sees the losses of the later ones. It is not the smallest
        possible sum: beliefs that a joint minimisation would choose go below it.
        """
        belief, target = self._start()
        total = 0.0
        for weight in alphas(self.alpha, self.modules):
            total += float(least_loss(belief, target, weight, self.direction))
            belief = minimiser(belief, target, weight, self.direction)
        return total


def early_exit(beliefs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The class that is predicted by the first module whose largest probability reaches a threshold.

    Args:
        beliefs: log-probabilities `(L + 1, B, K)`, the uniform belief first, as `Learner.beliefs` gives them.
        threshold: a probability. If no module is sure enough of a sample, the last one decides.

    Returns:
        Classes, int64 `(B,)`, and the number of modules that were needed, 1 to L, int64 `(B,)`.

    >>> p = torch.tensor([[[0.5, 0.5]], [[0.4, 0.6]], [[0.9, 0.1]]]).log()
    >>> early_exit(p, 0.5), early_exit(p, 0.8)
    ((tensor([1]), tensor([1])), (tensor([0]), tensor([2])))
    """
    # A rounding error of the softmax must not turn a threshold that is met into one that is not.
    sure = beliefs[1:].amax(-1) >= math.log(threshold) - 1e-6
    sure[-1] = True
    used = sure.int().argmax(0) + 1
    return beliefs[used, torch.arange(beliefs.shape[1], device=beliefs.device)].argmax(-1), used


def measure(
    learner: Learner, batches: data.Batches, thresholds: Sequence[float] = ()
) -> dict[str, list[dict[str, float]]]:
    """Measure the quantities of the theory, averaged over the samples of `batches`.

    Args:
        learner: trained with a rule whose beliefs refine one another (`sid`, `sid_cascade`).
        batches: the samples.
        thresholds: probabilities at which to stop early.

    Returns:
        `modules`: per belief, the uniform one first, `accuracy`, `entropy`, `label_kl` D, `consistency` C; and after
        the first `alpha`, `loss`, `excess` (the loss minus the least one), `descent` (share of samples with
        the inequality of the module), `bound` (D_0 minus the terms of the modules so far) and `within_bound` (share of
        samples with D below it). `early_exit`: per threshold `accuracy` and `modules_used`. In nats.

    Raises:
        LayerwiseError: the rule has no such beliefs; a threshold is not a probability.
    """
    rule = learner.rule
    if not isinstance(rule, Distillation):
        raise LayerwiseError(
            f"rule {rule.name!r} refines no belief, so there is nothing to measure; train with sid or sid_cascade."
        )
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise LayerwiseError(f"threshold {threshold} is not a probability; give one above 0 and at most 1.")
    sums: dict[str, Any] = {}
    exits = torch.zeros(len(thresholds), 2, dtype=torch.float64)
    weights: list[float] = []
    count = 0
    for x, y in batches.epoch(0):
        beliefs = torch.stack(learner.beliefs(x)).double().flatten(1, -2)
        y = y.flatten()
        weights = alphas(rule.alpha, len(beliefs) - 1)
        for name, values in quantities(beliefs, y, learner.task, weights, rule.direction).items():
            sums[name] = sums.get(name, 0) + values.double().sum(-1).cpu()
        for i, threshold in enumerate(thresholds):
            chosen, used = early_exit(beliefs, threshold)
            exits[i] += torch.tensor([int((chosen == y).sum()), int(used.sum())], dtype=torch.float64)
        count += len(y)
    means = {name: (total / count).tolist() for name, total in sums.items()}
    modules = []
    for i in range(len(weights) + 1):
        row = {name: values[i] for name, values in means.items() if len(values) > len(weights)}
        if i:
            row["alpha"] = weights[i - 1]
            row |= {name: values[i - 1] for name, values in means.items() if len(values) == len(weights)}
        modules.append(row)
    early = [
        {"threshold": threshold, "accuracy": correct / count, "modules_used": used / count}
        for threshold, (correct, used) in zip(thresholds, exits.tolist(), strict=True)
    ]
    return {"modules": modules, "early_exit": early}


def quantities(
    beliefs: Tensor, y: Tensor, task: Task, weights: Sequence[float], direction: Direction
) -> dict[str, Tensor]:
    """The quantities that `measure` averages: `(L + 1, B)` for every belief, `(L, B)` for every module.

    Args:
        beliefs: log-probabilities `(L + 1, B, K)`, the uniform belief first.
        y: labels `(B,)`.
        task: the task.
        weights: alpha of each of the L modules.
        direction: of the divergences.
    """
    target = task.distribution(y).to(beliefs.dtype)
    alpha = torch.tensor(weights, dtype=beliefs.dtype, device=beliefs.device)[:, None]
    before, after = beliefs[:-1], beliefs[1:]
    label, _ = divergences(beliefs, beliefs, target, direction)
    _, change = divergences(after, before, target, direction)
    loss = alpha * label[1:] + (1 - alpha) * change
    least = torch.stack([least_loss(p, target, weight, direction) for p, weight in zip(before, weights, strict=True)])
    bound = label[0] - ((1 - alpha) / alpha * change).cumsum(0)
    return {
        "accuracy": beliefs.argmax(-1) == y,
        "entropy": -(beliefs.exp() * beliefs).sum(-1),
        "label_kl": label,
        "consistency": torch.cat([torch.zeros_like(change[:1]), change]),
        "loss": loss,
        "excess": loss - least,
        "descent": loss <= alpha * label[:-1],
        "bound": bound,
        "within_bound": label[1:] <= bound,
    }


def history(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per epoch, from a run's log: `step`, and per module the scalars of its belief on the validation split."""
    rows = []
    file = folder / "metrics.jsonl"
    for values in read_metrics(folder, file.name) if file.exists() else ():
        if values["split"] == "val":
            modules = [
                {key.partition("/")[2]: value for key, value in values.items() if key.startswith(f"{name}/")}
                for name in names
            ]
            rows.append({"step": values["step"], "modules": modules})
    return rows


def beliefs_of_run(
    folder: Path, split: str = "test", thresholds: Sequence[float] = (), batch_size: int = 512, device: str = "auto"
) -> tuple[dict[str, Any], list[str]]:
    """Measure a trained run: plain values for JSON, and notes that the user should see.

    Raises:
        LayerwiseError: no run in the folder, a rule without beliefs, data that has changed.
    """
    run = building.load_run(folder, device)
    options, learner = run.options, run.learner
    if batch_size < 1:
        raise LayerwiseError(f"batch size is {batch_size}; it must be 1 or more.")
    if not isinstance(learner.rule, Distillation):
        raise LayerwiseError(
            f"the run in {folder} was trained with rule {learner.rule.name!r}, which refines no belief; give a run of "
            "sid or sid_cascade."
        )
    if options.task != "classification":
        raise LayerwiseError(f"SID's theory treats beliefs over classes, and the run's task is {options.task}.")
    batches = building.split_in_order(run, split, batch_size, folder)
    found = measure(learner, batches, thresholds)
    count = len(found["modules"]) - 1
    rule = learner.rule
    cascade = Cascade(learner.task.classes, count, rule.alpha, options.label_smoothing, rule.direction)
    units = [unit.site for group in learner.groups for unit in group.units]
    names = [site.name for site in units if learner.rule.place(site) is not None]
    about = {
        "run": str(folder),
        "split": split,
        "samples": len(batches.source),
        "rule": learner.rule.name,
        "direction": learner.rule.direction,
        "label_smoothing": options.label_smoothing,
        "loss": sum(row["loss"] for row in found["modules"][1:]),
        "first_loss": cascade.first_loss(),
        "fixed_point_loss": cascade.fixed_point_loss(),
    }
    return {**about, **found, "history": history(folder, names)}, run.notes


def draw(modules: Sequence[dict[str, float]], file: Path) -> None:
    """Draw entropy and divergence from the target over depth, with the telescoped bound.

    Args:
        modules: as `measure` gives them.
        file: ends in .svg, .png or .pdf.

    Raises:
        LayerwiseError: matplotlib is not installed, another ending, or a file that cannot be written.
    """
    form = file.suffix.removeprefix(".")
    if form not in ("svg", "png", "pdf"):
        raise LayerwiseError(f"cannot draw {file}: the name must end in .svg, .png or .pdf.")
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise LayerwiseError("drawing needs matplotlib; pip install 'layerwise[report]'.") from reason
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    depth = range(len(modules))
    axis.plot(depth, [row["label_kl"] for row in modules], marker="o", label="divergence from the target")
    axis.plot(depth, [row["entropy"] for row in modules], marker="s", label="entropy")
    bounds = [modules[0]["label_kl"], *(row["bound"] for row in modules[1:])]
    axis.plot(depth, bounds, linestyle="--", color="grey", label="telescoped bound")
    axis.set(xlabel="module", ylabel="nats", xticks=list(depth))
    axis.legend(frameon=False)
    page = io.BytesIO()
    figure.savefig(page, format=form)
    write_output(file, page.getvalue())


def print_beliefs(found: dict[str, Any]) -> None:
    """Print what `beliefs_of_run` has measured, as tables."""
    rows: list[tuple[str, ...]] = [("module", *COLUMNS)]
    for i, row in enumerate(found["modules"]):
        rows.append((str(i), *(f"{row[name]:.4f}" if name in row else "" for name in COLUMNS)))
    print(table(rows, terminal_width(), right=0))
    print(
        f"summed loss {found['loss']:.4f}; with uniform beliefs {found['first_loss']:.4f}, at the fixed point "
        f"{found['fixed_point_loss']:.4f}"
    )
    for row in found["early_exit"]:
        print(
            f"stopping at probability {row['threshold']:g}: accuracy {row['accuracy']:.4f} with "
            f"{row['modules_used']:.2f} of {len(found['modules']) - 1} modules"
        )


COLUMNS = ("accuracy", "label_kl", "entropy", "consistency", "loss", "excess", "descent", "bound", "within_bound")
