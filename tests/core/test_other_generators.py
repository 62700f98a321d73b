"""A network or rule that draws from Python's `random` or NumPy is a function of the seed too."""

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from layerwise import Learner
from layerwise.core.observed import value_of
from layerwise.core.randomness import OtherGenerators, preserved_generators, seed_generators
from layerwise.rules.local_ce import LocalCE

CPU = torch.device("cpu")
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Noisy(nn.Linear):
    """Drops a random feature, chosen as its author likes."""

    def __init__(self, draw):
        super().__init__(6, 6)
        self.draw = draw

    def forward(self, x):
        h = super().forward(x).relu()
        if not self.training:
            return h
        keep = torch.ones(6)
        keep[self.draw()] = 0
        return h * keep


def python():
    return random.randrange(6)


def numpy():
    return int(np.random.randint(6))


class Network(nn.Module):
    """Three blocks that draw."""

    def __init__(self, draw):
        super().__init__()
        self.layers = nn.ModuleList(Noisy(draw) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def trained(draw, rule="local_ce", there=0, seed=0, steps=4, **options):
    """Weights after some steps, while the process's own generators are at `there`."""
    torch.manual_seed(0)
    model = Network(draw)
    random.seed(there)
    np.random.seed(there)
    learner = Learner(model, rule, cuts="layers.*", seed=seed, **options)
    for _ in range(steps):
        learner.step(X, Y)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("draw", [python, numpy])
def test_draws_of_python_and_numpy_are_a_function_of_the_seed(draw):
    assert torch.equal(trained(draw), trained(draw, there=1))
    assert not torch.equal(trained(draw), trained(draw, seed=1))


def test_a_generator_of_the_system_that_a_network_names_is_compared_by_identity():
    """It has no state; libraries such as peft hold one."""
    system = random.SystemRandom()
    assert value_of(system) == value_of(system) != value_of(random.SystemRandom())
    assert value_of({"draws": [system]}) == value_of({"draws": [system]})


def test_a_step_leaves_their_generators_as_they_were():
    random.seed(5)
    np.random.seed(5)
    np.random.randn()  # half a pair is kept for the next call
    expected = random.random(), np.random.randn()
    random.seed(5)
    np.random.seed(5)
    np.random.randn()
    learner = Learner(Network(python), "local_ce", cuts="layers.*")
    learner.step(X, Y)
    learner.step(X, Y)
    learner(X)
    assert (random.random(), np.random.randn()) == expected


def test_a_resumed_learner_draws_what_the_other_would_have():
    torch.manual_seed(0)
    model, again = Network(python), Network(python)
    learner = Learner(model, "local_ce", cuts="layers.*")
    learner.step(X, Y)
    other = Learner(again, "local_ce", cuts="layers.*", example=X)
    other.load_state_dict(learner.state_dict())
    random.seed(9)
    for one in (learner, other):
        one.step(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("draw", [python, numpy])
def test_a_checkpointed_block_draws_the_same_again(draw):
    plain, checkpointed = trained(draw, "backprop"), trained(draw, "backprop_checkpoint")
    assert torch.equal(plain, checkpointed)


@dataclass(frozen=True)
class Scaled(LocalCE):
    """A rule that draws."""

    name: ClassVar[str] = "scaled"

    def signal(self, ctx):
        found = super().signal(ctx)
        factor = random.random()
        return found if found.loss is None else replace(found, loss=found.loss * factor)


def test_a_rule_that_draws_is_a_function_of_the_seed():
    def quiet():
        return 0

    assert torch.equal(trained(quiet, Scaled()), trained(quiet, Scaled(), there=1))


def test_they_are_borrowed_only_if_the_first_context_drew(monkeypatch):
    def saved(draws):
        others, states = OtherGenerators(), []
        monkeypatch.setattr("layerwise.core.randomness._set", states.append)
        for _ in range(3):
            with preserved_generators(CPU, others):
                seed_generators(1, CPU)
                with preserved_generators(CPU):  # what a rule runs aside counts
                    draws()
        return others.drawn, len(states)

    assert saved(lambda: None) == (False, 2)  # both contexts of the first time
    drawn, count = saved(random.random)
    assert drawn
    assert count == 6
