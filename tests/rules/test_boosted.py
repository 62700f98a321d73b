"""Boosting against its formulas: the residual, Newton's step, the order of the turns, the sum."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from support.nets import (
    CLASSES,
    PLAIN_SGD,
    batches,
    gone_on,
    linear_blocks,
    net,
    problem,
    same_bits,
    tensors,
    trained,
    vectors,
)
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule
from layerwise.core.functional import newton_step
from layerwise.core.rule import Site

X, Y = batches(1)[0]


def outputs(learner, x):
    """Every stage's f and its step, and the sums F_0 .. F_T, out of the plain modules."""
    h, total, found = x, torch.zeros(len(x), CLASSES), []
    *blocks, head = learner.network.model
    for i, block in enumerate(blocks):
        h = block(h)
        last = i == len(blocks) - 1
        stage = learner.auxiliary[str(i + last)]
        f = (head if last else stage.readout)(h)
        found.append((f, stage.step(), total))
        total = total + learner.rule.shrinkage * stage.step() * f.detach()
    return found, total


def test_a_stage_moves_by_the_gradient_of_its_distance_from_the_negative_gradient_at_the_sum_before_it():
    x, y = vectors()
    rule = create_rule("boosted", updates=20, shrinkage=0.5)
    learner = Learner(linear_blocks(), rule, example=x, **PLAIN_SGD)
    for turn in range(3):
        f, _, before = outputs(learner, x)[0][turn]
        before = before.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(before, y, reduction="sum"), before)
        loss = (f + gradient).square().sum(1).mean()
        group = learner.groups[turn]
        wanted = [
            p - 0.1 * g for p, g in zip(group.parameters, torch.autograd.grad(loss, group.parameters), strict=True)
        ]
        learner.step(x, y)
        assert all(torch.allclose(p, w, atol=1e-6) for p, w in zip(group.parameters, wanted, strict=True))
        for _ in range(19):
            learner.step(x, y)
    assert before.abs().max() > 0.01  # the last stage did not start from nothing


def test_newtons_step_has_the_derivatives_of_the_cross_entropy_along_the_output():
    torch.manual_seed(0)
    f, total, y = torch.randn(9, CLASSES).double(), torch.randn(9, CLASSES).double(), torch.arange(9) % CLASSES
    rho = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F.cross_entropy(total + rho * f, y), rho, create_graph=True)
    (second,) = torch.autograd.grad(first, rho)
    slope, curvature = newton_step(f, total, F.one_hot(y, CLASSES) - total.softmax(1))
    assert torch.allclose(slope, -first) and torch.allclose(curvature, second)


def test_the_step_is_the_quotient_of_means_over_the_batches_of_its_turn_and_never_goes_uphill():
    x, y = vectors()
    frozen = {**PLAIN_SGD, "lr": 1e-30}
    learner = Learner(linear_blocks(), create_rule("boosted"), example=x, **frozen)
    half = len(x) // 2
    slopes, curvatures = [], []
    for part in (slice(half), slice(half, None)):
        f = outputs(learner, x[part])[0][0][0].detach()
        slope, curvature = newton_step(f, torch.zeros_like(f), F.one_hot(y[part], CLASSES) - 1 / CLASSES)
        slopes.append(float(slope))
        curvatures.append(float(curvature))
        learner.step(x[part], y[part])
    wanted = (0.9 * slopes[0] + slopes[1]) / (0.9 * curvatures[0] + curvatures[1])
    stage = learner.auxiliary["0"]
    assert float(stage.step()) == pytest.approx(max(wanted, 0), rel=1e-4)
    stage.running_slope.fill_(-1.0)
    assert float(stage.step()) == 0


