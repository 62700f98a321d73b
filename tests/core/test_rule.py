"""The contract of a rule is checked: one sentence with the rule and the block for each breach."""

import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from support.nets import CLASSES, dense, moved, problem, snapshot, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise import LayerwiseError, Learner, Rule, Signal
from layerwise.core.pieces import HasTrunk, JoinsGroups, TakesTurns
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


class Adapted(nn.Linear):
    """A frozen layer with a bottleneck that can be switched off, as adapters are."""

    def __init__(self):
        super().__init__(8, 8)
        self.requires_grad_(False)
        self.down, self.up, self.on = nn.Linear(8, 2), nn.Linear(2, 8), True

    def forward(self, h):
        out = super().forward(h)
        return out + self.up(self.down(h)) if self.on else out


def adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Adapted(), nn.Linear(8, CLASSES))
    return model, Learner(model, "local_ce", cuts="*", clip=1.0)


def test_a_block_that_a_later_signal_does_not_reach_is_named_once():
    model, learner = adapted()
    learner.step(X, Y)
    model[2].on = False
    before = snapshot(learner)
    with pytest.warns(UserWarning, match="no parameter of block '2' gets a gradient any more .2.down.weight"):
        learner.step(X, Y)
    assert not any(name.startswith("2.") for name in moved(learner, before))
    learner.step(X, Y)  # warnings are errors here


def test_a_block_with_other_parameters_reached_than_in_the_first_step_learns_silently():
    model, learner = adapted()
    model[2].weight.requires_grad_(True)  # unfrozen: the first parameter of the block
    learner.step(X, Y)
    model[2].weight.requires_grad_(False)
    learner.step(X, Y)
    model[2].weight.requires_grad_(True)
    model[2].on = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.step(X, Y)


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
            "fewer": lambda: Signal(loss=each.mean(), output=ctx.h[:3]),
            "scalar": lambda: Signal(loss=each.mean(), output=ctx.h.mean()),
        }[self.kind]()


SIGNALS = {
    "vector": r"a loss that is a tensor of shape \(",
    "number": "a loss that is a float; give a scalar tensor",
    "none": r"None and no Signal",
    "cotangent": r"a cotangent that is a tensor of shape \(1, 8\); give a tensor of the output's shape",
    "float": "the metric 'size', which is a float",
    "metric": r"the metric 'size', which is a tensor of shape",
    "output": "an output that is a tuple",
    "fewer": r"an output that is a tensor of shape \(3, 8\); give a tensor with as many samples",
    "scalar": r"an output that is a tensor of shape \(\)",
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
        (Fine, "is the class Fine; give an instance"),
        (Undecorated(), r"'rate' is not an option of it; write @dataclass\(frozen=True\)"),
        (Nameless(), "does not declare 'name'"),
        (len, "is not a layerwise.Rule"),
        (None, "is not a layerwise.Rule"),
    ],
)
def test_what_is_no_rule_is_refused(rule, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), rule)


@dataclass(frozen=True)
class Idle(TakesTurns, Fine):
    """Says nothing of whose turn it is."""


@pytest.mark.parametrize(("kind", "said"), [(Mute, "signal(self, ctx)"), (Idle, "learns_at(self, update, site)")])
def test_a_rule_that_leaves_a_method_out_is_refused_by_name(kind, said):
    with pytest.raises(LayerwiseError, match=rf"class {kind.__name__} has no \w+; define {re.escape(said)} in it\."):
        kind()


# Every answer of a rule, once.


@dataclass(frozen=True)
class Answers(JoinsGroups, TakesTurns, HasTrunk, Rule):
    """A rule that keeps the contract but in the answer called `wrong`, which is `given`, or fails there."""

    name, locality, boundary, flat_memory, source = "answers", "local", "activation", True, "this test"
    wrong: str = ""
    given: object = None

    def answer(self, method, right):
        if method != self.wrong:
            return right
        if isinstance(self.given, Exception):
            raise self.given
        return self.given

    def groups(self, blocks):
        return self.answer("groups", [range(i, i + 1) for i in range(blocks + 1)])

    def groups_at(self, update, blocks):
        return self.answer("groups_at", [range(i, i + 1) for i in range(blocks + 1)])

    def learns_at(self, update, site):
        return self.answer("learns_at", True)

    def auxiliary(self, site, h, task):
        return self.answer("auxiliary", None)

    def begin(self, ctx):
        return self.answer("begin", (ctx.x, None))

    def run(self, block, h, message):
        return self.answer("run", block(h))

    def signal(self, ctx):
        return self.answer("signal", Signal(loss=ctx.h.square().mean()))

    def to_trunk(self, site, gradient, task):
        return self.answer("to_trunk", gradient)

    def predict(self, network, auxiliary, x):
        return self.answer("predict", network(x))


