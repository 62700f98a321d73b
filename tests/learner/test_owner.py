"""What the owner of a model does to it while a learner trains it: followed or refused, never ignored."""

import copy
import math
import pickle
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from support.nets import CLASSES, PLAIN_SGD, batches, net, problem, same_bits, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise import LanguageModel, LayerwiseError, Learner, Rule, Signal
from layerwise.core.rule import cross_entropy_at_head

X, Y = problem()
RULES = ["backprop", "local_ce", "sll", "sid"]


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def moved(learner, before):
    return {name for name, p in learner.network.named_parameters() if not torch.equal(p, before[name])}


def snapshot(learner):
    return {name: p.detach().clone() for name, p in learner.network.named_parameters()}


# --- Rates


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


# --- Frozen and thawed


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


# --- Replaced, cast


def reload(model):
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


CHANGES = {
    "module '5' was replaced": lambda model: model.__setitem__(5, nn.Linear(8, CLASSES)),
    "module '5' has got or lost a part": lambda model: model[5].add_module("extra", nn.Linear(1, 1)),
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


def test_weights_that_are_copied_in_are_followed():
    model, other = dense(), dense()
    learner = Learner(model, "backprop", example=X, **PLAIN_SGD | {"lr": 0.1})
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    model.load_state_dict(other.state_dict())
    learner.step(X, Y)
    assert same_bits(learner, trained(other, "backprop", [(X, Y)], **PLAIN_SGD | {"lr": 0.1}))


# --- Signals that do not arrive


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


# --- Accumulation


def one_step(model, x, y, rule="local_ce"):
    """The move of a plain step on a batch."""
    learner = trained(copy.deepcopy(model), rule, [(x, y)], **PLAIN_SGD | {"lr": 1.0})
    return [a - b for a, b in zip(learner.network.parameters(), model.parameters(), strict=True)]


@pytest.mark.parametrize("rule", ["local_ce", "sid", "backprop", "mono_forward"])
def test_batches_of_any_size_make_the_update_of_all_their_samples(rule):
    model = dense().double()
    x, y = torch.randn(12, 64, dtype=torch.float64), torch.randint(CLASSES, (12,))
    learner = Learner(copy.deepcopy(model), rule, accumulate=3, **PLAIN_SGD | {"lr": 1.0})
    for start, end in ((0, 1), (1, 8), (8, 12)):
        learner.step(x[start:end], y[start:end])
    for a, b, move in zip(learner.network.parameters(), model.parameters(), one_step(model, x, y, rule), strict=True):
        assert torch.allclose(a - b, move, atol=1e-9)


def test_labels_that_do_not_count_do_not_weigh():
    model = dense().double()
    x, y = torch.randn(8, 64, dtype=torch.float64), torch.randint(CLASSES, (8,))
    y[:3] = -100
    learner = Learner(copy.deepcopy(model), "backprop", accumulate=2, **PLAIN_SGD | {"lr": 1.0})
    learner.step(x[:4], y[:4])  # one label counts
    learner.step(x[4:], y[4:])  # four do
    for a, b, move in zip(
        learner.network.parameters(), model.parameters(), one_step(model, x, y, "backprop"), strict=True
    ):
        assert torch.allclose(a - b, move, atol=1e-9)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_flush_makes_the_update_of_the_batches_that_are_there(left):
    model = dense().double()
    x, y = torch.randn(4 * left, 64, dtype=torch.float64), torch.randint(CLASSES, (4 * left,))
    learner = Learner(copy.deepcopy(model), "local_ce", accumulate=4, **PLAIN_SGD | {"lr": 1.0})
    for part, labels in zip(x.chunk(left), y.chunk(left), strict=True):
        learner.step(part, labels)
    assert learner.updates == 0 and same_bits(learner.network.model, model)
    assert learner.flush() and not learner.flush()
    assert learner.updates == 1 and all(p.grad is None for p in model.parameters())
    for a, b, move in zip(learner.network.parameters(), model.parameters(), one_step(model, x, y), strict=True):
        assert torch.allclose(a - b, move, atol=1e-9)


def test_an_update_under_way_continues_from_a_state():
    data = [(X[:3], Y[:3]), (X[3:8], Y[3:8])]
    straight = trained(dense(), "local_ce", data, accumulate=2)
    half = trained(dense(), "local_ce", data[:1], accumulate=2)
    resumed = Learner(dense(), "local_ce", accumulate=2, example=X)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    resumed.step(*data[1])
    assert same_bits(resumed, straight) and resumed.updates == 1


def test_a_batch_that_is_not_finite_is_blamed_for_itself():
    broken = X.clone()
    broken[0] = math.nan
    learner = Learner(dense(), "local_ce", accumulate=3)
    with pytest.raises(LayerwiseError, match="at step 0: its input already holds NaN"):
        learner.step(broken, Y)
    skipping = Learner(dense(), "local_ce", accumulate=2, nonfinite="skip")
    before = snapshot(skipping)
    skipping.step(broken, Y)
    metrics = skipping.step(X, Y)
    assert len(metrics.skipped) == 2 and moved(skipping, before) == set()
    assert skipping.step(X, Y).skipped == skipping.step(X, Y).skipped == ()


# --- The contract of a rule


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


# --- Optimizers, batches


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), "is an instance of SGD, and every block needs"),
        (lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]), "LBFGS needs a closure"),
        (lambda groups: None, "gave NoneType; let it return a torch.optim.Optimizer"),
        (lambda groups: torch.optim.SGD(groups[:1], lr=0.1), "left parameters out"),
        (nn.Linear, "Linear is no torch.optim.Optimizer"),
        (3, "the optimizer is 3; give a name"),
    ],
)
def test_an_optimizer_that_cannot_serve_is_refused(optimizer, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), "local_ce", optimizer=optimizer).step(X, Y)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (X.numpy(), Y, "of type ndarray; give torch.from_numpy"),
        ((X, X), Y, "of type tuple"),
        (X, Y.numpy(), "the labels are of type ndarray"),
        (X, Y.tolist(), "the labels are of type list"),
        (X, Y[0], "8 inputs and one number labels|one number labels"),
        (X, Y[:2], "and 2 labels"),
        (torch.tensor(1.0), Y, "a single number"),
    ],
)
def test_a_batch_that_is_none_is_refused(x, y, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), "local_ce").step(x, y)


