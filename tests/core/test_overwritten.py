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
