"""A rule's extra passes besides the step's own: the same draws and mode, and no running statistic changes twice."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.nets import (
    CLASSES,
    FAMILIES,
    batches,
    by_parameter,
    kinds,
    made,
    net,
    problem,
    same_bits,
    tensors,
    trained,
)
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from layerwise import Learner, create_rule, rule_names
from layerwise.core.functional import goodness
from layerwise.core.pieces import UsesPrediction
from layerwise.rules import forward_forward, get

X, Y = batches(1)[0]
EXTRA = [
    ("layer_collaboration", {"gamma": "all"}),
    ("layer_collaboration", {"gamma": "all", "predictor": "softmax"}),
    ("forward_forward", {"negatives": "hard"}),
    ("forward_forward", {"negatives": "hard", "predictor": "softmax"}),
    ("interlocking", {"n": 2}),
    ("interlocking", {"n": 9}),
    ("sll", {"overlap": 2, "dropout": 0.2}),
    ("svp", {"overlap": 1, "group": 2}),
]
"""Rules with options under which blocks run more than once per step."""
RECOMPUTE = ("backprop_checkpoint",)  # runs blocks again in the backward pass


def normed(constrain=lambda layer: layer):
    """A net with batch norm and dropout in every block."""
    torch.manual_seed(0)
    layers = []
    for inputs in (64, 16, 16):
        layers += [constrain(nn.Linear(inputs, 16)), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, CLASSES))


def counts(model):
    return {name: int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("rule", "options"),
    [*EXTRA, *((rule, {}) for rule in rule_names() if not get(rule).models and rule not in RECOMPUTE)],
    ids=str,
)
def test_batch_norm_sees_every_batch_once(rule, options):
    cuts = ["4", "8", "12"]
    learner = Learner(normed(), create_rule(rule, **options), cuts=cuts, layout={"input": "BCHW"}, example=X)
    before = counts(learner.network)
    for step in (1, 2):
        learner.step(X, Y)
        assert counts(learner.network) == {name: count + step for name, count in before.items()}
    assert len(before) == 3


@pytest.mark.parametrize("gamma", ["earlier", "all"])
def test_spectral_norm_iterates_once_per_step(gamma):
    """Its vectors depend on the weights alone, and the weights do not differ before the first update."""
    model = normed(spectral_norm)
    rule = create_rule("layer_collaboration", gamma=gamma)
    found = Learner(copy.deepcopy(model), rule, cuts=["4", "8", "12"])
    found.step(X, Y)
    model.train()(X)
    wanted = {name: b for name, b in model.named_buffers() if name.endswith(("_u", "_v"))}
    assert len(wanted) == 6
    assert all(torch.equal(b, wanted[name]) for name, b in found.network.named_buffers() if name in wanted)


def spied(learner, monkeypatch):
    """What `signal` is shown at every site of a step."""
    seen, signal = [], type(learner.rule).signal

    def spy(rule, ctx):
        seen.append(ctx)
        return signal(rule, ctx)

    monkeypatch.setattr(type(learner.rule), "signal", spy)
    learner.step(X, Y)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("predictor", ["goodness", "softmax"])
def test_what_the_others_think_is_what_they_think_in_this_step(predictor, precision, monkeypatch):
    """The first pass and the step's own one have the same draws, so the sums of goodness are the same bits."""
    rule = create_rule("layer_collaboration", gamma="all", predictor=predictor)
    learner = Learner(normed(), rule, cuts=["4", "8", "12"], example=X, precision=precision)
    told = None
    for ctx in spied(learner, monkeypatch)[:-1]:
        told = ctx.message["gamma"].clone() if told is None else told
        told -= goodness(ctx.h[: 2 * len(Y)], "sum").detach()
    assert float(told.abs().max()) < 1e-3  # nothing is left when all blocks are taken off; goodness is about 16


@pytest.mark.parametrize("kind", ["gcn", "gat"])
def test_the_states_above_are_those_of_this_step(kind, monkeypatch):
    x, y = problem(64)
    learner = Learner(net(kind, dropout=0.5), create_rule("graph_forward", top_down=True), example=x)
    seen, signal = [], type(learner.rule).signal
    monkeypatch.setattr(type(learner.rule), "signal", lambda rule, ctx: (seen.append(ctx), signal(rule, ctx))[1])
    learner.step(x, y)
    for ctx in seen[:-1]:
        assert torch.equal(ctx.message["above"][ctx.site.index], F.normalize(ctx.h.detach(), dim=1))


@pytest.mark.parametrize("predictor", ["goodness", "softmax"])
def test_hard_negatives_are_drawn_from_what_the_learner_predicts(predictor, monkeypatch):
    learner = Learner(normed(), create_rule("forward_forward", negatives="hard", predictor=predictor), cuts=["4", "8"])
    learner.step(X, Y)
    wanted, asked, draw = learner(X), [], forward_forward.wrong_labels

    def spy(y, classes, logits):
        asked.append(logits)
        return draw(y, classes, logits)

    monkeypatch.setattr(forward_forward, "wrong_labels", spy)
    learner.step(X, Y)
    assert torch.equal(asked[0], wanted)
    assert learner.network.model.training and all(module.training for module in learner.network.model.modules())


