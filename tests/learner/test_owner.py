"""Changes to a model while a learner trains it are followed or refused, never ignored."""

import copy
import math

import pytest
import torch
from support.nets import CLASSES, PLAIN_SGD, batches, dense, moved, problem, same_bits, snapshot, trained
from torch import nn

from layerwise import LayerwiseError, Learner

X, Y = problem()

RULES = ["backprop", "local_ce", "sll", "sid"]


@pytest.mark.parametrize("rule", RULES)
def test_a_rate_set_by_hand_is_the_rate(rule):
    learner = trained(dense(), rule, [(X, Y)], **PLAIN_SGD | {"lr": 0.1})
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.0
    before = snapshot(learner)
    learner.step(X, Y)
    assert moved(learner, before) == set()


def test_a_rate_set_by_hand_is_where_the_schedule_continues():
    """lr_k = base * f(k); a rate r set before update k makes the next one r * f(k + 1) / f(k)."""
    learner = Learner(dense(), "local_ce", lr=0.1, schedule=lambda k: 0.5**k, example=X)
    for expected in (0.1, 0.05):
        learner.step(X, Y)
        assert {g["lr"] for g in learner.optimizer.param_groups} == {expected}
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.8
    learner.step(X, Y)
    assert {g["lr"] for g in learner.optimizer.param_groups} == {0.8}
    learner.step(X, Y)
    assert [g["lr"] for g in learner.optimizer.param_groups] == pytest.approx([0.4] * 6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scheduler_of_torch_is_followed_like_in_a_loop_of_ones_own(accumulate):
    model = dense()
    learner = Learner(
        copy.deepcopy(model), "backprop", optimizer="sgd", lr=0.1, accumulate=accumulate, weight_decay=0.0, example=X
    )
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (learner.optimizer, plain)]
    for x, y in batches(4):
        for _ in range(accumulate):
            learner.step(x, y)
        plain.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        plain.step()
        for schedule in schedules:
            schedule.step()
    assert {g["lr"] for g in learner.optimizer.param_groups} == {plain.param_groups[0]["lr"]}
    for a, b in zip(learner.network.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_rate_set_from_outside_is_in_the_state():
    learner = trained(dense(), "local_ce", [(X, Y)], lr=0.1)
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.03
    resumed = Learner(copy.deepcopy(learner.network.model), "local_ce", lr=0.1, example=X)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one in (learner, resumed):
        one.step(X, Y)
    assert same_bits(learner, resumed)


def test_rates_that_are_none_are_refused():
    learner = trained(dense(), "local_ce", [(X, Y)])
    learner.optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(LayerwiseError, match="was set to nan"):
        learner.step(X, Y)


@pytest.mark.parametrize("rule", [*RULES, "interlocking", "predsim", "last_layer"])
def test_layers_frozen_and_thawed_later_are_followed(rule):
    learner = trained(dense(), rule, [(X, Y)])
    first = {"1.weight", "1.bias"}
    teach = rule != "last_layer"
    for frozen in (True, False, True):
        learner.network.model[1].requires_grad_(not frozen)
        before = snapshot(learner)
        learner.step(X, Y)
        changed = moved(learner, before)
        assert (changed & first == set()) if frozen or not teach else first <= changed
        assert "5.weight" in changed


def test_a_layer_that_is_frozen_at_first_learns_when_it_thaws():
    model = dense()
    model[1].requires_grad_(False)
    learner = trained(model, "local_ce", [(X, Y)])
    before = snapshot(learner)
    learner.network.model[1].requires_grad_(True)
    learner.step(X, Y)
    assert {"1.weight", "1.bias"} <= moved(learner, before)


def test_a_layer_frozen_between_batches_of_an_update_keeps_its_weights():
    learner = Learner(dense(), "local_ce", accumulate=2, example=X)
    learner.step(X, Y)
    learner.network.model[1].requires_grad_(False)
    before = snapshot(learner)
    learner.step(X, Y)
    assert moved(learner, before) & {"1.weight", "1.bias"} == set() and moved(learner, before)


def reload(model):
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


CHANGES = {
    "module '5' was replaced": lambda model: model.__setitem__(5, nn.Linear(8, CLASSES)),
    "module '5' has gained or lost a part": lambda model: model[5].add_module("extra", nn.Linear(1, 1)),
    "parameter '1.weight' was replaced": reload,
    "was replaced": lambda model: nn.utils.parametrizations.weight_norm(model[3]),
    "was torch.float32 .* and is torch.float64 now": lambda model: model.double(),
    "'3.bias' was replaced": lambda model: setattr(model[3], "bias", nn.Parameter(torch.zeros(8))),
    "'1.bias' was replaced": lambda model: setattr(model[1], "bias", None),
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_what_would_not_be_trained_is_refused(sentence):
    learner = trained(dense(), "local_ce", [(X, Y)])
    CHANGES[sentence](learner.network.model)
    with pytest.raises(LayerwiseError, match=sentence):
        learner.step(X, Y)


@pytest.mark.parametrize("act", ["evaluate", "__call__", "state_dict", "flush"])
def test_a_replaced_module_is_noticed_by_whatever_comes_first(act):
    learner = trained(dense(), "local_ce", [(X, Y)])
    learner.network.model[5] = nn.Linear(8, CLASSES)
    arguments = {"evaluate": (X, Y), "__call__": (X,)}.get(act, ())
    with pytest.raises(LayerwiseError, match="module '5' was replaced"):
        getattr(learner, act)(*arguments)


def test_weights_that_are_copied_in_are_followed():
    model, other = dense(), dense()
    learner = Learner(model, "backprop", example=X, **PLAIN_SGD | {"lr": 0.1})
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    model.load_state_dict(other.state_dict())
    learner.step(X, Y)
    assert same_bits(learner, trained(other, "backprop", [(X, Y)], **PLAIN_SGD | {"lr": 0.1}))


@pytest.mark.parametrize("rule", ["local_ce", "backprop"])
def test_gradients_of_the_owner_are_no_part_of_an_update(rule):
    clean = trained(dense(), rule, [(X, Y)])
    stale = Learner(dense(), rule, example=X)
    nn.functional.cross_entropy(stale.network.model(X), Y).backward()
    stale.step(X, Y)
    assert same_bits(clean, stale)


def test_a_parameter_that_is_added_is_refused_wherever_it_is():
    for path in ("", "3"):
        learner = trained(dense(), "local_ce", [(X, Y)])
        learner.network.model.get_submodule(path).register_parameter("extra", nn.Parameter(torch.zeros(2)))
        with pytest.raises(LayerwiseError, match=f"module '{path}' has gained the parameter 'extra'"):
            learner.step(X, Y)


class Doubled(nn.Sequential):
    def forward(self, h):
        return 2 * super().forward(h)


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = dense()[:4]
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("act", ["step", "evaluate", "__call__"])
@pytest.mark.parametrize("change", ["the root's class", "a stage's class", "the class's forward"])
def test_a_forward_that_would_not_run_is_refused_when_it_comes_later(act, change, monkeypatch):
    """Blocks are run in place of the root and of the stage that holds a cut; neither's own forward is called."""
    model, cuts = (dense(), ["1", "3"]) if change == "the root's class" else (Body(), ["body.1", "body.3"])
    learner = Learner(model, "local_ce", cuts=cuts, example=X)
    learner.step(X, Y)
    if change == "the root's class":
        model.__class__ = Doubled
    elif change == "a stage's class":
        model.body.__class__ = Doubled
    else:
        monkeypatch.setattr(Body, "forward", lambda self, x: 2 * self.head(self.body(x)))
    with pytest.raises(LayerwiseError, match="another class, or its class another forward"):
        getattr(learner, act)(*((X,) if act == "__call__" else (X, Y)))


def test_a_rate_that_is_a_tensor_is_scheduled_by_torch_and_by_the_learner():
    """Schedulers of torch fill such a rate in place; lr_k = 0.1 * 0.5**k either way, as for a number."""

    def adamw(groups):
        return torch.optim.AdamW(groups, lr=torch.tensor(0.1))

    by_torch = Learner(dense(), "local_ce", optimizer=adamw, example=X)
    of_its_own = Learner(dense(), "local_ce", optimizer=adamw, schedule=lambda k: 0.5**k, example=X)
    number = Learner(dense(), "local_ce", lr=0.1, schedule=lambda k: 0.5**k, example=X)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(by_torch.optimizer, 0.5)
    for k in range(3):
        for learner in (by_torch, of_its_own, number):
            learner.step(X, Y)
            rates = {round(float(group["lr"]), 6) for group in learner.optimizer.param_groups}
            assert rates == {round(0.1 * 0.5**k, 6)}
        scheduler.step()
    resumed = Learner(copy.deepcopy(by_torch.network.model), "local_ce", optimizer=adamw, example=X)
    resumed.load_state_dict(copy.deepcopy(by_torch.state_dict()))
    for learner in (by_torch, resumed):
        learner.step(X, Y)
    assert same_bits(by_torch, resumed)


@pytest.mark.parametrize("rate", ["0.1", None, [0.1], torch.ones(2)])
def test_a_rate_that_is_no_number_is_one_sentence(rate):
    learner = trained(dense(), "local_ce", [(X, Y)])
    learner.optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(LayerwiseError, match=r"a learning rate was set to .*; give a number"):
        learner.step(X, Y)
