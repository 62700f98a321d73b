"""The options of a training run: one dataclass that is the command line, the recipe and the checkpoint's record."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise import models, rules
from layerwise.core import own_code
from layerwise.core.ranges import TRAINING, check_ranges
from layerwise.core.rule import Rule
from layerwise.data.catalogue import is_table, is_text
from layerwise.errors import LayerwiseError, short
from layerwise.learner.arguments import check_soft_labels
from layerwise.memory.fitting import read_size
from layerwise.models import ModelOptions
from layerwise.parsing import check_largest
from layerwise.replacements import check_name
from layerwise.runs.settings import FLAGS, OF_TEXTS, RunSettings, build_options, load_recipe

OF_TASKS = {
    "loss": ("regression",),
    "label_smoothing": ("classification", "language_model"),
    "mixup": ("classification",),
    "cutmix": ("classification",),
    **dict.fromkeys(OF_TEXTS, ("language_model",)),
}
"""Maps options to the tasks to which they apply."""


@dataclass(frozen=True)
class TrainOptions(RunSettings):
    """Train a network with a learning rule.

    Choose the rule and the model by name, `--rule sll --model vgg`; the options of both follow below.
    """

    rule: Rule = field(default_factory=lambda: rules.create("sll"))
    model: ModelOptions = field(default_factory=lambda: models.options("mlp")())

    def __post_init__(self) -> None:
        check_ranges(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in TRAINING})
        if self.threads is not None and self.threads > MOST_THREADS:
            raise LayerwiseError(f"threads is {self.threads}; the most is {MOST_THREADS}.")
        if is_text(self.data) and self.task == "classification":
            object.__setattr__(self, "task", "language_model")  # a text has no other
        for name, own in OF_TASKS.items():
            sentences = name == "window" and is_table(self.data)  # which a pretrained model reads
            if self.task not in own and self._differs(name) and not sentences:
                raise LayerwiseError(f"{name} is about {own[0]}, and the task is {self.task}; leave it out.")
        if self._differs("vocabulary") and self.tokenizer != "bpe":
            raise LayerwiseError(f"vocabulary is that of a bpe, and the tokenizer is {self.tokenizer}; leave it out.")
        if self.peak not in (None, "auto"):
            read_size(self.peak)
        for name in self.replace:
            check_name(name)
        if self.augment and self.task == "segmentation":
            raise LayerwiseError("augment changes images and not their masks; leave it out of a segmentation.")
        if self.mixup or self.cutmix:
            check_soft_labels(self.rule, ", which mixup and CutMix make")
        for part in (self, self.rule, self.model):
            for f in dataclasses.fields(part):
                _check_number(f.name, getattr(part, f.name))

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default


MOST_THREADS = 1024  # beyond this many the system refuses to start threads, and the process dies


def _check_number(name: str, value: Any) -> None:
    """Refuse NaN, infinity and whole numbers of more than 64 bits, also inside tuples and tables."""
    if isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_number(name, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise LayerwiseError(f"{name} is {value}; give a finite number.")
    else:
        check_largest(name, value)


def model_name(options: ModelOptions) -> str:
    """The name of a model's options."""
    return models.name_of(options)


def run_name(options: TrainOptions) -> str:
    """Data set and model, as part of a folder's name.

    >>> run_name(from_mapping({"data": "hf:ylecun/mnist"}))
    'hf_ylecun_mnist-mlp'
    """
    model = model_name(options.model)
    if isinstance(options.model, models.OutsideModel):
        model = Path(model.partition(".py:")[2] or model.removeprefix("hf:").removeprefix("timm:")).stem
    return f"{options.data.replace('/', '_').replace(':', '_')}-{model}"


def to_mapping(options: TrainOptions) -> dict[str, Any]:
    """Options as nested plain values, as in a recipe; the inverse of `from_mapping`."""
    values = dataclasses.asdict(options)
    values["rule"] = {"name": rules.name_of(options.rule), **_recorded(options.rule), **values["rule"]}
    values["model"] = {"name": model_name(options.model), **_recorded(options.model), **values["model"]}
    return values


def _recorded(part: Rule | ModelOptions) -> dict[str, str]:
    """SHA-256 of the files from which a user's rule or model was loaded."""
    if isinstance(part, models.OutsideModel):
        return {"sha256": part.sha256} if part.sha256 else {}
    found = own_code.origin(type(part))
    return {} if found is None else {"sha256": found[1]}


