r"""Measures what SID's theory says of beliefs: `layerwise beliefs RUN`.

For the beliefs $p_0, \dots, p_L$ of a sample, with $D_i$ the divergence of $p_i$ and the target (KL, in the direction
of the rule) and $C_i$ that of $p_i$ and $p_{i-1}$, the objective of module i is $L_i(p_i) = \alpha_i D_i +
(1 - \alpha_i) C_i$. A module that does not make it worse than the belief that it was given, $L_i(p_i) \le
L_i(p_{i-1})$, descends:

$$D_i \le D_{i-1} - \frac{1 - \alpha_i}{\alpha_i} C_i, \qquad
  \text{summed:} \quad D_L \le D_0 - \sum_i \frac{1 - \alpha_i}{\alpha_i} C_i$$

The two sides of the implication are the same inequality, so what is to be measured is for how many samples it holds.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise import data
from layerwise.core.rule import Site, by_depth
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.report.reading import read_lines
from layerwise.rules.sid import Direction, Distillation, divergences
from layerwise.runs import building
from layerwise.runs.folders import read_options
from layerwise.runs.output import check_output, data_paths, write_output


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
    $-\log \sum_k y_k^\alpha p_{before,k}^{1 - \alpha}$. What lies above it is $KL(m \| p)$, or $KL(p \| m)$.

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


def _ideal(classes: int, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The uniform belief's log, and a target."""
    target = torch.full((classes,), label_smoothing / classes, dtype=torch.float64)
    target[0] += 1 - label_smoothing
    return torch.full((classes,), -math.log(classes), dtype=torch.float64), target


def first_loss(
    classes: int,
    modules: int,
    alpha: float | tuple[float, ...] = 0.5,
    label_smoothing: float = 0.0,
    direction: Direction = "forward",
) -> float:
    r"""The summed objective of a cascade whose beliefs are all uniform, as they nearly are at the start.

    Without label smoothing, in the forward direction, it is $\sum_i \alpha_i \ln N$.

    >>> round(first_loss(classes=10, modules=5), 3)
    5.756
    """
    uniform, target = _ideal(classes, label_smoothing)
    label, _ = divergences(uniform, uniform, target, direction)
    return sum(alphas(alpha, modules)) * float(label)


def fixed_point_loss(
    classes: int,
    modules: int,
    alpha: float | tuple[float, ...] = 0.5,
    label_smoothing: float = 0.0,
    direction: Direction = "forward",
) -> float:
    """The summed objective of a cascade in which every module has reached the minimum that it can see.

    Module by module it is `least_loss`, given a belief before that is itself the minimiser: where training settles
    when the network can learn every label, since no module sees the losses of the later ones. It is not the smallest
    sum that there is: beliefs that a joint minimisation would choose go below it.

    Args:
        classes: number of classes N.
        modules: number of modules L.
        alpha: the rule's option.
        label_smoothing: share of the target that is spread over the classes.
        direction: of the divergences.

    >>> [round(fixed_point_loss(*size), 3) for size in ((10, 5), (10, 10), (100, 8))]
    [0.86, 0.879, 1.058]
    """
    belief, target = _ideal(classes, label_smoothing)
    total = 0.0
    for weight in alphas(alpha, modules):
        total += float(least_loss(belief, target, weight, direction))
        belief = minimiser(belief, target, weight, direction)
    return total


def early_exit(beliefs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The class that is predicted by the first module whose largest probability reaches a threshold.

    Args:
        beliefs: log-probabilities `(L + 1, B, K)`, the uniform belief first, as `Learner.beliefs` gives them.
        threshold: a probability. A sample that no module is sure enough of is answered by the last one.

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
        the first `alpha`, `loss`, `excess` (what the loss lies above the least one), `descent` (share of samples with
        the inequality of the module), `bound` (D_0 less the terms of the modules so far) and `within_bound` (share of
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
    """What `measure` averages: `(L + 1, B)` for every belief, `(L, B)` for every module.

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
    for values in read_lines(folder, file.name) if file.exists() else ():
        if values["split"] == "val":
            modules = [
                {key.partition("/")[2]: value for key, value in values.items() if key.startswith(f"{name}/")}
                for name in names
            ]
            rows.append({"step": values["step"], "modules": modules})
    return rows


def report(
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
    batches = building.split_in_order(run, split, batch_size, folder)
    found = measure(learner, batches, thresholds)
    count = len(found["modules"]) - 1
    how = (learner.task.classes, count, learner.rule.alpha, options.label_smoothing, learner.rule.direction)
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
        "first_loss": first_loss(*how),
        "fixed_point_loss": fixed_point_loss(*how),
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


@dataclass(frozen=True)
class BeliefsOptions:
    """The beliefs of a run of SID, module by module: descent, the bounds of its theory, early exit."""

    split: Literal["test", "val", "train"] = "test"
    """Which part of the run's data set."""
    thresholds: tuple[float, ...] = (0.5, 0.9, 0.99)
    """Probabilities at which to stop at a module."""
    batch_size: int = 512
    """Samples per batch."""
    device: str = "auto"
    """cpu | cuda | cuda:N | auto."""
    json: str | None = None
    """Also write all results to this file, with the history of the run."""
    plot: str | None = None
    """Draw entropy and divergence over depth to this file (.svg, .png, .pdf)."""


def show_beliefs(folder: Path, options: BeliefsOptions) -> list[str]:
    """`layerwise beliefs RUN`: prints the tables; returns notes that the user should see."""
    for file in filter(None, (options.json, options.plot)):
        check_output(Path(file), data_paths(read_options(folder).data))  # before the work
    found, notes = report(folder, options.split, options.thresholds, options.batch_size, options.device)
    if options.plot:
        draw(found["modules"], Path(options.plot))
    if options.json:
        write_output(Path(options.json), json.dumps(found, indent=2) + "\n")
    print(f"{'module':>6}" + "".join(f"{name:>14}" for name in COLUMNS))
    for i, row in enumerate(found["modules"]):
        print(f"{i:>6}" + "".join(f"{row[name]:>14.4f}" if name in row else f"{'':>14}" for name in COLUMNS))
    print(
        f"summed loss {found['loss']:.4f}; with uniform beliefs {found['first_loss']:.4f}, at the fixed point "
        f"{found['fixed_point_loss']:.4f}"
    )
    for row in found["early_exit"]:
        print(
            f"stopping at probability {row['threshold']:g}: accuracy {row['accuracy']:.4f} with "
            f"{row['modules_used']:.2f} of {len(found['modules']) - 1} modules"
        )
    return notes


COLUMNS = ("accuracy", "label_kl", "entropy", "consistency", "loss", "excess", "descent", "bound", "within_bound")
