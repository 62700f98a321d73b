"""Closed forms of the rules with auxiliary networks of their own: AugLocal, InfoPro, periodic guidance."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from support.nets import (
    CLASSES,
    PLAIN_SGD,
    batches,
    gone_on,
    linear_blocks,
    net,
    same_bits,
    snapshot,
    tensors,
    trained,
    vectors,
)
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule
from layerwise.cli import main as cli
from layerwise.core import functional
from layerwise.rules.infopro import Decoder, brightness

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


@pytest.mark.parametrize(("depth", "blocks"), [(4, 6), (4, 7), (6, 9)])
def test_the_full_taper_is_reached_at_the_last_block_with_an_auxiliary_network(depth, blocks):
    """Depths fall evenly from d at the first block to d (1 - tau) + tau at the last one that learns alone."""
    last = blocks - depth - 1
    for taper in (0.25, 0.5, 1.0):
        rule = create_rule("auglocal", depth=depth, taper=taper)
        assert len(rule.chosen(0, blocks)) == depth
        assert len(rule.chosen(last, blocks)) == round(depth * (1 - taper) + taper)


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


# --- InfoPro


def patches(h, side):
    """The pixels of tokens `(B, T, side ** 2)` on a square of patches, written with loops."""
    count = round(h.shape[1] ** 0.5)
    image = h.new_zeros(len(h), 1, count * side, count * side)
    for token in range(h.shape[1]):
        row, column = side * (token // count), side * (token % count)
        image[:, 0, row : row + side, column : column + side] = h[:, token].view(-1, side, side)
    return image


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
@pytest.mark.parametrize("task", ["ce", "contrast"])
def test_infopro_is_the_weighted_sum_of_reconstruction_and_task(kind, task):
    """Four groups: weights 2, 1, 0 of the reconstruction and 0, 0.5, 1 of the task in the first three."""
    rule = create_rule("infopro", task=task, reconstruction=(2.0, 0.0), classification=(0.0, 1.0), temperature=0.5)
    learner = trained(net(kind, depth=4), rule, batches(2))
    told, h, model = learner.evaluate(X, Y).read(), X, learner.network.model.eval()
    learner.auxiliary.eval()
    flat = X.flatten(1)
    low, high = flat.min(1).values, flat.max(1).values
    target = (X - low.view(-1, 1, 1, 1)) / (high - low).view(-1, 1, 1, 1)
    with torch.no_grad():
        for i, (keep, tell) in enumerate([(2.0, 0.0), (1.0, 0.5), (0.0, 1.0)]):
            h = model.get_submodule(f"block{i + 1}")(h)
            heads, total = learner.auxiliary[str(i)], 0.0
            assert (heads.decoder is None, heads.reader is None) == (keep == 0, tell == 0)
            if keep:
                layers = heads.decoder.layers
                pixels = layers(h) if kind == "vgg" else layers(h).view(X.shape) if kind == "mlp" else None
                pixels = patches(layers(h[:, 1:]), 4) if pixels is None else pixels
                p = pixels.sigmoid()
                bce = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
                assert told[f"block{i + 1}/reconstruction"] == pytest.approx(bce.item(), rel=1e-4)
                total += keep * bce.item()
            if tell:
                found = heads.reader(h.mean(1) if kind == "vit" else h)
                if task == "ce":
                    assert found.shape[1] == CLASSES
                    total += tell * F.cross_entropy(found, Y).item()
                else:
                    assert found.shape[1] == 128
                    total += tell * functional.supervised_contrastive(found, Y, 0.5).item()
            assert told[f"block{i + 1}/loss"] == pytest.approx(total, rel=1e-4)
        assert told["head/loss"] == pytest.approx(F.cross_entropy(model(X), Y).item(), abs=1e-5)


def test_the_contrastive_loss_is_its_double_sum():
    torch.manual_seed(0)
    z, y = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    unit, terms = z / z.norm(dim=1, keepdim=True), []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        if positives:  # 2 and 3 are alone
            bottom = sum((unit[i] @ unit[a] / 0.3).exp() for a in others)
            terms.append(-sum(((unit[i] @ unit[p] / 0.3).exp() / bottom).log() for p in positives) / len(positives))
    expected = sum(terms) / len(terms)
    found = functional.supervised_contrastive(z, y, 0.3)
    assert len(terms) == 5
    assert torch.allclose(found.double(), expected, atol=1e-6)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)
    assert functional.supervised_contrastive(z, torch.arange(7), 0.3) == 0


def test_infopro_with_reconstruction_alone_moves_a_block_as_its_decoder_says():
    model, (x, y) = linear_blocks(depth=2), vectors()
    rule = create_rule("infopro", reconstruction=0.5, classification=0.0)
    learner = Learner(model, rule, example=x, **PLAIN_SGD)
    decoder = learner.auxiliary["0"].decoder
    weights = [model[0].weight, *decoder.parameters()]
    loss = 0.5 * (decoder.layers(model[0](x)) - x).square().mean()  # vectors: the squared distance of the values
    expected = [w.detach() - 0.1 * g for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
    learner.step(x, y)
    for weight, after in zip(weights, expected, strict=True):
        assert torch.allclose(weight, after, atol=1e-7)


def test_a_decoder_gives_the_shape_of_the_input():
    for given, wanted in [
        ((3, 2, 4), (2, 6, 8)),
        ((5,), (2, 6, 8)),
        ((5,), (7,)),
        ((17, 5), (3, 8, 8)),
        ((4, 5), (1, 4, 4)),
    ]:
        assert Decoder(given, wanted)(torch.randn(2, *given)).shape == (2, *wanted)
    assert brightness(torch.full((2, 1, 3, 3), 5.0)).abs().max() == 0
    with pytest.raises(LayerwiseError, match="set reconstruction=0"):
        Decoder((6, 8), (1, 4, 4))


def test_infopro_refuses_what_it_cannot_reconstruct_or_read():
    language = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    x, y = torch.randint(5, (2, 3)), torch.randint(CLASSES, (2, 3))
    with pytest.raises(LayerwiseError, match="reconstructs the input"):
        Learner(language, "infopro").step(x, y)
    with pytest.raises(LayerwiseError, match="one label per sample"):
        Learner(language, create_rule("infopro", reconstruction=0.0)).step(x, y)


def test_blocks_in_a_group_share_the_weights_of_their_group():
    rule = create_rule("infopro", group=2, reconstruction=(3.0, 1.0), classification=0.5)
    learner = Learner(net("mlp", depth=6), rule, example=X)
    assert list(learner.auxiliary) == ["1", "3"]
    sites = [unit.site for group in learner.groups for unit in group.units]
    assert [rule.weights(site) for site in sites] == [(0, 0), (3, 0.5), (0, 0), (1, 0.5), (0, 0), (0, 0), (0, 0)]


# --- Periodic guidance


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
@pytest.mark.parametrize(("guided", "like"), [(0, "dgl"), (3, "backprop")])
def test_never_guided_is_dgl_and_always_guided_is_backprop_bit_for_bit(kind, guided, like):
    model, rule = net(kind, dropout=0.2), create_rule("periodic_guidance", period=3, guided=guided)
    a, b = (trained(model, r, batches(4)) for r in (rule, like))
    assert same_bits(a.network, b.network)
    if like == "dgl":
        assert same_bits(a, b)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_guided_steps_follow_the_global_loss_and_the_others_the_local_ones(clip):
    """Three steps of a period of two, written by hand: one Adam over everything, fed by the losses of the step."""
    model, data = net("mlp", depth=2), batches(4)
    # A bias in front of batch norm has no gradient but rounding errors, which a larger eps keeps small.
    options = {"clip": clip, "optimizer_options": {"eps": 1e-3}}
    learner = Learner(copy.deepcopy(model), create_rule("periodic_guidance", period=2), example=X, **options)
    heads = copy.deepcopy(learner.auxiliary)
    weights = [*model.parameters(), *heads.parameters()]
    groups = [[*model.block1.parameters(), *heads.parameters()], [*model.block2.parameters(), *model.head.parameters()]]
    options = [{"params": [p for p in weights if p.dim() > 1]}, {"params": [p for p in weights if p.dim() == 1]}]
    options[1]["weight_decay"] = 0.0
    adam = torch.optim.AdamW(options, lr=1e-3, eps=1e-3, weight_decay=0.01)
    for step, (x, y) in enumerate(data):
        h = model.block1(x)
        if step % 2:
            loss, clipped = F.cross_entropy(model(x), y), [list(model.parameters())]
        else:
            loss = F.cross_entropy(heads["0"](h), y)
            loss, clipped = loss + F.cross_entropy(model.head(model.block2(h.detach())), y), groups
        loss.backward()
        for own in clipped if clip else ():
            torch.nn.utils.clip_grads_with_norm_(own, clip, torch.nn.utils.get_total_norm([p.grad for p in own]))
        adam.step()
        adam.zero_grad(set_to_none=True)
        learner.step(x, y)
    for (name, p), wanted in zip(learner.named_parameters(), weights, strict=True):
        assert torch.allclose(p, wanted, atol=1e-6), name
    steps = {name: int(state["step"]) for name, state in learner.optimizer_states().items()}
    assert {steps[name] for name in steps if name.startswith("auxiliary.")} == {2}
    assert {steps[name] for name in steps if not name.startswith("auxiliary.")} == {4}


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"precision": "fp16"}], ids=str)
def test_guidance_goes_on_from_its_state_to_the_same_bits(stop, options):
    model, data = net("mlp", dropout=0.2), batches(5)
    rule = create_rule("periodic_guidance", period=2)
    straight = trained(model, rule, data, **options)
    resumed = gone_on(model, rule, data, stop, **options)
    assert same_bits(resumed, straight)
    assert resumed.state_dict()["scaler"] == straight.state_dict()["scaler"]


def test_batches_that_make_one_update_are_of_one_kind():
    """With two batches for each update, the second update is the guided one; its halves weigh alike."""
    model, data = net("mlp"), batches(4, size=8)
    rule = create_rule("periodic_guidance", period=2)
    a = trained(model, rule, data, accumulate=2)
    names = [[group.name for group in a.groups_at(update)] for update in range(2)]
    assert names == [["block1", "block2", "block3..head"], ["block1..head"]]
    assert [state["step"].item() for name, state in a.optimizer_states().items() if "block1" in name] == [2.0, 2.0]


@pytest.mark.slow
def test_only_guided_steps_need_the_memory_of_backprop():
    def held(rule, depth, steps):
        learner = trained(net("mlp", depth=depth, width=64), rule, batches(steps))
        _, use = learner.measured_step(X, Y)
        return use.activations + use.gradients

    guided = create_rule("periodic_guidance", period=3)
    assert held(guided, 17, 1) <= 1.01 * held(guided, 7, 1)  # step 1, a local one
    assert held(guided, 17, 2) > 2 * held(guided, 7, 2)
    assert held(guided, 17, 2) == pytest.approx(held("backprop", 17, 2), rel=0.02)


@pytest.mark.slow
def test_a_run_tells_the_memory_of_its_dearest_step(tmp_path):
    told = {}
    for guided in (0, 1):
        words = f"train --rule periodic_guidance --rule.period 4 --rule.guided {guided} --model.width 64 --steps 6"
        folder = tmp_path / str(guided)
        assert cli.main([*words.split(), "--model.depth", "20", "--batch-size", "512", "--out", str(folder)]) == 0
        told[guided] = json.loads((folder / "result.json").read_text())["memory_mib"]["activations"]
    assert told[1] > 2 * told[0]


class Parting(type(create_rule("periodic_guidance"))):
    """Asks for groups that part its own in its second step."""

    def groups_at(self, update, blocks):
        return [range(1), range(1, blocks + 1)] if update == 1 else [range(blocks + 1)]

    def groups(self, blocks):
        return [range(blocks + 1)]


def test_a_rule_may_join_groups_and_not_part_them():
    learner = trained(net("mlp"), Parting(), batches(1))
    with pytest.raises(LayerwiseError, match="parts a group in some steps"):
        learner.step(X, Y)


ILLEGAL = [
    ("periodic_guidance", {"period": 0}),
    ("periodic_guidance", {"guided": 11}),
    ("periodic_guidance", {"guided": -1}),
    ("periodic_guidance", {"network": "conv"}),
    ("infopro", {"reconstruction": -1.0}),
    ("infopro", {"classification": ()}),
    ("infopro", {"temperature": 0.0}),
    ("infopro", {"task": "mse"}),
    ("auglocal", {"depth": 0}),
    ("auglocal", {"taper": 1.5}),
]


@pytest.mark.parametrize(("rule", "option"), ILLEGAL, ids=str)
def test_an_illegal_value_is_refused_before_training(rule, option):
    (value,) = option.values()
    with pytest.raises(LayerwiseError, match=re.escape(str(value))):
        Learner(net("mlp"), create_rule(rule, **option), example=X)


COMPARE = [("ssl_local", {}), ("predsim", {}), ("predsim", {"loss": "sim"}), ("infopro", {"task": "contrast"})]


@pytest.mark.parametrize(("rule", "options"), COMPARE, ids=str)
def test_a_rule_that_compares_samples_refuses_one_and_parts_of_a_batch(rule, options):
    """One sample has nothing to differ from: all gradients would be zero. In evaluation it may be the rest of a set."""
    learner = Learner(net("mlp"), create_rule(rule, **options), example=X)
    before = snapshot(learner)
    with pytest.raises(LayerwiseError, match="compares the samples of a batch, and this one has 1"):
        learner.step(X[:1], Y[:1])
    assert same_bits(before, snapshot(learner))
    assert torch.isfinite(learner.evaluate(X[:1], Y[:1]).loss)
    with pytest.raises(LayerwiseError, match="compares the samples of a batch"):
        Learner(net("mlp"), create_rule(rule, **options), micro=2, example=X)


@pytest.mark.parametrize("rule", ["ssl_local", "noprop_dt", "noprop_ct", "noprop_fm"])
def test_a_rule_that_adds_to_the_batch_does_so_in_every_step_whatever_the_mode(rule):
    """All layers are in evaluation mode, so nothing but the mode of the network itself can differ."""
    kind = {"ssl_local": "mlp", "noprop_dt": "noprop"}.get(rule, rule)
    training, evaluation = (Learner(net(kind).eval(), rule) for _ in range(2))
    training.network.model.training = training.network.training = True
    for x, y in batches(2):
        assert training.step(x, y).read() == evaluation.step(x, y).read()
    assert same_bits(tensors(training.network), tensors(evaluation.network))
