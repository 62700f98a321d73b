"""Weights that are waves, integers of several widths, or compressed rows: against the formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches
from torch import nn

from layerwise import LayerwiseError, Learner, models, replace
from layerwise.replacements import (
    BiPerConv2d,
    BiPerLinear,
    SharedBitsConv2d,
    SharedBitsLinear,
    SparseLinear,
    set_bits,
)

LINEAR = (lambda: nn.Linear(8, 3), (5, 2, 8), F.linear)
CONV = (
    lambda: nn.Conv2d(4, 6, 3, padding=1),
    (2, 4, 6, 6),
    lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1),
)


@pytest.mark.parametrize(("kind", "layer"), [(BiPerLinear, LINEAR), (BiPerConv2d, CONV)])
@pytest.mark.parametrize("stage", ["sign", "sine"])
def test_a_wave_is_used_and_the_gradient_is_that_of_the_sine(kind, layer, stage):
    torch.manual_seed(0)
    make, shape, function = layer
    own, x, omega = kind.of(make(), omega=12.0, stage=stage), torch.randn(shape).requires_grad_(), 12.0
    w, column = own.weight.detach(), (-1, *[1] * (own.weight.dim() - 1))
    assert torch.allclose(own.alpha, w.abs().flatten(1).mean(1))
    with torch.no_grad():
        own.alpha.mul_(torch.rand_like(own.alpha))
    alpha = own.alpha.detach().view(column)
    wave = torch.sin(omega * w)
    used = ((2.0 * (wave >= 0) - 1 if stage == "sign" else wave) * alpha).requires_grad_()
    out, wanted = own(x), function(x, used, own.bias)
    assert torch.allclose(out, wanted, atol=1e-6)
    dy = torch.randn_like(out)
    dx, dw, dalpha, db = torch.autograd.grad(out, [x, own.weight, own.alpha, own.bias], dy)
    ex, eused, eb = torch.autograd.grad(wanted, [x, used, own.bias], dy)
    torch.testing.assert_close(dx, ex)
    torch.testing.assert_close(db, eb)
    torch.testing.assert_close(dw, eused * alpha * omega * torch.cos(omega * w))
    torch.testing.assert_close(dalpha, (eused * used / alpha).flatten(1).sum(1))


def integers(w, high):
    """Of a row by the textbook: the largest magnitude is the largest integer."""
    rows = [torch.round(row / (row.abs().max() / (2 ** (high - 1) - 1))) for row in w]
    return torch.stack(rows), torch.stack([row.abs().max() / (2 ** (high - 1) - 1) for row in w])


@pytest.mark.parametrize(("kind", "layer"), [(SharedBitsLinear, LINEAR), (SharedBitsConv2d, CONV)])
def test_all_widths_come_from_the_integers_of_the_most_bits(kind, layer):
    torch.manual_seed(0)
    make, shape, function = layer
    own, x = kind.of(make(), widths=(8, 5, 2)).eval(), torch.randn(shape).requires_grad_()
    high, scale = integers(own.weight.detach(), 8)
    stored, own_scale = own.integers()
    assert stored.dtype == torch.int8
    assert torch.equal(stored.float(), high)
    torch.testing.assert_close(own_scale.flatten(), scale)
    for bits in (8, 5, 2):
        set_bits(own, bits)
        low = torch.round(stored.double() / 2 ** (8 - bits)).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        used = (low.float() * own_scale * 2 ** (8 - bits)).requires_grad_()
        out, wanted = own(x), function(x, used, own.bias)
        torch.testing.assert_close(out, wanted)
        dy = torch.randn_like(out)
        found = torch.autograd.grad(out, [x, own.weight, own.bias], dy)
        for one, other in zip(found, torch.autograd.grad(wanted, [x, used, own.bias], dy), strict=True):
            torch.testing.assert_close(one, other)


def test_training_draws_widths_and_a_width_that_was_not_trained_is_refused():
    layer, x = SharedBitsLinear(16, 4, widths=(8, 2)), torch.randn(3, 16)
    torch.manual_seed(0)
    seen = {len(layer.used().unique()) <= 16 for _ in range(20)}  # 4 rows of 4 values, or many
    assert seen == {True, False}
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    for model, bits, match in ((layer, 4, "no weights of 4 bits; choose one of"), (nn.Linear(2, 2), 8, "no layer")):
        with pytest.raises(LayerwiseError, match=match):
            set_bits(model, bits)
    assert layer.bits == 8
    with pytest.raises(LayerwiseError, match="from 2 to 16"):
        SharedBitsLinear(4, 4, widths=(8, 1))


def test_a_sparse_layer_is_the_dense_one_with_zeros():
    torch.manual_seed(0)
    dense, x = nn.Linear(40, 30), torch.randn(4, 6, 40).requires_grad_()
    threshold = dense.weight.detach().abs().flatten().sort().values[-120]
    with torch.no_grad():
        twin = copy.deepcopy(dense)
        twin.weight *= twin.weight.abs() >= threshold  # a tenth of 1200
        twin.weight[3] = 0  # a row of zeros
        dense.weight[3] = 0
    kept = int((twin.weight != 0).sum())
    for own in (SparseLinear.of(dense, sparsity=1 - kept / 1200), SparseLinear.of(twin, sparsity=0.5)):
        assert own.weight.shape == (kept, 1)
        out, wanted, dy = own(x), twin(x), torch.randn(4, 6, 30)
        torch.testing.assert_close(out, wanted)
        dx, dw, db = torch.autograd.grad(out, [x, own.weight, own.bias], dy)
        ex, ew, eb = torch.autograd.grad(wanted, [x, twin.weight, twin.bias], dy)
        torch.testing.assert_close(dx, ex)
        torch.testing.assert_close(dw.flatten(), ew[twin.weight != 0])
        torch.testing.assert_close(db, eb)
    for sparsity, match in ((1.0, "at least 0, below 1"), (0.9999, "no weight of a layer of 40 inputs")):
        with pytest.raises(LayerwiseError, match=match):
            SparseLinear.of(dense, sparsity)


def test_a_sparse_network_has_a_tenth_of_everything_but_activations():
    """Weights in float32 with 4 bytes for the column and the rows; two moments in AdamW, and a counter per tensor."""
    torch.manual_seed(0)
    model = replace(nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 4)), "sparse")
    learner = Learner(model, "backprop", weight_decay=0.1, lr=0.01)
    x, y = torch.randn(8, 100), torch.arange(8) % 4
    learner.step(x, y)
    use = learner.measured_step(x, y)[1]
    rest = 50 + 4 * 50 + 4
    assert use.parameters == 4 * (2 * 500 + 51 + rest)
    assert use.optimizer == 8 * (500 + rest) + 4 * 4
    decayed = [g for g in learner.optimizer.param_groups if g["weight_decay"]]
    assert sorted(p.numel() for g in decayed for p in g["params"]) == [200, 500]


@pytest.mark.parametrize("name", ["biper", "shared_bits", "sparse", "low_precision"])
def test_networks_of_them_learn_under_local_rules_and_continue_from_their_state(name):
    torch.manual_seed(0)
    model = replace(models.create("mlp", (1, 8, 8), 10, depth=2, width=64, norm="batch"), name)
    fresh, (x, y) = copy.deepcopy(model), batches(1)[0]
    learner = Learner(model, "sll", lr=0.01, example=x)
    losses = [float(learner.step(x, y).loss) for _ in range(25)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    other = Learner(fresh, "sll", lr=0.01, example=x)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert other.step(x, y).read() == learner.step(x, y).read()


@pytest.mark.parametrize(
    ("options", "match"),
    [({"omega": 0.0}, "above 0"), ({"stage": "sinus"}, "choose sine")],
)
def test_wrong_waves_are_refused(options, match):
    with pytest.raises(LayerwiseError, match=match):
        BiPerLinear(4, 2, **options)
