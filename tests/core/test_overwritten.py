"""Operations in place change nothing of what a rule reads: the input of a block, or the output of a layer in it."""

import pytest
import torch
from torch import nn

from layerwise import Learner

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 4


class Block(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(12, 12), nn.Linear(12, 12), nn.ReLU(inplace=inplace)

    def forward(self, x):
        x = self.act(x)
        return x + torch.tanh(self.second(self.act(self.first(x))))


class Network(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.layers = nn.ModuleList(Block(inplace) for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


class BeginsWithDropout(nn.Module):
    """Its first operation is in place in training only, on the batch and on the input of every block."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.drop = nn.Dropout(0.3, inplace)
        self.layers = nn.ModuleList(nn.Sequential(nn.Dropout(0.3, inplace), nn.Linear(6, 6)) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.drop(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.drop(h))


@pytest.mark.parametrize("rule", ["lopt", "feedback_alignment", "forward_gradient", "gradient_reconciliation"])
def test_what_is_in_place_in_training_only_gives_the_same_bits_and_leaves_the_batch(rule):
    found = []
    for inplace in (True, False):
        model = BeginsWithDropout(inplace)
        learner = Learner(model, rule, cuts="layers.*")
        x = X.clone()
        read = [learner.step(x, Y).read() for _ in range(2)]
        model.train()
        learner.network(x)
        assert torch.equal(x, X)
        found.append((read, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("rule", ["lopt", "hebbian_global", "hebbian_local", "local_ce"])
def test_in_place_gives_the_same_bits(rule):
    found = []
    for inplace in (True, False):
        model = Network(inplace)
        learner = Learner(model, rule, cuts="layers.*", output=lambda out: out)
        for _ in range(2):
            learner.step(X, Y)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
