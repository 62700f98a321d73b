"""Numbers that make no sense are refused, wherever they are given, with one sentence that names the option."""

import dataclasses
import math
import types
import typing
from typing import Annotated

import pytest
from support.nets import net

from layerwise import LayerwiseError, Learner, create_rule, rule_names
from layerwise.core.optim import Schedule
from layerwise.core.ranges import PositiveFloat, Range, check_fields
from layerwise.errors import short
from layerwise.rules import get
from layerwise.runs.launch import ParallelOptions
from layerwise.runs.options import TrainOptions
from layerwise.scaling.options import ScalingOptions, check_measurable

NEVER = [math.nan, math.inf, -math.inf, -1, -0.5, True, "1", 10**400, 10**5000, [1.0]]
"""What no number of this library may be: nothing here is negative."""


def kinds(hint):
    """The types that a hint allows: of `float | tuple[float, ...] | None`, float and None."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return {part for part in parts if isinstance(part, type)}


def numeric(cls):
    """Names of the fields that hold one number, and of those that may also hold several."""
    hints = typing.get_type_hints(cls)
    own = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return {name: hint for name, hint in own.items() if kinds(hint) & {int, float}}


RULE_NUMBERS = [(rule, name, hint) for rule in rule_names() for name, hint in numeric(get(rule)).items()]
RUN_NUMBERS = numeric(TrainOptions)


def refused(make, name, value):
    with pytest.raises(LayerwiseError) as error:
        make()
    sentence = str(error.value)
    assert sentence.startswith(f"{name} is ") or sentence.startswith(f"{name}["), sentence
    assert "\n" not in sentence and sentence.endswith(".") and "must be" in sentence
    assert value is None or short(value) in sentence


@pytest.mark.parametrize(("rule", "name", "hint"), RULE_NUMBERS, ids=str)
def test_no_rule_takes_a_number_that_makes_no_sense(rule, name, hint):
    for value in [*NEVER, *([] if float in kinds(hint) else [1.5, 1.0])]:
        refused(lambda value=value: create_rule(rule, **{name: value}), name, value)
    if any(typing.get_origin(part) is tuple for part in typing.get_args(hint)):
        for value in (math.nan, -1.0):
            refused(lambda value=value: create_rule(rule, **{name: (0.5, value)}), name, value)
        with pytest.raises(LayerwiseError, match=rf"{name} is \(\); give one number or several"):
            create_rule(rule, **{name: ()})
    if type(None) not in kinds(hint):
        refused(lambda: create_rule(rule, **{name: None}), name, None)


DIVIDES = ["temperature", "scale", "label_scale", "eta", "alpha", "shrinkage", "group", "updates", "period", "n"]
DIVIDES += ["depth", "dim", "steps", "kernel", "negatives"]


NONE_IS_ENOUGH = [("solo", "depth")]  # no blocks in its heads


@pytest.mark.parametrize(
    ("rule", "name"), [(r, n) for r, n, _ in RULE_NUMBERS if n in DIVIDES and (r, n) not in NONE_IS_ENOUGH], ids=str
)
def test_zero_is_refused_where_nothing_would_be_left(rule, name):
    refused(lambda: create_rule(rule, **{name: 0}), name, 0)


@pytest.mark.parametrize(
    ("rule", "name", "value"),
    [
        ("sll", "dropout", 1.0),
        ("ssl_local", "drop", 1.0),
        ("predsim", "beta", 1.01),
        ("auglocal", "taper", 1.01),
        ("sid", "alpha", 1.01),
        ("sid_cascade", "alpha", 1.01),
        ("boosted", "shrinkage", 1.01),
    ],
)
def test_a_share_is_at_most_the_whole(rule, name, value):
    refused(lambda: create_rule(rule, **{name: value}), name, value)


BELOW_ONE = ("dropout", "drop", "ahead_momentum", "memory", "decay")
"""Options that 1 is too much for."""


@pytest.mark.parametrize("rule", rule_names())
def test_every_default_and_whole_numbers_for_floats_are_taken(rule):
    one = create_rule(rule)
    ones = {n: 1 for n, hint in numeric(type(one)).items() if float in kinds(hint) and n not in BELOW_ONE}
    assert create_rule(rule, **ones) == create_rule(rule, **{name: float(value) for name, value in ones.items()})


def test_a_switch_is_true_or_false():
    with pytest.raises(LayerwiseError, match=r"top_down is 1; it must be True or False\."):
        create_rule("graph_forward", top_down=1)


@pytest.mark.parametrize("name", RUN_NUMBERS)
def test_no_run_takes_a_number_that_makes_no_sense(name):
    for value in [*NEVER, *([] if float in kinds(RUN_NUMBERS[name]) else [1.5])]:
        refused(lambda value=value: TrainOptions(**{name: value}), name, value)


LEARNER = ["lr", "weight_decay", "clip", "accumulate", "label_smoothing", "seed", "blocks"]


@pytest.mark.parametrize("name", LEARNER)
def test_a_learner_refuses_what_a_run_refuses(name):
    for value in NEVER:
        refused(lambda value=value: Learner(net("mlp"), **{name: value}), name, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, True])
def test_a_factor_of_the_rate_is_a_number(value):
    for make in (lambda: Learner(net("mlp"), lr_multipliers={"block1": value}),
                 lambda: TrainOptions(lr_multipliers={"block1": value})):  # fmt: skip
        with pytest.raises(LayerwiseError, match=r"^lr_multipliers\[block1\] is .*; it must be a finite number, 0 or"):
            make()


@pytest.mark.parametrize("options", [{"final": math.nan}, {"final": -1.0}, {"warmup": 1.0}, {"total": -3}], ids=str)
def test_a_schedule_refuses_what_would_give_no_rate(options):
    ((name, value),) = options.items()
    refused(lambda: Schedule("cosine", **{"total": 10, **options}), name, value)


@dataclasses.dataclass(frozen=True)
class Own(get("backprop")):
    """A rule of somebody's own."""

    rate: PositiveFloat = 1.0
    odd: Annotated[int, Range(least=1, most=9, whole=True)] = 3
    name: typing.ClassVar[str] = "own"


def test_a_rule_of_ones_own_declares_ranges_in_the_same_way():
    refused(lambda: Own(rate=0.0), "rate", 0.0)
    with pytest.raises(LayerwiseError, match=r"odd is 10; it must be a whole number in \[1, 9\]\."):
        Own(odd=10)
    check_fields(Own(rate=2, odd=9))


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 1e308, 10**400])
def test_no_wait_is_without_an_end(seconds):
    """Clocks of torch and of Python overflow beyond their range, and a wait of infinity has no end."""
    for make in (
        lambda: ParallelOptions(timeout=seconds),
        lambda: check_measurable(ScalingOptions(timeout=seconds), blocks=4),
    ):
        with pytest.raises(LayerwiseError, match=r"timeout is .*; it must be a finite number in"):
            make()


@pytest.mark.parametrize("value", [5, 0.5, None, [1], "cutout"])
def test_what_is_no_tuple_of_names_is_one_sentence(value):
    with pytest.raises(LayerwiseError, match="augment"):
        create_rule("ssl_local", augment=value)
