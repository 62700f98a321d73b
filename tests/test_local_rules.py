"""Closed forms of the rules with local losses: Mono-Forward."""

import pytest
import torch
import torch.nn.functional as F
from nets import CLASSES, batches, net, same_bits, trained
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule

X, Y = batches(1)[0]
PLAIN_SGD = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.0}


def linear_blocks(inputs=6, width=5, depth=3):
    """Linear blocks, in float64: what a step does to them can be written down."""
    torch.manual_seed(0)
    sizes = [inputs] + [width] * (depth - 1)
    layers = [nn.Linear(size, width, bias=False) for size in sizes]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()


def vectors(samples=16, inputs=6):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(samples, inputs, generator=draw, dtype=torch.float64), torch.arange(samples) % CLASSES


# --- Mono-Forward


def test_mono_forward_moves_block_and_projection_by_the_closed_form():
    """dM = E (p - e_y) a^T and dW = E M^T (p - e_y) x^T, for linear blocks; no bias."""
    model, (x, y) = linear_blocks(), vectors()
    learner = Learner(model, "mono_forward", example=x, **PLAIN_SGD)
    learner.auxiliary.double()
    weights = [model[i].weight.detach().clone() for i in range(2)]
    projections = [learner.auxiliary[str(i)].weight.detach().clone() for i in range(2)]
    learner.step(x, y)
    a = x
    for i, (weight, projection) in enumerate(zip(weights, projections, strict=True)):
        a_in, a = a, a @ weight.T
        error = ((a @ projection.T).softmax(-1) - F.one_hot(y, CLASSES)) / len(y)
        assert learner.auxiliary[str(i)].bias is None
        assert torch.allclose(learner.auxiliary[str(i)].weight, projection - 0.1 * error.T @ a)
        assert torch.allclose(model[i].weight, weight - 0.1 * (error @ projection).T @ a_in)


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_the_summed_goodness_is_the_sum_over_blocks(kind):
    rule = create_rule("mono_forward", predictor="sum", pool="mean")
    learner = trained(net(kind), rule, [(X, Y)])
    model, h, total = learner.network.model.eval(), X, 0.0
    with torch.no_grad():
        for i, name in enumerate(model.block_names[:-1]):
            h = model.get_submodule(name)(h)
            mean = h.flatten(2).mean(2) if kind == "vgg" else h.mean(1) if kind == "vit" else h
            total = total + mean @ learner.auxiliary[str(i)].weight.T
        last = model(X)
    assert torch.allclose(learner(X), total + last, atol=1e-5)
    assert not torch.allclose(learner(X), last)


def test_the_predictor_does_not_change_the_training():
    a, b = (trained(net("mlp"), create_rule("mono_forward", predictor=p), batches(3)) for p in ("last", "sum"))
    assert same_bits(a, b)
    assert torch.equal(a(X), a.network.model(X))


def test_a_sum_over_positions_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    x, y = torch.randint(5, (2, 3)), torch.randint(CLASSES, (2, 3))
    with pytest.raises(LayerwiseError, match='pool="none"'):
        Learner(model, create_rule("mono_forward", predictor="sum")).step(x, y)
    learner = Learner(model, create_rule("mono_forward", predictor="sum", pool="none"))
    learner.step(x, y)
    assert learner(x).shape == (2, 3, CLASSES)


def test_a_large_map_is_averaged_onto_a_grid_of_at_most_4096_numbers():
    learner = Learner(net("vgg", width=256), "mono_forward", example=X)  # 256 x 4 x 4, then 512 x 2 x 2
    assert [learner.auxiliary[i].in_features for i in "01"] == [4096, 2048]
    learner = Learner(net("vgg", width=257), "mono_forward", example=X)
    assert learner.auxiliary["0"].in_features == 257 * 9


ILLEGAL = [("mono_forward", {"predictor": "first"}), ("mono_forward", {"group": 0})]


@pytest.mark.parametrize(("rule", "option"), ILLEGAL, ids=str)
def test_an_illegal_value_is_refused_before_training(rule, option):
    (value,) = option.values()
    with pytest.raises(LayerwiseError, match=str(value)):
        Learner(net("mlp"), create_rule(rule, **option), example=X)
