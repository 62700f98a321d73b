"""The gradients of a layer in closed form equal those of autograd."""

import pytest
import torch
from torch import nn

from layerwise import LayerwiseError, Learner, Partition
from layerwise.core.layers import has_gradients, layer_gradients, layers_of, seeing_layers

LAYERS = [
    (nn.Linear(4, 3), (5, 4)),
    (nn.Linear(4, 3, bias=False), (5, 2, 4)),
    (nn.Conv1d(2, 4, 3, stride=2, padding=1), (5, 2, 9)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), (5, 4, 7, 7)),
    (nn.Conv2d(2, 3, (3, 2), padding=(1, 0), padding_mode="circular"), (5, 2, 6, 6)),
    (nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
    (nn.LayerNorm((3, 4)), (5, 3, 4)),
    (nn.RMSNorm(4), (5, 3, 4)),
    (nn.GroupNorm(2, 4), (5, 4, 3, 3)),
    (nn.BatchNorm2d(4), (5, 4, 3, 3)),
    (nn.BatchNorm1d(4).eval(), (5, 4)),
    (nn.Embedding(6, 3, padding_idx=1), None),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda part: type(part).__name__)
def test_the_gradients_of_a_layer_are_autograds(layer, shape):
    layer.double()
    x = torch.randint(6, (5, 2)) if shape is None else torch.randn(shape, dtype=torch.float64)
    out = layer(x)
    signal = torch.randn_like(out)
    expected = dict(zip(layer.parameters(), torch.autograd.grad(out, [*layer.parameters()], signal), strict=True))
    with torch.no_grad():
        found = layer_gradients(layer, x, signal)
    assert has_gradients(layer) and found.keys() == expected.keys()
    assert all(torch.allclose(found[p], expected[p]) for p in expected)


@pytest.mark.parametrize("rule", ["forward_gradient", "likelihood_ratio"])
def test_the_head_of_a_model_that_is_cut_at_its_calls_has_its_own_layers_alone(rule):
    """To run the head again runs what lies before the first cut, which is the first block's."""

    class Stemmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    x, y = torch.randn(6, 4), torch.arange(6) % 3
    model = Stemmed()
    learner = Learner(model, rule, cuts="layers.*", example=x)
    assert [layers_of(block) for block in learner.network.sites] == [
        [model.stem, model.layers[0]],
        [model.layers[1]],
        [model.head],
    ]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learner.step(x, y)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_layers_of_a_compiled_block_are_not_looked_at():
    network = Partition(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ["1"])
    learner = Learner(network, "local_ce", compile="eager", example=torch.ones(4, 2))
    with pytest.raises(LayerwiseError, match="leave compile out"), seeing_layers(network.blocks[0], lambda *_: None):
        pass
    assert learner.network is network
