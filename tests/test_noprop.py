"""NoProp: the diffusion's identities, the loss written down, independence of the blocks, the sampler."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import CLASSES, batches, net, same_bits, trained

from layerwise import LayerwiseError, Learner, create_rule
from layerwise.engine import Engine, Trace
from layerwise.functional import denoising_step, signal_share
from layerwise.rules.base import Site

X, Y = batches(1)[0]


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_step_towards_the_true_label_keeps_mean_and_variance(steps):
    shares = [signal_share(t, steps) for t in range(steps + 1)]
    assert shares == sorted(set(shares))
    assert shares[0] > 0 and shares[-1] < 1
    for t in range(1, steps + 1):
        a, b, c = denoising_step(t, steps)
        assert a + b * shares[t - 1] ** 0.5 == pytest.approx(shares[t] ** 0.5, abs=1e-12)
        assert b * b * (1 - shares[t - 1]) + c == pytest.approx(1 - shares[t], abs=1e-12)
        assert min(a, b, c) > 0


def test_the_weights_of_the_blocks_add_up_to_the_whole_gain():
    rule, steps = create_rule("noprop_dt", eta=0.3), 6
    total = sum(rule.loss_weight(Site(i, steps, "")) for i in range(steps))
    first, last = (signal_share(t, steps) for t in (0, steps))
    assert total == pytest.approx(steps / 2 * 0.3 * (last / (1 - last) - first / (1 - first)))


@pytest.mark.parametrize("embedding", ["conv", "mlp"])
def test_a_blocks_loss_is_the_weighted_distance_of_its_label(embedding, monkeypatch):
    """In evaluation; the label that a block tells is put together from its parts."""
    learner = trained(net("noprop", embedding=embedding), "noprop_dt", batches(3))
    given, forward = [], Engine.forward

    def watched(engine, group, h, *others):
        given.append(h)
        return forward(engine, group, h, *others)

    monkeypatch.setattr(Engine, "forward", watched)
    told, model = learner.evaluate(X, Y).read(), learner.network.model.eval()
    for t, h in enumerate(given[:-1], 1):
        block = getattr(model, f"block{t}")
        block = block.denoise if t == 1 else block
        with torch.no_grad():
            label = block.label(h[:, :CLASSES]).relu()
            parts = [block.image(X), label + block.skip(label).relu()]
            u = block.joined(torch.cat(parts, 1)).softmax(1)
        distance = (u - F.one_hot(Y, CLASSES)).square().sum(1).mean()
        after, before = (signal_share(s, 3) / (1 - signal_share(s, 3)) for s in (t, t - 1))
        assert told[f"block{t}/loss"] == pytest.approx(3 / 2 * 0.1 * (after - before) * distance.item(), rel=1e-3)
        assert told[f"block{t}/accuracy"] == pytest.approx((u.argmax(1) == Y).float().mean().item())
        assert torch.equal(h[:, CLASSES:], X.flatten(1))


def inputs_of(learner, x, y, monkeypatch):
    """What every group is given in a step."""
    given, update = [], Engine.update
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", lambda e, g, h, *o: (given.append(h), update(e, g, h, *o))[1])
        learner.step(x, y)
    return given


def test_blocks_may_be_trained_in_any_order(monkeypatch):
    """What a block gets is no function of any weight, so the last block may learn first: the bits are the same."""
    model, other = net("noprop"), net("noprop")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-3)
    straight, last_first = (Learner(copy.deepcopy(model), "noprop_dt", example=X) for _ in range(2))
    given = inputs_of(straight, X, Y, monkeypatch)
    strange = inputs_of(Learner(other, "noprop_dt", example=X), X, Y, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(given, strange, strict=True))
    assert not torch.equal(given[0][:, :CLASSES], given[1][:, :CLASSES])
    last_first.network.train()
    for group, h in reversed([*zip(last_first.groups, strange, strict=True)]):
        last_first.engine.update(group, h, None, Y, 0, Trace())
    assert same_bits(last_first, straight)


def test_what_a_block_is_given_is_a_draw_around_the_share_of_the_label(monkeypatch):
    x, y = X[:1].expand(4096, -1, -1, -1), Y[:1].expand(4096)
    given = inputs_of(Learner(net("noprop"), "noprop_dt", example=X), x, y, monkeypatch)
    for t, h in enumerate(given):
        share = signal_share(t, 3)
        noise = (h[:, :CLASSES] - share**0.5 * F.one_hot(y, CLASSES)) / (1 - share) ** 0.5
        assert noise.mean(0).abs().max() < 5 / 64
        assert (noise.square().mean(0) - 1).abs().max() < 5 * 2**0.5 / 64


def test_the_sampler_is_seeded_and_what_evaluation_reports():
    learner = trained(net("noprop"), "noprop_dt", batches(3))
    logits = learner(X)
    assert torch.equal(logits, learner(X))
    assert not torch.allclose(logits, learner.network.model.eval()(X))  # which starts from zero and adds no noise
    other = Learner(copy.deepcopy(learner.network.model), "noprop_dt", seed=1, example=X)
    assert not torch.allclose(logits, other(X))
    assert learner.evaluate(X, Y).read()["head/loss"] == pytest.approx(F.cross_entropy(logits, Y).item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "vgg", "sid_cascade"])
def test_other_networks_are_refused(kind):
    with pytest.raises(LayerwiseError, match="trains the model 'noprop'"):
        Learner(net(kind), "noprop_dt", example=X)
    with pytest.raises(LayerwiseError, match="trains the model 'noprop'"):
        Learner(net("noprop"), "noprop_dt", cuts=["block2"], example=X)
    with pytest.raises(LayerwiseError, match=r"eta is 0\.0"):
        create_rule("noprop_dt", eta=0.0)
