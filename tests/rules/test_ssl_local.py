"""Local contrastive learning: its loss, its views, and that labels reach the probe alone."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from support.nets import PLAIN_SGD, batches, linear_blocks, net, same_bits, tensors, trained, vectors
from torch import Generator, nn

from layerwise import BlockContext, LayerwiseError, Learner, create_rule
from layerwise.core.augment import crop, cutout, flip
from layerwise.core.functional import matched, nt_xent

X, Y = batches(1)[0]


def test_nt_xent_is_the_double_loop():
    torch.manual_seed(0)
    z, temperature = torch.randn(6, 4), 0.3
    total = 0.0
    for i in range(6):
        similar = [float(F.cosine_similarity(z[i], z[j], dim=0)) / temperature for j in range(6)]
        others = sum(math.exp(similar[j]) for j in range(6) if j != i)
        total -= math.log(math.exp(similar[(i + 3) % 6]) / others) / 6
    assert float(nt_xent(z, temperature)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("samples", [2, 5, 64])
def test_nt_xent_of_equal_views_is_the_logarithm_of_the_others(samples):
    z = torch.randn(1, 3).repeat(2 * samples, 1)
    assert float(nt_xent(z, 0.1)) == pytest.approx(math.log(2 * samples - 1), rel=1e-5)


def test_matched_counts_the_views_that_find_each_other():
    z = torch.eye(4)
    assert float(matched(torch.cat([z, z]))) == 1
    assert float(matched(torch.cat([z, z.roll(1, 0)]))) == 0
    assert float(matched(torch.cat([z, z[[1, 0, 2, 3]]]))) == 0.5


def test_views_of_images_are_the_projects_augmentations_and_noise():
    plain = create_rule("ssl_local", augment=("flip", "crop", "cutout"), noise=0.0)
    generator = Generator().manual_seed(5)
    wanted = cutout(crop(flip(X, generator), generator), generator)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        view = plain.view(X)
        noisy = create_rule("ssl_local", augment=(), noise=0.5).view(X)
    assert torch.equal(view, wanted)
    assert float((noisy - X).std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("shape", [(4000,), (1, 1, 4000), (4000, 1, 1)])
def test_views_of_what_is_no_image_lose_a_share_of_their_numbers(shape):
    x = 1 + torch.rand(4, *shape)
    view = create_rule("ssl_local", drop=0.3, noise=0.0).view(x)
    assert torch.equal(view[view != 0], x[view != 0])
    assert float((view == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(create_rule("ssl_local", drop=0.0, noise=0.0).view(x), x)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_the_loss_of_a_block_is_the_contrast_at_the_rules_temperature(temperature):
    rule = create_rule("ssl_local", temperature=temperature, hidden=8, dim=4)
    learner = Learner(net("mlp"), rule, example=X)
    views = torch.randn(2 * len(Y), 16)
    site = learner.groups[0].units[0].site
    h = torch.cat([views, torch.zeros(len(Y), 16)])  # the samples themselves count in no contrast
    ctx = BlockContext(site, h, h, None, Y, learner.task, learner.auxiliary["0"], training=True)
    z = F.normalize(learner.auxiliary["0"](views), dim=1)
    scores = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    pairs = torch.arange(2 * len(Y)).roll(len(Y))
    assert torch.allclose(rule.signal(ctx).loss, F.cross_entropy(scores, pairs), atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_labels_reach_the_probe_alone(kind):
    model, data = net(kind), batches(3)
    a, b = (
        trained(model, "ssl_local", [(x, labels(y)) for x, y in data]) for labels in (lambda y: y, torch.zeros_like)
    )
    for block in a.network.blocks:
        assert same_bits(
            dict(block.named_parameters()), dict(b.network.blocks[block_index(a, block)].named_parameters())
        )
    assert same_bits(a.auxiliary, b.auxiliary)
    assert not same_bits(tensors(a.network.model.head), tensors(b.network.model.head))


def block_index(learner, block):
    return learner.network.blocks.index(block)


def test_a_block_descends_the_contrast_of_two_views_that_differ():
    """One step written by hand, on views that the rule is made to draw again."""
    x, y = vectors()
    rule, seen = create_rule("ssl_local", dim=3, hidden=4), []

    class Spy(type(rule)):
        def begin(self, start):
            h, message = super().begin(start)
            seen.append(h)
            return h, message

    model = linear_blocks()
    learner = Learner(model, Spy(dim=3, hidden=4), example=x, **PLAIN_SGD)
    before, auxiliary = copy.deepcopy(model), copy.deepcopy(learner.auxiliary)
    learner.step(x, y)
    learner.step(x, y)
    first, second, itself = seen[0].chunk(3)
    assert torch.equal(itself, x) and not torch.equal(first, second) and not torch.equal(first, seen[1].chunk(3)[0])
    h = torch.cat([first, second])
    learner = Learner(copy.deepcopy(before), Spy(dim=3, hidden=4), example=x, **PLAIN_SGD)
    learner.step(x, y)
    for i in range(3):
        out = before[i](h)
        loss = nt_xent(auxiliary[str(i)](out), 0.5)
        (gradient,) = torch.autograd.grad(loss, before[i].weight)
        assert torch.allclose(learner.network.model[i].weight, before[i].weight - 0.1 * gradient, atol=1e-6)
        assert float(gradient.abs().max()) > 1e-4
        h = out.detach()
    loss = F.cross_entropy(before(x), y)  # the probe sees the samples themselves
    (gradient,) = torch.autograd.grad(loss, before[3].weight)
    assert torch.allclose(learner.network.model[3].weight, before[3].weight - 0.1 * gradient, atol=1e-6)


def test_views_of_other_samples_are_told_apart_better_after_training():
    x, y = torch.randn(32, 1, 8, 8, generator=Generator().manual_seed(1)), torch.arange(32) % 4
    learner = Learner(net("mlp"), create_rule("ssl_local", noise=1.0), lr=0.01)
    seen = [learner.step(x, y).read() for _ in range(60)]
    for block in ("block1", "block2", "block3"):
        first, last = ([read[f"{block}/matched"] for read in part] for part in (seen[:5], seen[-5:]))
        assert sum(last) > 1.3 * sum(first)


def test_blocks_in_a_group_share_one_projection():
    learner = Learner(net("mlp", depth=5), create_rule("ssl_local", group=2), example=X)
    assert list(learner.auxiliary) == ["1", "3", "4"]
    learner.step(X, Y)
    assert learner.evaluate(X, Y).accuracy == (learner(X).argmax(1) == Y).float().mean()


def test_what_makes_no_views_is_refused():
    options = [{"temperature": 0.0}, {"noise": -1.0}, {"drop": 1.0}, {"hidden": 0}, {"dim": 0}, {"group": 0}]
    for option in [*options, {"augment": ("crip",)}]:
        (value,) = option.values()
        with pytest.raises(LayerwiseError, match=re.escape(str(value[0] if isinstance(value, tuple) else value))):
            create_rule("ssl_local", **option)
    language = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    tokens = torch.randint(9, (2, 5))
    with pytest.raises(LayerwiseError, match=r"makes views of samples of real numbers .* type int64"):
        Learner(language, "ssl_local").step(tokens, tokens)