def own_code_of(values: Any) -> list[str]:
    """The files and modules with code from elsewhere in options in the form of `to_mapping`.

    >>> own_code_of({"rule": {"name": "mine.py:Rule"}, "model": {"name": "mlp"}, "optimizer": "schedulefree.AdamW"})
    ['mine.py', 'schedulefree']
    """
    if not isinstance(values, Mapping):
        return []
    parts = [values.get(part) for part in ("rule", "model")]
    names = [str(part.get("name")) for part in parts if isinstance(part, Mapping)]
    found = {name.rpartition(":")[0] for name in names if own_code.is_own(name)}
    module = str(values.get("optimizer", "")).rpartition(".")[0]
    return sorted(found | ({module} if module and module.partition(".")[0] not in ("torch", "layerwise") else set()))


def from_mapping(values: Mapping[str, Any], where: str = "the options") -> TrainOptions:
    """Build options from nested plain values; missing fields take their defaults.

    Args:
        values: fields of `TrainOptions`; `rule` and `model` are tables with a `name` and their own fields.
        where: the origin of the values, for an error.

    Raises:
        LayerwiseError: an unknown field, or a value of the wrong type or out of range.

    >>> from_mapping({"rule": {"name": "sll", "weight": 0.5}, "epochs": 3}).rule.weight
    0.5
    """
    if not isinstance(values, Mapping):
        raise LayerwiseError(
            f"{where}: instead of a table of options there is {short(values)}; start the run again, or correct it."
        )
    given = dict(values)
    parts: dict[str, Any] = {}
    for part, find, default in (("rule", rules.get, "sll"), ("model", models.options, "mlp")):
        table = given.pop(part, {})
        if not isinstance(table, Mapping):
            raise LayerwiseError(f"{where}: {part} is {short(table)}; write a table [{part}] with name = ...")
        table = dict(table)
        name = table.pop("name", default)
        if not isinstance(name, str):
            raise LayerwiseError(f"{where}, [{part}]: name = {short(name)} is not str.")
        outside = models.outside.is_outside(name)
        recorded = table.pop("sha256", None) if outside else None
        parts[part] = build_options(find(name, recorded) if outside else find(name), table, f"{where}, [{part}]")
    return build_options(TrainOptions, {**given, **parts}, where)


def default_recipe(data: str | None) -> str:
    """The recipe that the command line starts from for these data.

    >>> default_recipe("digits"), default_recipe("text:book.txt")
    ('digits', 'shakespeare')
    """
    return "shakespeare" if data is not None and is_text(data) else "digits"


def to_words(options: TrainOptions) -> list[str]:
    """The shortest `layerwise train` arguments that give these options; the inverse of the command line.

    >>> to_words(from_mapping({**load_recipe("digits").values, "epochs": 3, "rule": {"name": "sll", "overlap": 1}}))
    ['--rule', 'sll', '--rule.overlap', '1', '--epochs', '3']
    """
    recipe = from_mapping(load_recipe(default_recipe(options.data)).values)  # what the command line starts from
    words = ["--rule", rules.name_of(options.rule), *_differing(options.rule, recipe.rule, "rule.")]
    if type(options.model) is not type(recipe.model):
        words += ["--model", model_name(options.model)]
    words += _differing(options.model, recipe.model, "model.")
    same = dataclasses.replace(recipe, rule=options.rule, model=options.model)
    return words + _differing(options, same, "")


def _differing(own: Any, base: Any, prefix: str) -> list[str]:
    """`--name value` for the fields in which an object differs from another, or from its type's defaults."""
    base = base if type(base) is type(own) else type(own)()
    words = []
    for name in (f.name for f in dataclasses.fields(own)):
        value = getattr(own, name)
        if value == getattr(base, name):
            continue
        flag = FLAGS.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            front, _, last = flag.rpartition(".")
            words.append(f"--{prefix}{flag}" if value else f"--{prefix}{front}{'.' * bool(front)}no-{last}")
        elif isinstance(value, dict):
            words += [f"--{prefix}{flag}", *(str(word) for item in value.items() for word in item)]
        elif isinstance(value, tuple):
            words += [f"--{prefix}{flag}", *map(str, value)]
        else:
            words += [f"--{prefix}{flag}", str(value)]
    return words