SITES = "return from `{}` ranges with rising starts that cover the sites 0 to 2, the head included"
ANSWERS = [
    ("groups", [range(1), range(1, 2)], "puts block 'head' into no group; " + SITES.format("groups")),
    ("groups", [range(1), range(2, 3)], r"rule 'answers' puts block '4' into no group"),
    ("groups", [range(3), range(0, 3)], r"rule 'answers' gives the group range\(0, 3\) of 3 sites"),
    ("groups", [range(5)], r"rule 'answers' gives the group range\(0, 5\) of 3 sites"),
    ("groups", [[0, 1], [2]], "rule 'answers' gives a list for a group of blocks"),
    ("groups", None, r"rule 'answers' gives None for its groups of blocks"),
    ("groups_at", [], "puts block '2' into no group; " + SITES.format("groups_at")),
    ("learns_at", None, r"rule 'answers' answers whether block '2' learns in update 0 with None; return True"),
    ("auxiliary", "net", "rule 'answers' gave block '2' an auxiliary module of type str"),
    ("begin", torch.zeros(2), r"rule 'answers' begins with a tensor of shape \(2,\); return two things from `begin`"),
    ("begin", (torch.zeros(2),), "rule 'answers' begins with 1 things; return two things from `begin`"),
    ("begin", (None, None), r"rule 'answers' begins with an input that is None; return two things"),
    ("run", None, r"rule 'answers' runs block '2' to None; return the block's output from `run`"),
    ("signal", Signal(), "rule 'answers' gives block '4' neither a loss nor a cotangent, so it would not learn"),
    ("signal", Signal(metrics={"m": torch.zeros((), device="meta")}), "the metric 'm', which is"),
    ("signal", Signal(metrics={"m": torch.zeros((), dtype=torch.complex64)}), "the metric 'm', which is"),
    ("to_trunk", torch.zeros(1), r"rule 'answers' sends a tensor of shape \(1,\) back from block '4'; return from"),
    ("predict", None, r"rule 'answers' predicts None; return from `predict` logits of shape \(64, ..., 4\)"),
    ("predict", torch.zeros(64, 9), r"rule 'answers' predicts a tensor of shape \(64, 9\)"),
]  # fmt: skip


def used(rule):
    learner = Learner(dense(), rule, cuts=["2", "4"])
    learner.step(X, Y)
    return learner(X)


def test_a_rule_that_keeps_the_contract_is_used():
    assert used(Answers()).shape == (len(X), CLASSES)


@pytest.mark.parametrize(("wrong", "given", "sentence"), ANSWERS)
def test_an_answer_that_cannot_be_acted_on_is_refused_by_rule_and_block(wrong, given, sentence):
    with pytest.raises(LayerwiseError, match=sentence) as caught:
        used(Answers(wrong, given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method", ["groups", "groups_at", "learns_at", "auxiliary", "begin", "signal", "to_trunk", "predict"]
)
def test_a_rule_that_fails_is_named_with_the_method(method):
    with pytest.raises(LayerwiseError, match=rf"rule 'answers' fails in `{method}`.*\(KeyError: 'it'\)") as caught:
        used(Answers(method, KeyError("it")))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(("fact", "value"), [("name", 3), ("boundary", None), ("flat_memory", "yes"), ("source", 1)])
def test_a_declared_fact_has_its_type(fact, value):
    kind = type("Other", (Answers,), {fact: value})
    with pytest.raises(LayerwiseError, match=f"declares {fact} = .*; it is of type"):
        Learner(dense(), kind())


@pytest.mark.parametrize("rule", ["dgl", "periodic_guidance", "local_ce"])
def test_a_batch_of_one_sample_under_batch_norm_is_no_fault_of_the_rule(rule):
    """The first two have batch norm in their own readouts, the last one meets it in the network."""
    norm = [] if rule != "local_ce" else [nn.BatchNorm1d(4)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *norm, nn.Linear(4, 3))
    convs = [nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU()) for channels in (1, 4)]
    learner = Learner(nn.Sequential(*convs, head), rule)
    with pytest.raises(LayerwiseError, match="batch norm cannot train on one value, so give batches of more") as caught:
        learner.step(torch.randn(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    assert "correct the rule" not in str(caught.value) and isinstance(caught.value.__cause__, ValueError)
