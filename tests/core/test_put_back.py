"""What a model counts and notes is what the user's own passes have counted: building a learner leaves no trace."""

from collections import deque

import pytest
import torch
from torch import nn

from layerwise import Learner, cut_at_calls, legal_cuts, partition
from layerwise.core.keeping import LARGE, put_back

X, Y = torch.randn(8, 6), torch.arange(8) % 3


class Counting(nn.Linear):
    """A linear layer that notes its calls in every way that Python has."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.calls, self.sizes, self.seen, self.last, self.recent = 0, [], {}, None, deque(maxlen=2)
        self.register_buffer("mean", torch.zeros(inputs))

    def forward(self, x):
        self.calls += 1
        self.sizes.append(len(x))
        self.seen[self.calls] = tuple(x.shape)
        self.last = tuple(x.shape)
        self.recent.append(self.calls)
        self.mean.lerp_(x.detach().mean(0), 0.5)  # in evaluation too, as the layers of some people do
        return super().forward(x)

    def noted(self):
        return self.calls, list(self.sizes), dict(self.seen), self.last, list(self.recent), self.mean.tolist()


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Counting(6, 6), Counting(6, 6)]), Counting(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def chain():
    return nn.Sequential(Counting(6, 6), nn.ReLU(), Counting(6, 6), nn.ReLU(), Counting(6, 3))


def counting(model):
    return [module for module in model.modules() if isinstance(module, Counting)]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Learner(chain(), "local_ce", example=X).network.model,
        lambda: Learner(chain(), "local_ce", blocks=1, example=X).network.model,
        lambda: Learner(Called(), "local_ce", cuts="layers.*", example=X).network.model,
        lambda: Learner(Called(), "interlocking", cuts="layers.*", example=X).network.model,
        lambda: (legal_cuts(model := chain()), model)[1],
        lambda: (legal_cuts(model := Called()), model)[1],
    ],
)
def test_building_leaves_no_trace(build):
    new = Counting(6, 6).noted()
    assert all(layer.noted()[:-1] == new[:-1] and not any(layer.noted()[-1]) for layer in counting(build()))


@pytest.mark.parametrize("cut", [lambda: partition(chain()), lambda: cut_at_calls(Called(), ["layers.0", "layers.1"])])
def test_the_first_step_is_the_first_call(cut):
    learner = Learner(cut(), "local_ce")
    learner.step(X, Y)
    assert all(layer.calls == 1 and layer.sizes == [8] for layer in counting(learner.network.model))
    first = counting(learner.network.model)[0]
    assert torch.equal(first.mean, torch.zeros(6).lerp_(X.mean(0), 0.5))


def test_offloaded_blocks_notice_nothing_either():
    learner = Learner(chain(), "sid", offload="host", example=X)
    learner.onload()
    assert all(layer.calls == 0 and not layer.mean.any() for layer in counting(learner.network.model))


def test_what_a_pass_registers_or_completes_stays():
    """A part that is made when it is first needed; the buffers of quantised weights are not copied."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.ready = False
            self.register_buffer("weights", torch.zeros(LARGE + 1, dtype=torch.uint8))

        def forward(self, x):
            if not self.ready:
                self.part, self.ready = nn.Linear(x.shape[1], 2), True
            return self.part(x)

    model, lazy = Late(), nn.LazyLinear(4)
    with put_back(nn.ModuleList([model, lazy])):
        lazy(model(X))
        model.weights.add_(1)
    assert isinstance(model.part, nn.Linear) and model.ready and lazy.in_features == 2
    assert model.weights.sum() == LARGE + 1
