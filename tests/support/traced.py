"""A model with three layers; subclasses decide what its forward pass does between two of them."""

import numpy as np
import torch
from torch import nn

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 6, generator=G), torch.arange(8) % 3


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.p, self.dials = 0.5, {"gain": [2.0]}
        self.register_buffer("size", torch.ones(()))
        self.draws = np.random.default_rng(0)

    def forward(self, x):
        return self.c(self.between(self.b(self.a(x))))


def same(parts, model):
    found = []
    for module in (parts, model):
        torch.manual_seed(1)
        found.append(module(X))
    return torch.equal(*found)


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))
