"""Reads the arguments of `layerwise compare --rule`: rules with their options."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from layerwise import rules
from layerwise.errors import LayerwiseError, suggestion
from layerwise.rules.words import fields_of, split_word, value_of
from layerwise.runs.options import TrainOptions, from_mapping, model_name, to_mapping

PER_RULE = (
    "lr",
    "weight_decay",
    "optimizer",
    "schedule",
    "warmup",
    "clip",
    "label_smoothing",
    "nonfinite",
    "cuts",
    "blocks",
)
"""Options of a run that may differ between rules, besides those of the model: they change neither data nor budget."""


def read_rules(words: Sequence[str], common: TrainOptions) -> dict[str, TrainOptions]:
    """Read the words of `--rule`: the options of a run for each rule that they name.

    Args:
        words: `name` or `name:option=value:...`; commas separate several in one word. An option is a field of the
            rule, one of `PER_RULE`, or `model.` and a field of the model. A value is a number, a word, `none`,
            `true`, `false`, or numbers separated by `/`. `name+replacement` trains the network with other modules, see
            `layerwise.replace`. `all` means every rule that trains the model on the task, with its default options.
        common: the options that all runs share.

    Raises:
        LayerwiseError: an unknown rule or option, a value of the wrong kind, or a rule that is named twice.

    >>> read_rules(["sll:overlap=1:lr=0.01,backprop"], TrainOptions())["sll:overlap=1:lr=0.01"].rule.overlap
    1
    >>> read_rules(["sll+approx_gelu"], TrainOptions())["sll+approx_gelu"].replace
    ('approx_gelu',)
    """
    found: dict[str, TrainOptions] = {}
    kinds = {name: rules.get(name) for name in rules.names()}
    model = model_name(common.model)
    tasks = {common.task, *(["soft_labels"] if common.mixup or common.cutmix else [])}
    every = [n for n, kind in kinds.items() if (not kind.models or model in kind.models) and tasks <= {*kind.tasks}]
    labels = [part for word in words for part in word.split(",") if part]
    for label in (name for part in labels for name in (every if part == "all" else [part])):
        name, settings = split_word(label)
        file, colon, own = name.rpartition(":")  # FILE.py:Class
        own, *added = own.split("+")
        name = file + colon + own
        values = plain_fields(common) | {"rule": {"name": name}, "replace": (*common.replace, *added)}
        legal = {field: (values["rule"], field, hint) for field, hint in fields_of(rules.get(name)).items()}
        legal |= {field: (values, field, hint) for field, hint in fields_of(TrainOptions).items() if field in PER_RULE}
        for field, hint in fields_of(type(common.model)).items():
            legal[f"model.{field}"] = values["model"], field, hint
        for option, text in settings:
            if option not in legal:
                raise LayerwiseError(f"--rule {label}: no option {option!r}; {suggestion(option, list(legal))}.")
            place, field, hint = legal[option]
            place[field] = value_of(text, hint)
        if label in found:
            raise LayerwiseError(f"--rule names {label} twice; leave one out, or give them different options.")
        found[label] = from_mapping(values, f"--rule {label}")
    if not found:
        raise LayerwiseError("--rule is empty; name at least one rule, see layerwise ls rules.")
    return found


def settled_by(label: str) -> list[str]:
    """Names of the options that a word of `--rule` sets.

    >>> settled_by("sll:overlap=1:weight-decay=0")
    ['overlap', 'weight_decay']
    """
    return [setting.partition("=")[0].replace("-", "_") for setting in label.split(":")[1:] if "=" in setting]


def plain_fields(options: TrainOptions) -> dict[str, Any]:
    """The fields of a run as plain values, without those that a comparison adds."""
    values = to_mapping(options)
    return {f.name: values[f.name] for f in dataclasses.fields(TrainOptions)}
