"""Checks the arguments of a learner; each error is one sentence."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from layerwise import rules
from layerwise.core.cutting import check_cutting
from layerwise.core.groups import Unit
from layerwise.core.pieces import has_trunk
from layerwise.core.ranges import check_ranges
from layerwise.core.rule import Rule
from layerwise.core.tasks import KINDS, Classification, Task
from layerwise.errors import LayerwiseError, short, suggestion, unknown
from layerwise.memory.offload import check_offload
from layerwise.parallel.alone import OneProcess, WholeNetwork
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage


def usable_task(task: Task | str | None, label_smoothing: float = 0.0) -> Task:
    """Return the task (default: classification); the number of outputs is known later.

    Raises:
        LayerwiseError: there is no such task, or it contradicts `label_smoothing`.
    """
    if task is None:
        return Classification(2, label_smoothing)
    if isinstance(task, str):
        if task not in KINDS or task == "loss":
            legal = [kind for kind in KINDS if kind != "loss"]
            raise LayerwiseError(f"there is no task {task!r}; {suggestion(task, legal)}.")
        task = KINDS[task]()
    if not isinstance(task, Task):
        given = f"the class {task.__name__}" if isinstance(task, type) else f"of type {type(task).__name__}"
        raise LayerwiseError(f"the task is {given}; give an instance, such as layerwise.Regression().")
    if label_smoothing and getattr(task, "label_smoothing", 0.0) != label_smoothing:
        raise LayerwiseError("label_smoothing is given together with task; give it only to the task.")
    return task


def check_further(given: Any, learner: type, own: Mapping[str, str]) -> None:
    """Raise LayerwiseError unless `given` is None or maps arguments of a learner, which its owner leaves to the user.

    Args:
        given: further arguments of the learner.
        learner: its class.
        own: arguments that the owner gives, and the rest of a sentence that says what the user does instead.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise LayerwiseError(f"learner is {short(given)}; give a mapping from arguments of Learner to their values.")
    legal = [name for name in inspect.signature(learner).parameters if name not in own]
    for name in given:
        if name in own:
            raise LayerwiseError(f"{name!r} is {own[name]}.")
        if name not in legal:
            raise LayerwiseError(f"a learner has no argument {name!r}; {suggestion(name, legal)}.")


def check_can(rule: Rule, task: Task) -> None:
    """Raise LayerwiseError if the rule cannot do the task; it says why, and which rules can."""
    needs = [task.kind, *{"token": ["language_model"], "pixel": ["segmentation"]}.get(task.positions, [])]
    for need in needs:
        if need not in rule.tasks:
            _refuse(rule, WORDS.get(need, need), [need, task.kind])


def check_soft_labels(rule: Rule, whose: str = "") -> None:
    """Raise LayerwiseError if the rule needs one class per sample; `whose` says what makes soft labels."""
    if "soft_labels" not in rule.tasks:
        _refuse(rule, WORDS["soft_labels"] + whose, ["soft_labels"])


def check_labels_of(rule: Rule, task: Task, y: Tensor) -> None:
    """Raise LayerwiseError unless labels `y` fit the task, and the rule can use them."""
    if task.kind == "classification" and y.is_floating_point() and y.dim() > 1 and "soft_labels" not in rule.tasks:
        task.check(y)
        check_soft_labels(rule)
    missing = task.missing
    if missing is not None and not rule.unlabelled and y.device.type == "cpu" and bool((y == missing).any()):
        able = [name for name in rules.names() if rules.get(name).unlabelled and not rules.get(name).models]
        raise LayerwiseError(
            f"rule {rule.name!r} needs a label for every sample, and {int((y == missing).sum())} of "
            f"{y.numel()} have none ({missing}); choose a rule that ignores such samples: {', '.join(able)}."
        )
    task.check(y, rule.unlabelled)


WORDS = {
    "soft_labels": "learn from soft labels",
    "language_model": "learn from a label per token",
    "segmentation": "learn from a label per pixel",
    "regression": "do regression",
    "multilabel": "learn from several labels at once",
    "loss": "learn from a custom loss",
    "classification": "do classification",
}


