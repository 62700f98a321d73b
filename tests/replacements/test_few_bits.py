"""Binary and sparse weights, and gradients through a choice: against the formulas of their papers."""

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches
from torch import nn

from layerwise import LayerwiseError, Learner, models, replace
from layerwise.replacements import BiMaskLinear, BinaryConv2d, BinaryLinear, OneHot
from layerwise.replacements.sparse import DECAY, largest


def test_binary_layers_use_signs_in_both_directions_and_clip_what_learns():
    torch.manual_seed(0)
    for own, like, x in (
        (BinaryLinear.of(nn.Linear(8, 3)), nn.Linear(8, 3), torch.randn(5, 8)),
        (
            BinaryConv2d.of(nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2)),
            nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2),
            torch.randn(2, 4, 6, 6),
        ),
    ):
        with torch.no_grad():
            own.weight.mul_(5).flatten()[0] = 0  # some beyond 1; the sign of zero is 1
            like.weight.copy_(torch.where(own.weight < 0, -1.0, 1.0))
            like.bias.copy_(own.bias)
        found, wanted = own(x.requires_grad_()), like(x)
        assert torch.equal(found, wanted)
        dy = torch.randn_like(found)
        grads = torch.autograd.grad(found, [x, own.weight, own.bias], dy)
        exact = torch.autograd.grad(wanted, [x, like.weight, like.bias], dy)
        assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True))
        assert own.weight.abs().max() == 1
        with torch.no_grad():
            own.weight.flatten()[0] = 3
        own.eval()(x)
        assert own.weight.flatten()[0] == 3  # evaluation moves nothing


def test_a_sparse_layer_is_sparse_in_both_directions():
    torch.manual_seed(0)
    layer, x = BiMaskLinear.of(nn.Linear(16, 8), n=1, m=4), torch.randn(6, 16, requires_grad=True)
    mask = largest(layer.weight, 1, 4)
    assert torch.equal(mask.view(8, 4, 4).sum(-1), torch.ones(8, 4, dtype=torch.long))
    assert torch.equal(
        layer.weight[mask], layer.weight.view(8, 4, 4).abs().amax(-1).flatten() * layer.weight[mask].sign()
    )
    out, dy = layer(x), torch.randn(6, 8)
    dx, dw, db = torch.autograd.grad(out, [x, layer.weight, layer.bias], dy)
    assert torch.allclose(out, F.linear(x, layer.weight * mask, layer.bias), atol=1e-6)
    unit = torch.zeros(8, 16, requires_grad=True)
    used = torch.autograd.grad(layer(unit), unit, torch.eye(8))[0]  # W b, row by row
    assert not (used != 0)[~mask].any()
    ordered = (used != 0)[layer.order].T.view(16, 2, 4).sum(-1)
    assert ordered.max() <= 1
    assert torch.equal(used[used != 0], layer.weight[used != 0])
    assert torch.allclose(dx, dy @ used, atol=1e-6)
    assert torch.allclose(dw, dy.T @ x + DECAY * ~mask * layer.weight, atol=1e-6)
    assert torch.allclose(db, dy.sum(0), atol=1e-6)


def test_the_order_of_the_rows_saves_weights_that_the_first_order_would_lose():
    torch.manual_seed(0)
    layer = BiMaskLinear(32, 32)
    mask = largest(layer.weight, 2, 4)
    before = layer._backward_mask(mask, layer.order).sum()
    layer(torch.randn(2, 32))
    assert layer._backward_mask(mask, layer.order).sum() > before
    with pytest.raises(LayerwiseError, match="2:4 does not fit a layer of 6 inputs"):
        BiMaskLinear(6, 8)


def exact_gradient(function, logits):
    """Of the expectation over the categories."""
    outcomes = torch.stack([function(one) for one in torch.eye(logits.numel())])
    p = logits.softmax(-1)
    return p * (outcomes - (p * outcomes).sum())


@pytest.mark.parametrize(("gradient", "unbiased"), [("reinmax", True), ("straight", False)])
def test_reinmax_is_exact_in_expectation_for_quadratic_functions_and_straight_through_is_not(gradient, unbiased):
    torch.manual_seed(0)
    matrix, vector, logits = torch.randn(4, 4), torch.randn(4), torch.randn(4)

    def function(d):
        return d @ matrix @ d / 2 + d @ vector

    mean = torch.zeros(4)
    for index, p in enumerate(logits.softmax(-1)):
        given = logits.clone().requires_grad_()
        module = OneHot(gradient).train()
        drawn = torch.multinomial
        torch.multinomial = lambda *_, index=index: torch.tensor([[index]])
        try:
            function(module(given[None])[0]).backward()
        finally:
            torch.multinomial = drawn
        mean += p * given.grad
    error = (mean - exact_gradient(function, logits)).abs().max()
    assert (error < 1e-5) == unbiased


def test_a_choice_is_a_draw_in_training_and_the_largest_in_evaluation():
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(20_000, 3)
    assert torch.allclose(OneHot()(logits).mean(0), torch.tensor([0.7, 0.2, 0.1]), atol=0.02)
    assert torch.equal(OneHot().eval()(logits[:4]), torch.tensor([1.0, 0, 0]).expand(4, 3))
    for wrong in ({"tau": 0.5}, {"gradient": "straight", "tau": 0.0}, {"gradient": "second"}):
        with pytest.raises(LayerwiseError, match=r"choose reinmax|temperature"):
            OneHot(**wrong)


@pytest.mark.parametrize("name", ["binary", "bi_mask"])
def test_networks_of_them_learn_under_local_rules(name):
    torch.manual_seed(0)
    model = replace(models.create("mlp", (1, 8, 8), 10, depth=2, width=64, norm="batch"), name)
    x, y = batches(1)[0]
    learner = Learner(model, "sll", lr=0.01, example=x)
    losses = [float(learner.step(x, y).loss) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
