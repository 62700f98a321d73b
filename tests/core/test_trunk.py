"""A trunk: the first group learns last, from the sum of the gradients that later groups send back."""

import copy

import pytest
import torch
from support.nets import CLASSES, batches, cascade, problem, same_bits, trained, wide
from torch import nn

from layerwise import LayerwiseError, Learner, Rule, Signal
from layerwise.core.pieces import HasTrunk

SGD = {"optimizer": torch.optim.SGD, "weight_decay": 0.0}
X, Y = batches(1)[0]


def moved(learner, model):
    pairs = zip(learner.network.parameters(), model.parameters(), strict=True)
    return torch.cat([(a - b).flatten().detach() for a, b in pairs])


def test_accumulated_batches_are_one_large_batch():
    model = cascade()
    x, y = problem(32)
    parts = list(zip(wide(x).split(8), y.split(8), strict=True))
    a = moved(trained(model, "sid_cascade", parts, lr=0.5, accumulate=4, **SGD), model)
    b = moved(trained(model, "sid_cascade", [(wide(x), y)], lr=0.5, **SGD), model)
    assert b.norm() > 1e-3
    assert torch.allclose(a, b, atol=1e-7)  # the loss is computed in float64, labels in float32


def test_batches_of_unequal_size_weigh_by_their_labels_in_the_trunk_too():
    model = cascade()
    x, y = problem(32)
    parts = list(zip(wide(x).split([4, 20, 8]), y.split([4, 20, 8]), strict=True))
    a = moved(trained(model, "sid_cascade", parts, lr=0.5, accumulate=3, **SGD), model)
    b = moved(trained(model, "sid_cascade", [(wide(x), y)], lr=0.5, **SGD), model)
    assert b.norm() > 1e-3
    assert torch.allclose(a, b, atol=1e-7)


def extractor_move(model, **options):
    learner = trained(model, "sid_cascade", [(wide(X), Y)], lr=1.0, **SGD, **options)
    start = dict(model.named_parameters())
    named = learner.network.named_parameters()
    return torch.cat([(p - start[n]).flatten().detach() for n, p in named if n.startswith("extractor")])


def test_the_trunks_gradient_is_clipped_as_one():
    model = cascade()
    free = extractor_move(model)
    clip = float(free.norm()) / 3
    assert torch.allclose(extractor_move(model, clip=clip), free / 3, rtol=1e-4)


def test_the_schedule_and_the_multipliers_reach_the_trunk():
    model = cascade()
    free = extractor_move(model)
    assert torch.allclose(extractor_move(model, schedule=lambda update: 0.25), 0.25 * free)
    names = {"extractor1": 2.0, "extractor2": 2.0}
    assert torch.allclose(extractor_move(model, lr_multipliers=names), 2.0 * free)


def test_the_gradient_scaler_does_not_change_what_the_trunk_learns():
    found = []
    for scale in (1.0, 512.0):
        learner = Learner(cascade().float(), "sid_cascade", precision="fp16", lr=0.1, example=X, **SGD)
        for group in learner.groups:
            group.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        learner.step(X, Y)
        found.append(moved(learner, cascade().float()))
    assert found[1].norm() > 0
    assert torch.allclose(found[0], found[1], atol=0.02 * float(found[1].abs().max()))


class Trunk(HasTrunk, Rule):
    """Three linear blocks; the first is the trunk, and every block sends its gradient back as it is."""

    name, locality, boundary, flat_memory, source = "trunk", "interlocking", "activation", True, "this test"

    def signal(self, at):
        poison = float("nan") if at.site.index == 1 and (at.y == CLASSES - 1).all() else 1.0
        return Signal(loss=None if at.site.index == 0 else (at.h.square().mean() * poison))


def test_a_non_finite_gradient_from_a_module_skips_the_trunk_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    x, bad = torch.randn(8, 6), torch.full((8,), CLASSES - 1)
    learner = Learner(copy.deepcopy(model), Trunk(), nonfinite="skip")
    metrics = learner.step(x, bad)
    assert set(metrics.skipped) == {group.name for group in learner.groups[:2]}
    assert same_bits(learner.network.model[:3], model[:3])  # running statistics as well
    assert not same_bits(learner.network.model[3], model[3])
    with pytest.raises(LayerwiseError, match="block '2'"):
        Learner(copy.deepcopy(model), Trunk()).step(x, bad)


def test_a_trunk_gets_the_sum_of_what_is_sent_back():
    """Linear blocks h1 = W1 x, h2 = W2 h1, h3 = W3 h2; both later gradients land on h1, of h2's as it stands."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, CLASSES), nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    y = torch.zeros(8, dtype=torch.int64)
    learner = trained(model, Trunk(), [(x, y)], lr=0.1, **SGD)
    h1 = model[0](x)
    first = h1.detach().requires_grad_()
    h2 = model[1](first)
    h2.square().mean().backward()
    second = h2.detach().requires_grad_()
    model[2](second).square().mean().backward()
    h1.backward(first.grad + second.grad)
    for a, b in zip(learner.network.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b - 0.1 * b.grad, atol=1e-12)