def _refuse(rule: Rule, what: str, kinds: Sequence[str]) -> NoReturn:
    able = [name for name in rules.names() if set(kinds) <= set(rules.get(name).tasks) and not rules.get(name).models]
    raise LayerwiseError(f"rule {rule.name!r} cannot {what}: {rule.only}; rules that can: {', '.join(able)}.")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise LayerwiseError for arguments of `Learner`, by name, that are wrong whatever the model is."""
    check_types(given)
    check_ranges(**{n: given[n] for n in ("clip", "accumulate", "micro", "label_smoothing", "seed", "blocks")})
    check_ranges(lr=given["lr"], weight_decay=given["weight_decay"], lr_multipliers=given["lr_multipliers"] or {})
    check_words(given["precision"], given["nonfinite"])
    check_offload(given["offload"], isinstance(given["replicas"], Replicas), given["compile"])
    schedule = given["schedule"]
    if schedule is not None and not callable(schedule):
        raise LayerwiseError(
            f"the schedule is of type {type(schedule).__name__}; give a function from the update number to a "
            "factor, or give learner.optimizer to a scheduler of torch."
        )


READOUTS = "readouts"
"""The key of `lr_multipliers` for the modules that a rule adds to the blocks."""


def check_multipliers(lr_multipliers: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise LayerwiseError if a factor of the learning rate names no block."""
    for name in lr_multipliers:
        if name not in (*names, READOUTS):
            raise LayerwiseError(f"lr_multipliers names no block {name!r}; {suggestion(name, [*names, READOUTS])}.")


TYPES: Mapping[str, tuple[Any, str]] = {
    "lr_multipliers": (Mapping | None, "a mapping from block names to factors"),
    "channels_last": (bool, "True or False"),
    "stage": (Stage | WholeNetwork | None, "a Stage"),
    "replicas": (OneProcess | None, "Replicas, Shards or OneProcess()"),
    "tied": (str | None, "'last', 'first' or 'frozen'"),
    "example": (Tensor | tuple | Mapping | None, "a batch of inputs: a tensor, or a tuple or a mapping of tensors"),
    "compile": (bool | str, "True, False, or the name of a backend"),
    "offload_folder": (str | Path | None, "the path of a folder"),
}
"""Types of arguments, and what to give."""


def check_types(given: Mapping[str, Any]) -> None:
    """Raise LayerwiseError for an argument of the wrong type."""
    for name, (kinds, wanted) in TYPES.items():
        if not isinstance(given[name], kinds):
            raise LayerwiseError(f"{name} is of type {type(given[name]).__name__}; give {wanted}.")
    compile = given["compile"]
    if isinstance(compile, str) and compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise unknown("backend of torch.compile", compile, sorted(known))
    check_cutting(given["cuts"], given["blocks"], given["layout"])


def check_micro(
    rule: Rule, units: Sequence[Unit], layouts: Mapping[str, str | None], keeps: Sequence[str] = ()
) -> None:
    """Raise LayerwiseError if a batch cannot be run in parts; warn if parts change what is learned.

    Args:
        rule: the rule.
        units: blocks that run here.
        layouts: of the input and of the blocks' outputs, by name.
        keeps: places where the model stores tensors of one pass, which passes of other parts would overwrite.
    """
    if why := rule.whole_batch or ("trains a trunk that waits for the whole batch" if has_trunk(rule) else ""):
        raise LayerwiseError(f"rule {rule.name!r} {why}, so that it cannot be run in parts; leave micro out.")
    for name, layout in layouts.items():
        if layout is not None and not layout.startswith("B"):
            raise LayerwiseError(
                f"{name} has the layout {layout!r}, and a batch can be run in parts only along its first dimension; "
                "leave micro out, or put the batch first."
            )
    if keeps:
        raise LayerwiseError(
            f"the forward pass leaves tensors in {', '.join(keeps)}, where the passes of several parts of a batch "
            "would overwrite each other's; leave micro out, or pass them on as arguments."
        )
    if names := [unit.site.name for unit in units if unit.running()]:
        warnings.warn(
            f"running statistics (batch norm) in {', '.join(names)} are taken from each of the parts of a batch, so "
            "the result is not that of the whole batch",
            stacklevel=2,
        )


def check_words(precision: str, nonfinite: str) -> None:
    """Raise LayerwiseError for an unknown value of an option."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise LayerwiseError(f"unknown precision {precision!r}; choose fp32, bf16 or fp16.")
    if nonfinite not in ("raise", "skip"):
        raise LayerwiseError(f"nonfinite is {nonfinite!r}; choose 'raise' or 'skip'.")
