"""Readouts of patches, against a loop over the patches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches, gone_on, net, problem, same_bits, trained

from layerwise import LayerwiseError, Learner, rules
from layerwise.rules.patches import patches_of

X, Y = problem(32)


def quarters(h):
    half = h.shape[-1] // 2
    return [h[..., :half, :half], h[..., :half, half:], h[..., half:, :half], h[..., half:, half:]]


def test_patches_are_equal_and_cover_the_map():
    h = torch.randn(3, 2, 8, 8)
    assert torch.equal(patches_of(h, 2), torch.cat(quarters(h)))
    odd = torch.arange(49.0).view(1, 1, 7, 7)
    found = patches_of(odd, 2)
    assert found.shape == (4, 1, 4, 4) and set(found.flatten().tolist()) == set(odd.flatten().tolist())
    assert patches_of(torch.randn(3, 2, 4, 4, 4), 2).shape == (24, 2, 2, 2, 2)


@pytest.mark.parametrize("rule", ["local_ce", "dgl", "sll"])
def test_the_loss_is_the_mean_over_the_patches_and_the_prediction_that_of_their_mean(rule):
    options = {"dgl": {"network": "cnn"}, "sll": {"surrogate": "none"}}.get(rule, {})
    learner = Learner(net("vgg", 3), rules.create(rule, patches=2, **options), example=X)
    head, site = learner.auxiliary["0"], learner.groups[0].units[0].site
    learner.network.eval()
    learner.auxiliary.eval()
    with torch.no_grad():
        h = learner.network.blocks[0](X)
        pooled = (lambda p: p) if rule == "dgl" else lambda p: p.mean((2, 3))
        each = [head(pooled(p)) for p in quarters(h)]
        measured = learner.evaluate(X, Y).blocks["block1"]
        assert torch.isclose(measured["loss"], sum(F.cross_entropy(z, Y) for z in each) / 4, atol=1e-6)
        mean = sum(each) / 4
        assert torch.isclose(measured["accuracy"], (mean.argmax(1) == Y).float().mean())
        assert torch.allclose(learner.rule.outputs_at(site, h, head, learner.task), mean, atol=1e-6)


@pytest.mark.slow
def test_patches_go_with_windows_and_heads_that_look_ahead():
    model, data = net("resnet", 4), batches(3)
    rule = rules.create("dgl", patches=2, overlap=1, own=True, ahead="both")
    learner = Learner(copy.deepcopy(model), rule, lr=0.01)
    losses = [learner.step(X, Y).read()["block1/loss"] for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
    assert same_bits(trained(model, rule, data), gone_on(model, rule, data, stop=1))


@pytest.mark.parametrize("rule", ["local_ce", "dgl", "sll"])
def test_what_is_no_map_has_no_patches(rule):
    with pytest.raises(LayerwiseError, match=r"patches=2 cuts maps \(B, C, H, W\), and block 'block1' gives"):
        Learner(net("mlp"), rules.create(rule, patches=2), example=X)
