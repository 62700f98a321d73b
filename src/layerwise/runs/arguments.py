"""Reads the options of a run from the words of the command line."""

from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from typing import Annotated, Any, get_type_hints

import tyro

from layerwise import models, rules
from layerwise.parsing import parse, take_option
from layerwise.runs.options import TrainOptions, default_recipe, from_mapping
from layerwise.runs.settings import load_recipe


def train_options(argv: list[str], command: str, base: type | None = None, hidden: Sequence[str] = ()) -> Any:
    """Options of a run: a recipe (digits, or shakespeare for a text), then `--rule NAME`, `--model NAME`, then fields.

    Args:
        argv: arguments; not changed.
        command: the command's name, for the help text.
        base: `TrainOptions`, or a subclass with further fields.
        hidden: fields that the command does not offer.

    Returns:
        Options of the type `base`.
    """
    argv = list(argv)
    recipe = load_recipe(take_option(argv, "recipe") or default_recipe(take_option(list(argv), "data")))
    defaults = from_mapping(recipe.values, f"recipe {recipe.name}")
    rule = None if "rule" in hidden else take_option(argv, "rule")  # a comparison has several, which it reads itself
    model = take_option(argv, "model")
    if rule is not None and rule != rules.name_of(defaults.rule):
        defaults = replace(defaults, rule=rules.create(rule))
    if model is not None and models.options(model) is not type(defaults.model):
        defaults = replace(defaults, model=models.options(model)())
    base = base or TrainOptions
    # tyro finds the options of the rule and the model by their types, so both are made concrete here.
    kinds: dict[str, Any] = {"rule": type(defaults.rule), "model": type(defaults.model)}
    hints = get_type_hints(base) | kinds
    kinds |= {name: Annotated[hints[name], tyro.conf.Suppress, tyro.conf.Fixed] for name in hidden}
    parts = [(name, kind, field(default=getattr(defaults, name))) for name, kind in kinds.items()]
    cls = make_dataclass("Options", parts, bases=(base,), frozen=True)
    cls.__doc__ = base.__doc__
    return parse(cls, argv, command, cls(**{f.name: getattr(defaults, f.name) for f in fields(TrainOptions)}))
