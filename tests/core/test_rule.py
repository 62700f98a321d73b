"""The contract of a rule is checked: one sentence with the rule and the block for each breach."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from support.nets import CLASSES, dense, moved, problem, snapshot, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise import LayerwiseError, Learner, Rule, Signal
from layerwise.core.rule import cross_entropy_at_head

X, Y = problem()


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), reentrant

    def forward(self, h):
        return checkpoint(self.inner, h, use_reentrant=self.reentrant)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, h):
        return self.inner(h).detach()


@pytest.mark.parametrize("rule", ["local_ce", "sll", "sid", "mono_forward"])
@pytest.mark.parametrize("block", [lambda: Recomputed(True), Detached])
def test_a_block_that_no_signal_reaches_is_named(rule, block):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), block(), nn.Linear(8, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the recomputation too
        with pytest.raises(LayerwiseError, match="no parameter of block '2' gets a gradient"):
            Learner(model, rule, cuts=["1", "2"]).step(X, Y)


def test_a_block_that_recomputes_itself_without_reentrance_learns():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Recomputed(False), nn.Linear(8, CLASSES))
    learner = Learner(model, "local_ce", cuts=["1", "2"], example=X)
    before = snapshot(learner)
    learner.step(X, Y)
    assert moved(learner, before) == set(before)


def test_single_parameters_that_get_no_gradient_are_named():
    model = dense()
    model[3].register_parameter("idle", nn.Parameter(torch.zeros(2)))
    with pytest.warns(UserWarning, match="get no gradient in the first step.*3.idle"):
        Learner(model, "local_ce").step(X, Y)


@dataclass(frozen=True)
class Fine(Rule):
    name, locality, boundary, flat_memory, source = "fine", "local", "activation", True, "this test"
    kind: str = ""

    def signal(self, ctx):
        if ctx.site.is_head:
            return cross_entropy_at_head(ctx)
        each = ctx.h.square().mean(1)
        return {
            "": lambda: Signal(loss=each.mean()),
            "vector": lambda: Signal(loss=each),
            "number": lambda: Signal(loss=1.0),
            "none": lambda: None,
            "cotangent": lambda: Signal(cotangent=ctx.h[:1]),
            "float": lambda: Signal(loss=each.mean(), metrics={"size": 1.0}),
            "metric": lambda: Signal(loss=each.mean(), metrics={"size": each}),
            "output": lambda: Signal(loss=each.mean(), output=(ctx.h,)),
        }[self.kind]()


SIGNALS = {
    "vector": r"a loss that is a tensor of shape \(",
    "number": "a loss that is of type float; give a scalar tensor",
    "none": "of type NoneType and no Signal",
    "cotangent": r"a cotangent that is a tensor of shape \(1, 8\); give a tensor of the output's shape",
    "float": "the metric 'size', which is of type float",
    "metric": r"the metric 'size', which is a tensor of shape",
    "output": "an output that is of type tuple",
}


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_that_cannot_be_acted_on_is_refused_by_rule_and_block(kind):
    trained(dense(), Fine(), [(X, Y)])
    with pytest.raises(LayerwiseError, match=rf"rule 'fine' gave block '2' {SIGNALS[kind]}"):
        Learner(dense(), Fine(kind)).step(X, Y)


class Mute(Rule):
    name, locality, boundary, flat_memory, source = "mute", "local", "activation", True, "this test"


class Undecorated(Fine):
    rate: float = 1.0


@dataclass(frozen=True)
class Nameless(Rule):
    def signal(self, ctx):
        return Signal()


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (Mute(), "has no signal"),
        (Fine, "is the class Fine; give an instance"),
        (Undecorated(), r"'rate' is no option of it; write @dataclass\(frozen=True\)"),
        (Nameless(), "does not declare 'name'"),
        (len, "is no layerwise.Rule"),
        (None, "is no layerwise.Rule"),
    ],
)
def test_what_is_no_rule_is_refused(rule, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), rule)