@pytest.mark.parametrize("shrinkage", [pytest.param(1.0, marks=pytest.mark.slow), 0.3])
def test_the_loss_of_the_sum_falls_from_stage_to_stage(shrinkage):
    """Linear stages on inputs that one linear map does not part perfectly; all samples are one batch."""
    x, y = vectors(samples=48)
    rule = create_rule("boosted", updates=80, shrinkage=shrinkage)
    learner = Learner(linear_blocks(), rule, optimizer="adam", lr=0.02)
    for _ in range(240):
        learner.step(x, y)
    seen = learner.evaluate(x, y).read()
    losses = [math.log(CLASSES), *(seen[f"{name}/loss"] for name in ("0", "1", "head"))]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.02


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_only_the_stage_whose_turn_it_is_moves(kind):
    learner = Learner(net(kind, depth=3), create_rule("boosted", updates=2), example=X, weight_decay=0.1)
    blocks = len(learner.network.blocks)
    for step in range(2 * blocks + 1):
        before = copy.deepcopy({**dict(learner.named_parameters())})
        learner.step(X, Y)
        moved = {name for name, p in learner.named_parameters() if not torch.equal(p, before[name])}
        turn = min(step // 2, blocks - 1)
        own = {id(p) for p in learner.groups[turn].parameters}
        assert moved and moved <= {name for name, p in learner.named_parameters() if id(p) in own}, step


def test_a_turn_is_counted_in_updates():
    learner = Learner(net("mlp"), create_rule("boosted", updates=2), example=X, accumulate=3)
    turns = [[i for i, g in enumerate(learner.groups_at(update)) if g.optimizers] for update in range(5)]
    assert turns == [[0]] * 2 + [[1]] * 2 + [[2]]


def test_the_prediction_is_the_sum_and_a_stage_without_a_turn_adds_nothing():
    x, y = vectors()
    learner = Learner(linear_blocks(), create_rule("boosted", updates=20, shrinkage=0.7), example=x, lr=0.05)
    assert torch.equal(learner(x), torch.zeros(len(x), CLASSES))
    for _ in range(40):
        learner.step(x, y)
    found, total = outputs(learner, x)
    assert [float(step) > 0 for _, step, _ in found] == [True, True, False]
    assert torch.allclose(learner(x), total, atol=1e-6) and total.abs().max() > 0.01
    metrics = learner.evaluate(x, y)
    assert torch.allclose(metrics.loss, F.cross_entropy(learner(x), y))
    assert metrics.accuracy == (learner(x).argmax(1) == y).float().mean()


def test_blocks_in_a_group_are_one_stage():
    rule = create_rule("boosted", updates=1, group=2)
    learner = Learner(net("mlp", depth=5), rule, example=X)
    assert rule.groups(5) == [range(0, 2), range(2, 4), range(4, 6)]
    assert [i for i, stage in learner.auxiliary.items() if stage.readout is not None] == ["1", "3"]
    turns = [[rule.learns_at(update, Site(i, 5, "")) for i in (0, 2, 4)] for update in (0, 1, 2, 9)]
    assert turns == [[True, False, False], [False, True, False], [False, False, True], [False, False, True]]


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"precision": "fp16"}, {"nonfinite": "skip"}], ids=str)
def test_turns_go_on_from_the_state_to_the_same_bits(options):
    model, data, rule = net("mlp", dropout=0.2), batches(5), create_rule("boosted", updates=1)
    straight = trained(model, rule, data, **options)
    for stop in (1, 2, 3):
        resumed = gone_on(model, rule, data, stop, **options)
        assert same_bits(resumed, straight)
        assert resumed.state_dict()["scaler"] == straight.state_dict()["scaler"]


def test_a_skipped_batch_leaves_the_step_as_it_was():
    learner = trained(net("mlp"), create_rule("boosted", updates=2), [(X, Y)], nonfinite="skip")
    before = tensors(learner.auxiliary)
    metrics = learner.step(torch.full_like(X, math.nan), Y)
    assert metrics.skipped == ("block1",)
    assert same_bits(tensors(learner.auxiliary), before)


def test_what_boosting_cannot_do_is_refused():
    for options in ({"updates": 0}, {"shrinkage": 0.0}, {"shrinkage": 1.5}, {"group": 0}):
        with pytest.raises(LayerwiseError, match=re.escape(str(*options.values()))):
            create_rule("boosted", **options)
    language = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    tokens = torch.randint(9, (2, 5))
    with pytest.raises(LayerwiseError, match="one label per sample"):
        Learner(language, "boosted").step(tokens, tokens)
    x, y = problem(8)
    with pytest.raises(LayerwiseError, match="needs a label for every sample, and 2 of 8 have none"):
        Learner(net("mlp"), "boosted").step(x, torch.where(y == 0, -100, y))
