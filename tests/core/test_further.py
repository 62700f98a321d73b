"""Further terms of a loss are said, wherever a pass leaves them; a block that adds their gradient trains them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerwise import Learner

KEPT = []
X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


class Adds(torch.autograd.Function):
    """Passes h on, and gives a further term of the loss the gradient 1."""

    @staticmethod
    def forward(ctx, h, term):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones(())


class Router(nn.Module):
    """Two experts, and the balance of their router in one of several places."""

    def __init__(self, place):
        super().__init__()
        self.gate, self.experts, self.place = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), place
        self.balance = None

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        h = x + shares[:, :1] * self.experts[0](x) + shares[:, 1:] * self.experts[1](x)
        balance = shares.mean(0).square().sum()
        if self.place == "attribute":
            self.balance = balance
        if self.place == "detached":
            self.balance = balance.detach()
        if self.place == "list":
            KEPT.append(balance)
        if self.place == "only while training" and self.training:
            self.balance = balance
        if self.place == "part of the output":
            self.balance = balance
            h = h * (1 + balance)
        if self.place == "added":
            h = Adds.apply(h, balance)
        return (h, balance) if "output" in self.place and "part" not in self.place else h


class Network(nn.Module):
    def __init__(self, place):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layers = nn.Linear(4, 8), nn.ModuleList(Router(place) for _ in range(3))
        self.last, self.place = nn.Linear(8, 3), place

    def forward(self, x):
        h, terms = self.first(x), 0.0
        for layer in self.layers:
            h = layer(h)
            if isinstance(h, tuple):
                h, term = h
                terms = terms + term
        logits = self.last(h)
        if self.place == "second output":
            return logits, terms
        return {"logits": logits, "terms": terms} if self.place == "entry of the output" else logits


def said(learner, steps=3):
    """Warnings of some steps."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            learner.step(X, Y)
    return [str(w.message) for w in found]


def learner_of(place, rule, **options):
    output = (lambda out: out[0]) if place == "second output" else None
    return Learner(Network(place), rule, cuts="layers.*", output=output, **options)


@pytest.mark.parametrize("rule", ["sll", "local_ce", "backprop"])
@pytest.mark.parametrize("place", ["attribute", "list", "only while training", "second output", "entry of the output"])
def test_a_further_term_is_said_once_wherever_it_lies(place, rule):
    (found,) = said(learner_of(place, rule))
    assert found.startswith("block 'layers.0' leaves a single number (")
    assert "does not train" in found
    KEPT.clear()


@pytest.mark.parametrize("rule", ["sll", "backprop"])
@pytest.mark.parametrize("place", ["added", "detached", "part of the output", "nowhere"])
def test_what_trains_or_has_no_history_is_silent(place, rule):
    assert said(learner_of(place, rule)) == []


def test_it_is_said_of_a_chain_in_parts_and_while_batches_accumulate_too():
    chain = nn.Sequential(nn.Linear(4, 8), Router("attribute"), Router("attribute"), nn.Linear(8, 3))
    assert len(said(Learner(chain, "local_ce", accumulate=2, micro=2), steps=4)) == 1


def test_a_model_that_returns_more_keeps_no_graph_after_the_step():
    learner = learner_of("second output", "backprop")
    assert len(said(learner)) == 1
    assert learner.network.beside == ()


def test_looking_changes_no_bit():
    def trained(looked):
        learner = learner_of("nowhere", "local_ce", example=X)
        learner.engine.told = not looked
        learner.step(X, Y)
        return torch.cat([p.detach().flatten() for p in learner.network.parameters()])

    assert torch.equal(trained(True), trained(False))


def test_a_block_that_adds_a_terms_gradient_trains_it():
    """Under backprop the gradient of the gate is that of the loss plus all balances; here by the plain loop."""
    plain = Network("attribute")
    plain_sgd = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.0, "nesterov": False}}
    learner = learner_of("added", "backprop", lr=1.0, weight_decay=0.0, example=X, **plain_sgd)
    before = [p.detach().clone() for p in plain.parameters()]
    loss = F.cross_entropy(plain(X), Y) + sum(layer.balance for layer in plain.layers)
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    learner.step(X, Y)
    for own, start, gradient in zip(learner.network.model.parameters(), before, gradients, strict=True):
        assert torch.allclose(start - own.detach(), gradient, atol=1e-6)
