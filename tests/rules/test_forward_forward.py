"""Closed forms of Forward-Forward, Layer Collaboration and Scalable Forward-Forward, and what they refuse."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, PLAIN_SGD, batches, linear_blocks, net, same_bits, tensors, trained, vectors
from torch import nn

from layerwise import Classification, LayerwiseError, Learner, create_rule
from layerwise.rules import label_input

X, Y = batches(1)[0]


# --- Forward-Forward


def rms(h):
    return h.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (h.dim() - 1))


def softplus(v):
    return torch.log1p(v.exp())


@pytest.mark.parametrize("kind", ["sum", "mean"])
@pytest.mark.parametrize("loss", ["logistic", "symba"])
def test_forward_forward_moves_a_linear_block_by_the_closed_form(kind, loss):
    """dL/dW = 2 c (p - t) h x^T per sample; p is the logistic of goodness over theta, or of negative over positive."""
    model, (x, y) = linear_blocks(), vectors()
    rule = create_rule("forward_forward", goodness=kind, loss=loss, alpha=0.7)
    learner = Learner(model, rule, example=x, **PLAIN_SGD)
    before = [model[i].weight.detach().clone() for i in range(3)]
    seen = watched(learner, x, y)
    h = seen[0]["h_in"]
    assert torch.allclose(rms(h), torch.ones(()).double(), atol=1e-4)
    for weight, at, layer in zip(before, seen, model, strict=False):
        h = at["h_in"] @ weight.T
        scale = 1.0 if kind == "sum" else 1 / h.shape[1]
        g = scale * h.square().sum(1)
        true, false = g.chunk(2)
        theta = h.shape[1] if kind == "sum" else 2.0
        if loss == "logistic":
            push = torch.cat([-torch.sigmoid(theta - true), torch.sigmoid(false - theta)])
            expected = softplus(theta - true).mean() + softplus(false - theta).mean()
        else:
            slope = 0.7 * torch.sigmoid(-0.7 * (true - false))
            push = torch.cat([-slope, slope])
            expected = softplus(-0.7 * (true - false)).mean()
        gradient = (2 * scale * push[:, None] * h).T @ at["h_in"] / len(y)
        assert at["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(layer.weight, weight - 0.1 * gradient, atol=1e-6)
        assert torch.allclose(at["out"], h / rms(h), rtol=1e-3)  # the goodness is gone


def watched(learner, x, y):
    """One step; per block what went in, what came out, and the loss."""
    seen, signal = [], type(learner.rule).signal

    def spy(rule, at):
        answer = signal(rule, at)
        if not at.site.is_head:
            out = at.h if answer.output is None else answer.output
            seen.append({"h_in": at.h_in, "out": out.detach(), "loss": answer.metrics["loss"].item()})
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(learner.rule), "signal", spy)
        learner.step(x, y)
    return seen


@pytest.mark.parametrize("skip", [0, 1, 2, 9])
@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_the_goodness_predictor_is_the_loop_over_labels(kind, skip):
    rule = create_rule("forward_forward", skip=skip)
    learner = trained(net(kind), rule, [(X, Y)])
    model, write = learner.network.model.eval(), label_input.overlay if kind == "mlp" else label_input.label_map
    votes = torch.zeros(len(X), CLASSES)
    with torch.no_grad():
        for k in range(CLASSES):
            h = write(X, F.one_hot(torch.full_like(Y, k), CLASSES).float())
            for i, name in enumerate(model.block_names):
                h = model.get_submodule(name)(h / rms(h))
                if i >= min(skip, 2):
                    votes[:, k] += h.square().flatten(1).sum(1)
    assert torch.allclose(learner(X), votes, rtol=1e-3)


@pytest.mark.parametrize("negatives", ["random", "hybrid"])
def test_the_softmax_predictor_adds_the_readouts_of_the_blocks_behind_the_first(negatives):
    rule = create_rule("forward_forward", predictor="softmax", negatives=negatives)
    learner = trained(net("mlp"), rule, [(X, Y)])
    assert [learner.auxiliary[i].readout is not None for i in "012"] == [False, True, False]  # the head is the last
    model = learner.network.model
    neutral = torch.full((len(X), CLASSES), 1 / CLASSES)
    with torch.no_grad():
        h = X if negatives == "hybrid" else label_input.overlay(X, neutral)
        directions = []
        for name in model.block_names:
            h = model.get_submodule(name)(h / rms(h))
            directions.append(h / rms(h))
            h = directions[-1]
        expected = learner.auxiliary["1"].readout(directions[1]) + model.head(directions[2])
    assert torch.allclose(learner(X), expected, atol=1e-4)


def test_the_readouts_of_the_softmax_predictor_do_not_move_the_blocks():
    rules = [create_rule("forward_forward", predictor=p) for p in ("goodness", "softmax")]
    a, b = (trained(net("mlp"), rule, batches(2)).network.model for rule in rules)
    for name, weight in tensors(a).items():
        if not name.startswith("head"):
            assert torch.allclose(weight, tensors(b)[name], atol=1e-6)
    assert same_bits(a.head, net("mlp").head)
    assert not same_bits(b.head, net("mlp").head)


def test_peer_normalisation_is_the_variance_of_the_running_mean():
    model, (x, y) = linear_blocks(), vectors()
    rules = [create_rule("forward_forward", peer=p) for p in (0.0, 0.5)]
    plain, peer = (Learner(linear_blocks(), rule, example=x, **PLAIN_SGD) for rule in rules)
    (at, *_), _ = watched(plain, x, y), peer.step(x, y)
    h = at["h_in"][: len(y)] @ model[0].weight.T
    mean = 0.1 * h.mean(0)
    assert torch.allclose(peer.auxiliary["0"].running_mean.double(), mean.detach(), atol=1e-6)
    (gradient,) = torch.autograd.grad(0.5 * (mean - mean.mean()).square().mean(), model[0].weight)
    moved = plain.network.model[0].weight - peer.network.model[0].weight
    assert torch.allclose(moved, 0.1 * gradient, atol=1e-6)


def test_wrong_labels_are_wrong_and_uniform_over_the_others():
    y = torch.arange(CLASSES).repeat(5000)
    torch.manual_seed(0)
    wrong = label_input.wrong_labels(y, CLASSES)
    assert not (wrong == y).any()
    counts = torch.zeros(CLASSES, CLASSES).index_put((y, wrong), torch.ones(len(y)), accumulate=True) / 5000
    assert torch.allclose(counts + torch.eye(CLASSES) / 3, torch.full_like(counts, 1 / 3), atol=0.04)


def test_hard_negatives_are_drawn_in_proportion_to_the_predicted_probability():
    y = torch.zeros(20000, dtype=torch.long)
    logits = torch.tensor([5.0, 0.6, 0.3, 0.1]).log().expand(20000, -1)
    torch.manual_seed(0)
    counts = label_input.wrong_labels(y, CLASSES, logits).bincount(minlength=CLASSES) / 20000
    assert torch.allclose(counts, torch.tensor([0.0, 0.6, 0.3, 0.1]), atol=0.02)


def test_hard_negatives_broadcast_the_networks_opinion():
    rule = create_rule("forward_forward", negatives="hard")
    assert rule.locality == "broadcast"
    assert create_rule("forward_forward").locality == "local"
    seen = []
    learner = Learner(net("mlp"), rule, example=X)
    opinion = learner(X)
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda y, classes, logits: seen.append(logits) or label_input.wrong_labels(y, classes, logits)  # noqa: E731
        patch.setattr("layerwise.rules.forward_forward.wrong_labels", spy)
        learner.step(X, Y)
    assert torch.allclose(seen[0], opinion)


def test_the_overlay_is_one_bright_pixel_and_the_neutral_label_is_faint_everywhere():
    p = F.one_hot(Y, CLASSES).float()
    flat, written = X.flatten(1), label_input.overlay(X, p).flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    assert torch.equal(written[:, CLASSES:], flat[:, CLASSES:])
    assert torch.allclose(written[:, :CLASSES], torch.where(p > 0, high, low))
    neutral = label_input.overlay(X, torch.full_like(p, 1 / CLASSES)).flatten(1)
    assert torch.allclose(neutral[:, :CLASSES], (low + (high - low) / CLASSES).expand(-1, CLASSES))


@pytest.mark.parametrize("label", ["overlay", "map"])
def test_the_scale_of_a_label_multiplies_what_it_changes(label):
    first = SimpleNamespace(spatial=False, input_layout="BCHW", classes=CLASSES)
    p = F.one_hot(Y, CLASSES).float()
    one, three = (create_rule("forward_forward", label=label, label_scale=k).labelled(X, p, first) for k in (1.0, 3.0))
    none = create_rule("forward_forward", label=label).labelled(X, 0 * p, first)
    assert torch.allclose(three - none, 3 * (one - none), atol=1e-4)


@pytest.mark.parametrize(("height", "width", "classes"), [(8, 8, 40), (5, 9, 7), (28, 28, 100)])
def test_the_maps_of_the_labels_are_orthogonal_and_of_one_size(height, width, classes):
    x = torch.randn(1, 3, height, width)
    change = label_input.label_map(x.expand(classes, -1, -1, -1), torch.eye(classes)) - x
    assert torch.allclose(change[:, 0], change[:, 2], atol=1e-5)  # the same in every channel
    maps = change[:, 0].flatten(1) / x.std()
    assert torch.allclose(maps @ maps.T / (height * width), torch.eye(classes), atol=1e-3)
    assert torch.allclose(maps.mean(1), torch.zeros(classes), atol=1e-4)


def test_a_hybrid_takes_every_pixel_from_one_of_two_images():
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 20, 20)
    torch.manual_seed(0)
    mixed = label_input.hybrid_images(x)
    shares = []
    for i, image in enumerate(mixed):
        values = image.unique().tolist()
        assert i in values and len(values) == 2
        assert torch.equal(image[0], image[2])  # one mask for all channels
        shares.append((image == i).float().mean().item())
        inner = image[0]
        assert (inner[1:] != inner[:-1]).float().mean() < 0.25  # large spots, not noise
    assert 0.4 < sum(shares) / 6 < 0.6


def test_what_forward_forward_cannot_do_is_one_sentence():
    x, y = torch.randint(5, (2, 3)), torch.randint(CLASSES, (2, 3))
    language = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    with pytest.raises(LayerwiseError, match="one label per sample"):
        Learner(language, "forward_forward").step(x, y)
    narrow = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, CLASSES))
    with pytest.raises(LayerwiseError, match="3 numbers has no room for 4 labels"):
        Learner(narrow, "forward_forward").step(torch.randn(8, 3), Y[:8])
    with pytest.raises(LayerwiseError, match="needs images"):
        Learner(linear_blocks(), create_rule("forward_forward", label="map")).step(*vectors())
    with pytest.raises(LayerwiseError, match="label maps, fewer than the 4 classes"):
        label_input.label_map(torch.randn(8, 1, 2, 2), torch.eye(4))
    with pytest.raises(LayerwiseError, match="made of two images"):
        label_input.hybrid_images(vectors()[0])


# --- Layer Collaboration


@pytest.mark.parametrize("gamma", ["earlier", "all"])
def test_layer_collaboration_moves_a_linear_block_by_the_closed_form(gamma):
    """dL/dW = 2 (p - t) h x^T, where p = sigmoid(own + the other blocks' goodness - theta), of the same sample."""
    model, (x, y) = linear_blocks(), vectors()
    rule = create_rule("layer_collaboration", gamma=gamma, threshold=0.4)
    learner = Learner(model, rule, example=x, **PLAIN_SGD)
    before = [model[i].weight.detach().clone() for i in range(3)]
    seen = watched(learner, x, y)
    h, old = seen[0]["h_in"], []
    for weight in before:  # the whole network before the step
        h = h @ weight.T
        old.append(h.square().sum(1))
        h = h / rms(h)
    told = torch.zeros(2 * len(y))
    for i, (weight, at) in enumerate(zip(before, seen, strict=True)):
        h = at["h_in"] @ weight.T
        own = h.square().sum(1)
        others = told if gamma == "earlier" else sum(old) - own
        told = told + own
        theta = 0.4 * h.shape[1] * (i + 1 if gamma == "earlier" else 3)
        true, false = (own + others - theta).chunk(2)
        push = torch.cat([-torch.sigmoid(-true), torch.sigmoid(false)])
        gradient = (2 * push[:, None] * h).T @ at["h_in"] / len(y)
        assert at["loss"] == pytest.approx((softplus(-true).mean() + softplus(false).mean()).item(), rel=1e-4)
        assert torch.allclose(model[i].weight, weight - 0.1 * gradient, atol=1e-5)


def test_collaboration_with_nobody_before_is_forward_forward():
    a, b = (trained(net("mlp"), create_rule(rule), [(X, Y)]) for rule in ("forward_forward", "layer_collaboration"))
    assert same_bits(a.network.model.block1, b.network.model.block1)
    assert not same_bits(a.network.model.block2, b.network.model.block2)


def test_later_blocks_are_heard_by_a_first_pass_only():
    assert create_rule("layer_collaboration").locality == "local"
    assert create_rule("layer_collaboration", gamma="all").locality == "broadcast"
    model, other = net("mlp"), net("mlp")
    with torch.no_grad():
        other.block3.linear.weight.mul_(-3)
    for gamma, same in (("earlier", True), ("all", False)):
        rule = create_rule("layer_collaboration", gamma=gamma)
        a, b = (trained(m, rule, [(X, Y)]).network.model for m in (model, other))
        assert same_bits(a.block1, b.block1) is same


# --- Scalable Forward-Forward


@pytest.mark.parametrize("margin", [0.0, 0.8])
def test_the_margin_loss_is_its_formula(margin):
    rule = create_rule("scalable_ff", margin=margin)
    g, y = torch.rand(6, CLASSES, dtype=torch.float64), torch.arange(6) % CLASSES
    expected = 0.0
    for row, label in zip(g, y, strict=True):
        others = [c for c in range(CLASSES) if c != label]
        expected += math.log(1 + sum(math.exp(row[c] - row[label] + margin) for c in others)) / 6
    assert rule.margin_loss(g, y, Classification(CLASSES)).item() == pytest.approx(expected, rel=1e-5)
    if margin == 0:
        assert expected == pytest.approx(F.cross_entropy(g, y).item())


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
@pytest.mark.parametrize("predictor", ["mean", "last"])
def test_the_goodness_of_a_class_is_the_mean_square_of_its_channel(kind, predictor):
    rule = create_rule("scalable_ff", kernel=3, predictor=predictor)
    learner = trained(net(kind), rule, [(X, Y)])
    told, model, h, found = learner.evaluate(X, Y).read(), learner.network.model.eval(), X, []
    with torch.no_grad():
        for i, name in enumerate(model.block_names):
            h = model.get_submodule(name)(h)
            axis = 1 if kind == "vgg" else -1
            spread = (h.var(axis, correction=0, keepdim=True) + 1e-5).sqrt()
            h = (h - h.mean(axis, keepdim=True)) / spread
            a = learner.auxiliary[str(i)].channels(h)
            places = {"mlp": (), "vgg": (2, 3), "vit": (1,)}[kind]
            found.append(a.square().mean(places) if places else a.square())
            assert told[f"{name}/loss"] == pytest.approx(F.cross_entropy(found[-1], Y).item(), rel=1e-4)
    expected = sum(found) / len(found) if predictor == "mean" else found[-1]
    assert torch.allclose(learner(X), expected, rtol=1e-3, atol=1e-4)
    assert told["head/accuracy"] == pytest.approx((expected.argmax(1) == Y).float().mean().item())


def test_the_training_metric_of_the_head_is_the_predictors_own():
    for predictor in ("mean", "last"):
        rule = create_rule("scalable_ff", predictor=predictor)
        learner = Learner(net("mlp"), rule, example=X, lr=1e-12, weight_decay=0.0)
        told, expected = learner.step(X, Y).read(), learner.evaluate(X, Y).read()
        assert told["head/loss"] == pytest.approx(expected["head/loss"], rel=1e-5)
        assert told["head/accuracy"] == expected["head/accuracy"]


ILLEGAL = [
    ("scalable_ff", {"kernel": 2}),
    ("scalable_ff", {"predictor": "sum"}),
    ("layer_collaboration", {"gamma": "later"}),
    ("forward_forward", {"negatives": "hybrid"}),
    ("forward_forward", {"skip": -1}),
    ("forward_forward", {"alpha": 0.0}),
    ("forward_forward", {"goodness": "max"}),
    ("forward_forward", {"predictor": "sum"}),
]


@pytest.mark.parametrize(("rule", "option"), ILLEGAL, ids=str)
def test_an_illegal_value_is_refused_before_training(rule, option):
    (value,) = option.values()
    with pytest.raises(LayerwiseError, match=str(value)):
        Learner(net("mlp"), create_rule(rule, **option), example=X)


@pytest.mark.parametrize("rule", ["forward_forward", "layer_collaboration"])
def test_tokens_have_no_room_for_a_label(rule):
    """Token 0.3 is none: a label is written into real numbers only, and the sentence says so and not what failed."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(LayerwiseError, match=r"inputs of real numbers, not of torch.int64"):
        Learner(model, rule).step(torch.randint(9, (6, 4)), torch.arange(6) % 3)


def test_a_single_image_at_the_end_of_a_test_set_is_evaluated_without_another_to_mix_it_with():
    learner = Learner(net("mlp"), create_rule("forward_forward", negatives="hybrid", predictor="softmax"), example=X)
    found = learner.evaluate(X[:1], Y[:1])
    assert found.accuracy == (learner(X[:1]).argmax(1) == Y[:1]).float().mean()
