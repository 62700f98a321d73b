"""Closed forms of the rules with auxiliary networks of their own: AugLocal, InfoPro, periodic guidance."""

import pytest
import torch
import torch.nn.functional as F
from nets import CLASSES, PLAIN_SGD, batches, linear_blocks, net, same_bits, trained, vectors
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule

X, Y = batches(1)[0]


# --- AugLocal


def test_the_chosen_blocks_lie_evenly_between_a_block_and_the_end():
    """Of 9 blocks, d = 3: 8/3 i from block 0; depths 3 .. 2 on the way to block 5, where tau = 1/2 halves d - 1."""
    rule = create_rule("auglocal", depth=3)
    assert rule.chosen(0, 9) == [3, 5, 8]
    assert rule.chosen(5, 9) == [6, 8]  # 5 + 3/2 = 6.5, to the even number
    assert create_rule("auglocal", depth=3, taper=1.0).chosen(5, 9) == [8]
    assert create_rule("auglocal", depth=3, taper=0.0).chosen(5, 9) == [6, 7, 8]
    assert rule.groups(9)[-1] == range(6, 10)


@pytest.mark.parametrize("taper", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_there_are_always_later_blocks_enough_and_fewer_towards_the_end(depth, taper):
    rule = create_rule("auglocal", depth=depth, taper=taper)
    for blocks in range(depth + 1, 20):
        counts = []
        for index in range(blocks - depth):
            chosen = rule.chosen(index, blocks)
            assert index < chosen[0] and chosen[-1] == blocks - 1
            assert sorted(set(chosen)) == chosen
            counts.append(len(chosen))
        assert counts[0] == depth
        assert counts == sorted(counts, reverse=True)


def test_the_auxiliary_networks_are_copies_with_weights_of_their_own():
    model = net("resnet", depth=6)
    learner = Learner(model, create_rule("auglocal", depth=2, taper=0.0), example=X)
    assert list(learner.auxiliary) == ["0", "1", "2", "3"]
    first = learner.auxiliary["0"]
    copied = [layer[0] for layer in first.layers if isinstance(layer, nn.Sequential)]
    for module, index in zip(copied, (2, 5), strict=True):  # 0 + 5/2 i, to the even number
        original = getattr(model, f"block{index + 1}")
        assert str(module) == str(original)
        shared = {p.data_ptr() for p in original.parameters()} & {p.data_ptr() for p in module.parameters()}
        assert not shared
        for (name, a), b in zip(module.named_parameters(), original.parameters(), strict=True):
            assert torch.equal(a, b) == ("norm" in name), name  # norms start at one and zero
    assert first.logits(torch.randn(3, 4, 8, 8), per_position=False).shape == (3, CLASSES)


def test_copies_are_drawn_anew_whatever_the_model_has_learned():
    model, other = net("vgg", depth=4), net("vgg", depth=4)
    with torch.no_grad():
        for tensor in [*other.parameters(), *(b for b in other.buffers() if b.is_floating_point())]:
            tensor.add_(1.0)
    a, b = (Learner(m, "auglocal", example=X).auxiliary for m in (model, other))
    assert same_bits(a, b)


def test_auglocal_moves_block_and_copy_by_the_gradient_of_their_own_loss():
    model, (x, y) = linear_blocks(depth=4), vectors()
    learner = Learner(model, create_rule("auglocal", depth=1), example=x, **PLAIN_SGD)
    parts, h, expected = list(model), x, {}
    for index in range(4):
        h_in, h = h.detach(), parts[index](h.detach())
        network = learner.auxiliary[str(index)] if index < 3 else None
        if network is None:
            logits, weights = parts[4](h), [*parts[3].parameters(), *parts[4].parameters()]
        else:
            copied = network.layers[0][0]
            logits = h_in @ parts[index].weight.T @ copied.weight.T @ network.classifier.weight.T
            logits = logits + network.classifier.bias
            weights = [*parts[index].parameters(), copied.weight, *network.classifier.parameters()]
        gradients = torch.autograd.grad(F.cross_entropy(logits, y), weights)
        expected |= {p: p.detach() - 0.1 * g for p, g in zip(weights, gradients, strict=True)}
    learner.step(x, y)
    assert len(expected) == len(list(learner.named_parameters()))
    for p, after in expected.items():
        assert torch.allclose(p, after, atol=1e-6)  # the loss itself is in float32


@pytest.mark.parametrize("kind", ["mlp", "vgg"])
def test_auglocal_as_deep_as_the_network_is_backprop_bit_for_bit(kind):
    model = net(kind, dropout=0.2)
    a, b = (trained(model, rule, batches(3)) for rule in (create_rule("auglocal", depth=3), "backprop"))
    assert same_bits(a, b)


class Traced(nn.Module):
    """Cut by tracing, since it is no Sequential."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Scale(nn.Module):
    """Holds a parameter that it cannot draw."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.factor


def test_what_cannot_be_copied_is_refused():
    x, rule = torch.randn(2, 6), create_rule("auglocal", depth=1)
    with pytest.raises(LayerwiseError, match="block 'b' was traced out of Traced"):
        Learner(Traced(), rule, cuts=["a", "b"], example=x)
    holding = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), Scale()), nn.Linear(6, CLASSES))
    with pytest.raises(LayerwiseError, match="holds a Scale, which has no reset_parameters"):
        Learner(holding, rule, example=x)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten()), nn.Linear(32, 5))
    flat = nn.Sequential(*conv, nn.Linear(5, CLASSES))
    with pytest.raises(LayerwiseError, match=r"output of shape \(2, 6, 6\) into a block that takes \(32,\)"):
        Learner(flat, rule, example=X)


ILLEGAL = [
    ("auglocal", {"depth": 0}),
    ("auglocal", {"taper": 1.5}),
]


@pytest.mark.parametrize(("rule", "option"), ILLEGAL, ids=str)
def test_an_illegal_value_is_refused_before_training(rule, option):
    (value,) = option.values()
    with pytest.raises(LayerwiseError, match=str(value)):
        Learner(net("mlp"), create_rule(rule, **option), example=X)
