"""The reversible model: gradients of plain autograd, activations that do not grow, and what ends a reversible row."""

import pytest
import torch
import torch.nn.functional as F
from support.nets import net, problem

from layerwise import LayerwiseError, Learner
from layerwise.models.reversible import ReversibleBlock

X, Y = problem(16)


def gradients(model, loss=lambda model: F.cross_entropy(model(X), Y)):
    model.zero_grad()
    loss(model).backward()
    return [p.grad.clone() for p in model.parameters()]


def plain(monkeypatch):
    monkeypatch.setattr(ReversibleBlock, "forward", ReversibleBlock.plain)


def far(found, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def test_gradients_are_those_of_plain_autograd(monkeypatch):
    model = net("reversible", 12, width=16)
    with torch.no_grad():  # large enough that neither branch is negligible
        for p in model.parameters():
            p.mul_(3)
    found = gradients(model)
    plain(monkeypatch)
    assert far(found, gradients(model)) < 1e-5


@pytest.mark.slow
def test_a_learner_steps_as_with_plain_autograd(monkeypatch):
    def learned(rule):
        learner = Learner(net("reversible", 4), rule, optimizer=torch.optim.SGD, lr=0.1)
        for _ in range(3):
            learner.step(X, Y)
        return [p.detach().clone() for _, p in learner.named_parameters()]

    found = {rule: learned(rule) for rule in ("backprop", "backprop_checkpoint", "local_ce", "deep_supervision")}
    plain(monkeypatch)
    for rule, parameters in found.items():
        assert far(parameters, learned(rule)) < 1e-5, rule


@pytest.mark.parametrize("rule", ["backprop", pytest.param("backprop_fused", marks=pytest.mark.slow)])
def test_activations_do_not_grow_with_depth(rule):
    def use(depth):
        learner = Learner(net("reversible", depth), rule, example=X)
        learner.step(X, Y)  # in a first run blocks get copies of their inputs, which begin rows
        learner.step(X, Y)
        return learner.measured_step(X, Y)[1]

    shallow, deep = use(6), use(24)
    assert deep.activations <= 1.02 * shallow.activations
    assert (deep.gradients > 2 * shallow.gradients) == (rule == "backprop")


def test_two_readers_of_one_output_have_rows_of_their_own(monkeypatch):
    model = net("reversible", 4)

    def loss(model):
        h = model.block2(model.block1(X))
        one, two = model.block3(h), model.block4(h)
        return (model.head(one) + 2 * model.head(two) + model.head(h)).square().sum()

    found = gradients(model, loss)
    plain(monkeypatch)
    assert far(found, gradients(model, loss)) < 1e-5


def test_precision_is_that_of_the_forward_pass(monkeypatch):
    model = net("reversible", 3)

    def loss(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(X)
        return F.cross_entropy(out.float(), Y)

    found = gradients(model, loss)
    plain(monkeypatch)
    assert far(found, gradients(model, loss)) < 1e-3


def test_a_row_that_is_broken_is_refused():
    model = net("reversible", 3)
    out = model(X).sum()
    out.backward(retain_graph=True)
    with pytest.raises(LayerwiseError, match="the output of a reversible block is gone"):
        out.backward()
    h = model.block2(model.block1(X))
    out = h.sum()
    h.data.add_(1)
    h.mul_(1.0)
    with pytest.raises(LayerwiseError, match="changed by an in-place operation"):
        out.backward()
