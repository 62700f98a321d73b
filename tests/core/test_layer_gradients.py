"""Gradients of a layer in closed form are autograd's."""

import pytest
import torch
from torch import nn

from layerwise import LayerwiseError, Learner, Partition
from layerwise.core.layers import has_gradients, layer_gradients, seeing_layers

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


def test_the_layers_of_a_compiled_block_are_not_looked_at():
    network = Partition(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ["1"])
    learner = Learner(network, "local_ce", compile="eager", example=torch.ones(4, 2))
    with pytest.raises(LayerwiseError, match="leave compile out"), seeing_layers(network.blocks[0], lambda *_: None):
        pass
    assert learner.network is network
