"""Losses have the precision of the model: what float32 would round away reaches the update of a model in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, PLAIN_SGD, by_family, kinds, made, net, problem
from torch import nn

from layerwise import LayerwiseError, Learner, MultiLabel, Regression, rule_names
from layerwise.core.chunked import LinearOutputs, objective

X, Y = problem(16)
LOSSES = ("loss", "own_loss", "reconstruction", "divergence")


@pytest.mark.parametrize("rule", by_family(rule_names()))
def test_every_loss_of_a_model_in_float64_is_float64(rule):
    kind = kinds(rule)[0]
    x, y = problem(64) if kind in ("gcn", "gat") else (X, Y)
    learner = Learner(net(kind, 3).double(), made(rule))
    for metrics in (learner.step(x.double(), y), learner.evaluate(x.double(), y)):
        found = {value.dtype for block in metrics.blocks.values() for name, value in block.items() if name in LOSSES}
        assert found == {torch.float64}
    assert learner(x.double()).dtype == torch.float64


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_targets_in_float64_keep_their_digits(loss):
    """Targets one thousandth apart, about 1e8, where float32 knows steps of 8."""
    torch.manual_seed(0)
    x, model = torch.randn(8, 3, dtype=torch.float64), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    model[1].bias.data += 1e8
    y = model(x).detach()[:, 0] + 1e-3 * torch.arange(1, 9)
    wanted = {"mse": lambda d: d.square(), "l1": lambda d: d.abs(), "huber": lambda d: d.square() / 2}[loss]
    learner = Learner(model, "backprop", task=Regression(loss), **PLAIN_SGD)
    metrics = learner.step(x, y)
    assert torch.allclose(metrics.loss, wanted(1e-3 * torch.arange(1, 9).double()).mean(), rtol=1e-4)


def test_a_model_in_float32_gets_targets_that_were_standardised_in_float64():
    y = 1e8 + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    task = Regression(mean=1e8, std=2.0).with_outputs(1)
    t = task.standardised(y, torch.zeros(4, 1))
    assert (t.dtype, t[:, 0].tolist()) == (torch.float32, [0.5, 1.0, 1.5, 2.0])


def test_several_labels_and_soft_labels_keep_their_digits():
    torch.manual_seed(0)
    z, y = torch.randn(8, CLASSES, dtype=torch.float64), torch.rand(8, CLASSES, dtype=torch.float64)
    found = MultiLabel().with_outputs(CLASSES).loss(z, y)
    assert torch.equal(found, F.binary_cross_entropy_with_logits(z, y))
    learner = Learner(net("mlp", 2).double(), "backprop")
    soft = y[:, :].softmax(-1).repeat(2, 1)
    logits = learner.network.model(X.double())
    assert torch.equal(learner.step(X.double(), soft).loss, F.cross_entropy(logits, soft))


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5])])
def test_a_loss_in_chunks_is_that_of_all_in_float64(weights):
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((7, 4), (3, 4), (3,)))
    y = torch.tensor([0, 1, 2, 0, -100, 2, 1])
    loss, *_ = objective(LinearOutputs(h, w, b), y, weights, 0.1, chunk=2)
    wide = None if weights is None else weights.double()
    whole = F.cross_entropy(F.linear(h, w, b), y, wide, label_smoothing=0.1)
    assert torch.allclose(loss, whole, rtol=1e-14, atol=0)
    for one, other in zip(*(torch.autograd.grad(value, (h, w, b)) for value in (loss, whole)), strict=True):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rule", ["noprop_dt", "noprop_ct", "noprop_fm"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_noprop_trains_prototypes_of_its_models_own_type_and_refuses_nan(rule, kind):
    def learner():
        return Learner(net(kinds(rule)[0], 3, labels="prototype").to(kind), rule, nonfinite="skip")

    assert learner().step(X.to(kind), Y).loss.isfinite()
    x = X.to(kind).clone()
    x[3, 0] = torch.nan
    with pytest.raises(LayerwiseError, match="one of class 3 holds NaN or infinity"):
        learner().step(x, Y)


@pytest.mark.parametrize("rule", by_family(rule_names()))
def test_a_model_in_bfloat16_is_trained_by_every_rule(rule):
    kind = kinds(rule)[0]
    x, y = problem(64) if kind in ("gcn", "gat") else (X, Y)
    learner = Learner(net(kind, 3).to(torch.bfloat16), made(rule))
    assert learner.step(x.to(torch.bfloat16), y).loss.isfinite()
    assert {p.dtype for p in learner.network.parameters()} == {torch.bfloat16}


def test_a_network_whose_last_group_is_frozen_is_still_run():
    model = net("mlp", 3)
    model.head.requires_grad_(False)
    assert Learner(model, "gradient_reconciliation").step(X, Y).loss.isfinite()