@dataclass(frozen=True)
class LooksAhead(UsesPrediction, get("backprop")):
    """Looks at the network's logits, then draws."""

    looks: bool = True

    def begin(self, ctx):
        noise = torch.rand(3)
        if self.looks:
            self.seen[:] = [ctx.forward(ctx.x), ctx.predict(ctx.x)]
        self.drawn.append((noise, torch.rand(3)))
        return ctx.x, None


def test_a_look_ahead_shows_the_steps_own_logits_and_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(LooksAhead, "seen", [], raising=False)
    monkeypatch.setattr(LooksAhead, "drawn", [], raising=False)
    one = Learner(normed(), LooksAhead(), cuts=["4", "8"], example=X)
    other = Learner(normed(), LooksAhead(looks=False), cuts=["4", "8"], example=X)
    other.step(X, Y)
    predicted = one(X)
    logits = spied(one, monkeypatch)[-1].h
    assert torch.equal(LooksAhead.seen[0], logits.detach())
    assert torch.equal(LooksAhead.seen[1], predicted)
    assert not torch.equal(logits, predicted)  # dropout
    assert same_bits(one, other)
    assert all(torch.equal(a, b) for a, b in zip(*LooksAhead.drawn, strict=True))


@pytest.mark.parametrize("kind", ["vgg", "mlp"])
def test_interlocking_over_all_blocks_is_backprop_with_its_running_statistics(kind):
    model = net(kind, **({"norm": "batch", "dropout": 0.3} if kind == "mlp" else {}))
    data = batches(3)
    a, b = (trained(model, rule, data) for rule in (create_rule("interlocking", n=3), "backprop"))
    assert same_bits(a.network, b.network)


# --- Skipped updates

NAN = torch.full_like(X, float("nan"))


def with_batch_norm(kind):
    return net(kind, **({"norm": "batch"} if kind == "mlp" else {}))


def everything(learner):
    return tensors(learner.network) | {f"rule.{name}": t for name, t in tensors(learner.auxiliary).items()}


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        pytest.param(rule, kind, marks=() if kind != "vgg" and rule in FAMILIES else pytest.mark.slow)
        for rule in rule_names()
        if not by_parameter(rule)
        for kind in (("mlp", "vgg") if not get(rule).models else kinds(rule))
    ],
)
def test_a_batch_that_is_not_finite_changes_nothing_under_any_rule(rule, kind):
    x, y = problem(64) if kind in ("gcn", "gat") else (X, Y)
    model = net(kind) if rule == "equilibrium_propagation" else with_batch_norm(kind)  # which it refuses
    learner = trained(model, made(rule), [(x, y)], nonfinite="skip")
    before = everything(learner)
    assert learner.step(torch.full_like(x, float("nan")), y).skipped
    after = everything(learner)
    if rule in ("noprop_dt", "noprop_ct"):  # the head learns from drawn labels and sees no image
        before, after = ({n: t for n, t in found.items() if not n.startswith("head")} for found in (before, after))
    assert same_bits(after, before)
    assert learner.skipped == 1
    assert learner.step(x, y).skipped == ()


@pytest.mark.parametrize(("rule", "options"), EXTRA, ids=str)
def test_nor_does_it_where_blocks_run_more_than_once(rule, options):
    learner = trained(with_batch_norm("vgg"), create_rule(rule, **options), [(X, Y)], nonfinite="skip")
    before = everything(learner)
    assert learner.step(NAN, Y).skipped
    assert same_bits(everything(learner), before)


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("rule", ["last_layer", "boosted", "interlocking", "local_ce"])
def test_an_update_is_left_out_with_all_its_batches(rule, broken):
    learner = Learner(with_batch_norm("vgg"), made(rule), nonfinite="skip", accumulate=2)
    for x in (X, X):
        learner.step(x, Y)
    before = everything(learner)
    for i in range(2):
        learner.step(NAN if i == broken else X, Y)
    assert same_bits(everything(learner), before)


@pytest.mark.parametrize("rule", ["last_layer", "local_ce", "boosted"])
def test_a_batch_too_large_for_its_variance_is_left_out_too(rule):
    """The output is finite, since what is infinite divides: it would be zero ever after."""
    learner = trained(with_batch_norm("vgg"), made(rule), [(X, Y)], nonfinite="skip")
    before = tensors(learner.network.model.block1)
    skipped = learner.step(X * 1e30, Y).skipped
    assert ("block1" in skipped) == (rule == "local_ce")  # under the others it has no update
    assert same_bits(tensors(learner.network.model.block1), before)