# --- Copies and threads


@pytest.mark.parametrize("rule", ["sll", "backprop", "noprop_dt"])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_continues_to_the_same_bits(rule, twin, steps):
    kind = "noprop" if rule.startswith("noprop") else "mlp"
    model = net(kind) if kind == "noprop" else net(kind, dropout=0.3)
    data = batches(5)
    learner = trained(model, rule, data[:steps], accumulate=2)
    other = twin(learner)
    assert other.network.model is not learner.network.model
    for x, y in data[steps:]:
        learner.step(x, y)
        other.step(x, y)
    assert same_bits(learner, other)


def test_learners_in_threads_have_their_own_draws():
    """Two learners in two threads, and four threads in one learner: the bits of no threads at all."""
    data = batches(12)
    alone = [trained(net("mlp", dropout=0.5), "sll", data, seed=seed) for seed in (0, 1)]
    learners = [Learner(net("mlp", dropout=0.5), "sll", seed=seed) for seed in (0, 1)]
    one = Learner(net("mlp", dropout=0.5), "sll", seed=0)

    def work(learner):
        for x, y in data:
            learner.step(x, y)

    def same_batch(learner):
        for _ in range(3):
            learner.step(*data[0])

    threads = [threading.Thread(target=work, args=(learner,)) for learner in learners]
    threads += [threading.Thread(target=same_batch, args=(one,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(a, b) for a, b in zip(alone, learners, strict=True))
    assert one.steps == 12 and same_bits(one, trained(net("mlp", dropout=0.5), "sll", [data[0]] * 12, seed=0))


def test_several_processes_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(LayerwiseError, match=r"runs in 4 processes.*OneProcess\(\)"):
        Learner(dense(), "local_ce").step(X, Y)
    from layerwise.learner import OneProcess

    Learner(dense(), "local_ce", replicas=OneProcess()).step(X, Y)


# --- What goes wrong in one step is no part of the next


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", ["local_ce", "sll", "backprop"])
def test_a_step_that_fails_leaves_nothing_behind(rule, accumulate):
    """NaN, a wrong shape, an interrupt: afterwards the learner trains like one that has seen none of it."""
    model = dense()
    learner = Learner(copy.deepcopy(model), rule, accumulate=accumulate, example=X)
    layer = learner.network.model[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    for x, error in ((X * math.nan, LayerwiseError), (X[:, :, :4], LayerwiseError), (X, KeyboardInterrupt)):
        hook = layer.register_forward_pre_hook(interrupt) if error is KeyboardInterrupt else None
        with pytest.raises(error):
            learner.step(x, Y)
        if hook is not None:
            hook.remove()
        assert learner.accumulated == 0 and all(p.grad is None for _, p in learner.named_parameters())
    assert learner.steps == 0
    other = Learner(copy.deepcopy(model), rule, accumulate=accumulate, example=X)
    for x, y in batches(2):
        learner.step(x, y)
        other.step(x, y)
    assert same_bits(learner, other) and learner.updates == other.updates > 0


@pytest.mark.parametrize("rule", ["local_ce", "backprop"])
def test_gradients_of_the_owner_are_no_part_of_an_update(rule):
    clean = trained(dense(), rule, [(X, Y)])
    stale = Learner(dense(), rule, example=X)
    nn.functional.cross_entropy(stale.network.model(X), Y).backward()
    stale.step(X, Y)
    assert same_bits(clean, stale)


def test_a_layer_frozen_between_batches_of_an_update_keeps_its_weights():
    learner = Learner(dense(), "local_ce", accumulate=2, example=X)
    learner.step(X, Y)
    learner.network.model[1].requires_grad_(False)
    before = snapshot(learner)
    learner.step(X, Y)
    assert moved(learner, before) & {"1.weight", "1.bias"} == set() and moved(learner, before)


@pytest.mark.parametrize("schedule", [lambda k: math.nan, lambda k: -1.0, lambda k: None, lambda k: 1 / 0])
def test_a_schedule_that_gives_no_rate_is_refused(schedule):
    with pytest.raises(LayerwiseError, match="the schedule gives"):
        Learner(dense(), "local_ce", schedule=schedule).step(X, Y)


def test_rates_that_are_none_are_refused():
    learner = trained(dense(), "local_ce", [(X, Y)])
    learner.optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(LayerwiseError, match="was set to nan"):
        learner.step(X, Y)


def test_the_one_optimizer_saves_loads_and_refuses():
    learner = trained(dense(), "backprop", batches(2))
    other = Learner(copy.deepcopy(learner.network.model), "backprop", example=X)
    other.optimizer.load_state_dict(learner.optimizer.state_dict())
    learner.step(X, Y)
    other.step(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(learner.network.parameters(), other.network.parameters(), strict=True))
    with pytest.raises(LayerwiseError, match="none can be added"):
        learner.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(LayerwiseError, match="has no optimizers yet"):
        torch.optim.lr_scheduler.StepLR(Learner(dense(), "local_ce").optimizer, 1)
    torch.optim.lr_scheduler.OneCycleLR(learner.optimizer, 0.1, total_steps=10)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer_options": {"lr": 7.0}}, "holds 'lr', which is an option of its own"),
        ({"optimizer_options": {"weight_decay": 7.0}}, "holds 'weight_decay'"),
        ({"optimizer_options": {"amsgrad": "yes"}}, "it is True or False"),
        ({"optimizer_options": {"betas": (0.9,)}}, "AdamW refuses its options"),
        ({"optimizer_options": [1]}, "give a mapping"),
        ({"task": LanguageModel(), "label_smoothing": 0.1}, "give it to the task alone"),
        ({"device": "foo"}, "device 'foo' cannot be used"),
        ({"device": "meta"}, "nothing can be trained on the device 'meta'"),
        ({"lr_multipliers": [1]}, "lr_multipliers is of type list"),
        ({"replicas": 3}, "replicas is of type int"),
        ({"stage": 3}, "stage is of type int"),
        ({"layout": 3}, "layout is of type int"),
        ({"cuts": 3}, "cuts is of type int"),
        ({"channels_last": "yes"}, "channels_last is of type str"),
    ],
)
def test_arguments_of_another_kind_are_refused(options, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), "local_ce", **options).step(X, Y)


def test_a_learner_that_is_built_in_inference_mode_trains():
    learner = Learner(dense(), "sll")
    with torch.inference_mode():
        learner(X)
    learner.step(X, Y)


@pytest.mark.parametrize("act", ["evaluate", "__call__", "state_dict", "flush"])
def test_a_replaced_module_is_noticed_by_whatever_comes_first(act):
    learner = trained(dense(), "local_ce", [(X, Y)])
    learner.network.model[5] = nn.Linear(8, CLASSES)
    arguments = {"evaluate": (X, Y), "__call__": (X,)}.get(act, ())
    with pytest.raises(LayerwiseError, match="module '5' was replaced"):
        getattr(learner, act)(*arguments)


def test_an_input_that_cannot_be_predicted_is_a_sentence():
    with pytest.raises(LayerwiseError, match="the network cannot predict"):
        trained(dense(), "sid", [(X, Y)])(X[:, :, :4])
