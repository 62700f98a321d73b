"""Closed forms of the rules with local losses, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, PLAIN_SGD, batches, linear_blocks, net, problem, same_bits, tensors, trained, vectors
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule
from layerwise.core import functional
from layerwise.rules.counter_current import Feedback
from layerwise.rules.dgl import auxiliary_network

X, Y = batches(1)[0]


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


# --- PredSim


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
@pytest.mark.parametrize("loss", ["predsim", "pred", "sim"])
def test_predsim_is_the_weighted_sum_of_its_two_losses(kind, loss):
    learner = trained(net(kind), create_rule("predsim", loss=loss, beta=0.7), batches(2))
    h, told = X, learner.evaluate(X, Y).read()
    labels = torch.corrcoef(F.one_hot(Y, CLASSES).double())  # the rows' correlations: cosines of centred rows
    model = learner.network.model.eval()
    for i, name in enumerate(model.block_names):
        heads = learner.auxiliary[str(i)]
        with torch.no_grad():
            h = model.get_submodule(name)(h)
            total = 0.0
            if loss != "sim":
                pooled = h.mean(1) if kind == "vit" else h.flatten(1)  # a small map is not averaged
                total += (1.0 if loss == "pred" else 0.3) * F.cross_entropy(heads.classifier(pooled), Y)
            if loss != "pred":
                z = heads.map(h)
                rows = z.flatten(2).std(2) if kind == "vgg" else z.flatten(1)
                distance = (torch.corrcoef(rows.double()) - labels).square().mean()
                assert told[f"{name}/similarity"] == pytest.approx(distance.item(), abs=1e-5)
                total += (1.0 if loss == "sim" else 0.7) * distance
        assert told[f"{name}/loss"] == pytest.approx(total.item(), abs=1e-5)


def test_labels_of_two_classes_have_the_similarity_minus_one_over_k_minus_one():
    wanted = functional.similarity(torch.eye(7)[[0, 3, 3]])
    assert torch.allclose(wanted, torch.tensor([[1, -1 / 6, -1 / 6], [-1 / 6, 1, 1], [-1 / 6, 1, 1]]), atol=1e-6)


def test_the_classifier_starts_at_zero_so_that_the_first_step_moves_similarities_only():
    pred, sim, both = (
        Learner(net("mlp"), create_rule("predsim", loss=k), example=X) for k in ("pred", "sim", "predsim")
    )
    assert pred.step(X, Y).read()["block1/loss"] == pytest.approx(math.log(CLASSES))
    assert pred.network.model.block1.linear.weight.grad is None
    start = net("mlp").block1.linear.weight
    decayed = start * (1 - 1e-3 * 0.01)
    assert torch.allclose(pred.network.model.block1.linear.weight, decayed, atol=1e-7)
    both.step(X, Y)
    assert not torch.allclose(both.network.model.block1.linear.weight, decayed, atol=1e-4)
    assert sim.auxiliary["0"].classifier is None


def test_dead_units_and_single_places_give_finite_gradients():
    rule = create_rule("predsim", loss="sim")
    learner = Learner(net("vgg", depth=4), rule, example=X)
    with torch.no_grad():
        learner.network.model.block1.norm.weight.zero_()  # every output of the block is the ReLU of 0
    learner.step(X, Y)
    wide = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Conv2d(4, 4, 1), nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES)))
    learner = Learner(wide, rule)
    learner.step(X, Y)  # maps of one place: the values themselves are the row
    assert all(p.isfinite().all() for _, p in learner.named_parameters())


# --- DGL


@pytest.mark.parametrize(("network", "maps"), [("mlp_sr", (2, 4)), ("cnn", (6, 14)), ("mlp", (6, 14))])
def test_the_auxiliary_networks_have_the_sizes_of_the_paper(network, maps):
    """A block of 5 channels; MLP-SR works on maps of ceil(6 / 4) x ceil(14 / 4)."""
    channels, seen = 5, []
    made = auxiliary_network(torch.zeros(1, channels, 6, 14), CLASSES, network, "auto")
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, given, out: seen.append((module.kernel_size, out.shape[2:])))
    assert made(torch.randn(3, channels, 6, 14)).shape == (3, CLASSES)
    wide = 4 * channels
    mlp = 3 * (wide * wide + wide + 2 * wide) + wide * CLASSES + CLASSES
    square, two = channels * channels + 2 * channels, 2 * (9 * channels * channels + 2 * channels)
    sizes = {"mlp_sr": 3 * square + mlp, "cnn": two + wide * CLASSES + CLASSES, "mlp": mlp}
    assert sum(p.numel() for p in made.parameters()) == sizes[network]
    expected = {"mlp_sr": [((1, 1), maps)] * 3, "cnn": [((3, 3), maps)] * 2, "mlp": []}
    assert seen == expected[network]


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_dgl_is_the_cross_entropy_of_the_auxiliary_networks(kind):
    learner = trained(net(kind), "dgl", batches(2))
    told, h = learner.evaluate(X, Y).read(), X
    model = learner.network.model.eval()
    learner.auxiliary.eval()
    with torch.no_grad():
        for i, name in enumerate(model.block_names[:2]):
            h = model.get_submodule(name)(h)
            logits = learner.auxiliary[str(i)](h.mean(1) if kind == "vit" else h)
            assert told[f"{name}/loss"] == pytest.approx(F.cross_entropy(logits, Y).item(), abs=1e-5)
        assert list(learner.auxiliary) == ["0", "1"]  # the last block is read by the head
        assert told["head/loss"] == pytest.approx(F.cross_entropy(model(X), Y).item(), abs=1e-5)


def test_a_skipped_update_puts_the_statistics_of_the_auxiliary_network_back():
    learner = trained(net("vgg"), "dgl", batches(2), nonfinite="skip")
    before = tensors(learner.auxiliary)
    bad = X.clone()
    bad[0] = float("nan")
    learner.step(bad, Y)
    assert learner.skipped == 1
    assert same_bits(tensors(learner.auxiliary), before)


def test_dgl_reads_one_label_per_sample():
    language = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    with pytest.raises(LayerwiseError, match="one label per sample"):
        Learner(language, "dgl").step(torch.randint(5, (2, 3)), torch.randint(CLASSES, (2, 3)))


# --- Interlocking backpropagation


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_interlocking_all_blocks_is_backprop_bit_for_bit(kind):
    model = net(kind, dropout=0.2)
    a, b = (trained(model, rule, batches(3)) for rule in (create_rule("interlocking", n=3), "backprop"))
    assert not list(a.auxiliary)
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q), name  # batch norm's running statistics have seen each batch more than once


def test_one_wise_interlocking_is_local_ce():
    a, b = (trained(net("mlp"), rule, batches(3)) for rule in (create_rule("interlocking", n=1), "local_ce"))
    assert same_bits(a, b)


@pytest.mark.parametrize("n", [2, 3])
def test_a_block_follows_the_loss_n_minus_one_blocks_ahead_and_its_head_its_own(n):
    """Every gradient written down with autograd, on the network before the step."""
    model, (x, y) = linear_blocks(depth=5), vectors()
    learner = Learner(model, create_rule("interlocking", n=n), example=x, **PLAIN_SGD)
    learner.auxiliary.double()
    assert list(learner.auxiliary) == [str(k) for k in range(n - 1, 4)]
    activations = [x]
    for layer in model:
        activations.append(layer(activations[-1]))
    losses = {k: F.cross_entropy(learner.auxiliary[str(k)](activations[k + 1]), y) for k in range(n - 1, 4)}
    losses[4] = F.cross_entropy(activations[-1], y)
    expected = {}
    for i in range(5):
        (gradient,) = torch.autograd.grad(losses[min(i + n - 1, 4)], [model[i].weight], retain_graph=True)
        expected[f"{i}.weight"] = model[i].weight.detach() - 0.1 * gradient
    for k in range(n - 1, 4):
        head = learner.auxiliary[str(k)]
        (gradient,) = torch.autograd.grad(losses[k], [head.weight], retain_graph=True)
        expected[f"auxiliary.{k}.weight"] = head.weight.detach() - 0.1 * gradient
    learner.step(x, y)
    after = dict(learner.named_parameters())
    for name, weight in expected.items():
        assert torch.allclose(after[name], weight), name


def test_only_the_last_n_blocks_feel_the_head():
    model, other = net("mlp", depth=5), net("mlp", depth=5)
    with torch.no_grad():
        other.head.weight.mul_(-3)
    a, b = (trained(m, create_rule("interlocking", n=2), batches(1)).network.model for m in (model, other))
    assert [same_bits(getattr(a, name), getattr(b, name)) for name in a.block_names] == [True] * 3 + [False] * 2


# --- Gradient reconciliation


@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_gradients_are_reconciled_as_written_down(distance):
    """Every block's gradient, with autograd on the blocks one by one; tanh, so that second derivatives matter."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    model, (x, y) = nn.Sequential(*layers, nn.Linear(6, CLASSES)).double(), vectors()
    rule = create_rule("gradient_reconciliation", weight=0.7, distance=distance)
    learner = Learner(model, rule, example=x, **PLAIN_SGD)
    learner.auxiliary.double()
    parts = [[layers[0], learner.auxiliary["0"]], [layers[1], learner.auxiliary["1"]], [layers[2], model[3]]]
    h, wanted, expected = x, None, {}
    for block, head in parts:
        h_in = h.detach().requires_grad_()
        h = block(h_in)
        per_sample = F.cross_entropy(head(h), y, reduction="none")
        total = per_sample.mean()
        (sent,) = torch.autograd.grad(per_sample.sum(), h, retain_graph=True)
        if wanted is not None:
            (own,) = torch.autograd.grad(per_sample.sum(), h_in, create_graph=True)
            cosine = (own * wanted).sum(1) / (own.norm(dim=1) * wanted.norm(dim=1))
            total = total + 0.7 * ((1 - cosine) if distance == "cosine" else (own - wanted).square().sum(1)).mean()
        weights = [*block.parameters(), *head.parameters()]
        for p, gradient in zip(weights, torch.autograd.grad(total, weights), strict=True):
            expected[p] = p.detach() - 0.1 * gradient
        wanted = sent
    learner.step(x, y)
    assert len(expected) == len(list(learner.named_parameters()))
    for p, after in expected.items():
        assert torch.allclose(p, after, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "vgg"])
def test_reconciliation_without_weight_is_local_ce(kind):
    rule = create_rule("gradient_reconciliation", weight=0.0, group=2)
    a, b = (trained(net(kind), r, batches(3)) for r in (rule, create_rule("local_ce", group=2)))
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


def test_reconciliation_makes_the_gradients_agree():
    x, y = problem()
    told = {}
    for weight in (0.0, 1.0):
        rule = create_rule("gradient_reconciliation", weight=weight, distance="cosine")
        learner = Learner(net("mlp", activation="tanh"), rule, lr=0.01)
        told[weight] = [learner.step(x, y).read()["block2/disagreement"] for _ in range(30)]
    assert told[1.0][-1] < 0.7 * told[0.0][-1]


def test_token_numbers_need_no_gradient():
    language = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES))
    learner = Learner(language, "gradient_reconciliation")
    metrics = learner.step(torch.randint(5, (2, 3)), torch.randint(CLASSES, (2, 3))).read()
    assert "1/disagreement" in metrics and "0/disagreement" not in metrics


# --- Counter-Current Learning


def test_counter_current_moves_block_and_feedback_by_the_closed_form():
    """With S = A B^T and E = 2 c (S - e_y): dW = E B x^T and db = E^T A, for linear blocks; c = 256 s / (D B K)."""
    model, (x, y) = linear_blocks(), vectors()
    learner = Learner(model, create_rule("counter_current", scale=0.25), example=x, **PLAIN_SGD)
    learner.auxiliary.double()
    forward = [model[i].weight.detach().clone() for i in range(3)]
    back = [learner.auxiliary[str(i)].layer.weight.detach().clone() for i in range(3)]
    assert [tuple(w.shape) for w in back] == [(5, 5), (5, 5), (5, CLASSES)]
    inward = [None, None, torch.eye(CLASSES).double()]
    for level in (1, 0):
        inward[level] = F.elu(inward[level + 1] @ back[level + 1].T)
    learner.step(x, y)
    a = x
    for level in range(3):
        a_in, a = a, a @ forward[level].T
        linear = inward[level] @ back[level].T
        b = F.elu(linear)
        error = 2 * 256 * 0.25 / 5 * (a @ b.T - F.one_hot(y, CLASSES)) / (len(y) * CLASSES)
        slope = torch.where(linear > 0, torch.ones_like(linear), linear.exp())
        after = learner.auxiliary[str(level)].layer.weight
        assert torch.allclose(model[level].weight, forward[level] - 0.1 * (error @ b).T @ a_in, atol=1e-5)
        assert torch.allclose(after, back[level] - 0.1 * (slope * (error.T @ a)).T @ inward[level], atol=1e-5)


@pytest.mark.parametrize(("kind", "decorrelation"), [("vgg", 0.5), ("vgg", 0.0), ("vit", 0.5)])
def test_counter_current_on_maps_and_tokens_is_its_formula(kind, decorrelation):
    learner = trained(net(kind), create_rule("counter_current", decorrelation=decorrelation), [(X, Y)])
    told, model, shapes = learner.evaluate(X, Y).read(), learner.network.model.eval(), []
    with torch.no_grad():
        b, feedback = torch.eye(CLASSES), {}
        for level in (2, 1, 0):
            b = feedback[level] = learner.auxiliary[str(level)](b)
        h = X
        for level, name in enumerate(model.block_names):
            h = model.get_submodule(name)(h)
            assert feedback[level].shape == (CLASSES, *h.shape[1:])
            shapes.append(tuple(h.shape[1:]))
            a, b = (
                t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (h, feedback[level])
            )
            expected = (a @ b.T - F.one_hot(Y, CLASSES)).square().mean()
            if kind == "vgg":
                for t in (a, b):
                    expected = expected + decorrelation * (t @ t.T - torch.eye(len(t))).square().mean()
            assert told[f"{name}/loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert learner.groups[0].units[0].site.shapes == (*shapes, (CLASSES,))


def test_between_unlike_shapes_the_feedback_is_one_linear_layer():
    layer = Feedback((6,), (3, 2, 2))
    assert layer(torch.randn(CLASSES, 6)).shape == (CLASSES, 3, 2, 2)
    assert [p.shape for p in layer.parameters()] == [(12, 6)]
    up = Feedback((5, 2, 2), (3, 4, 6))
    assert up(torch.randn(CLASSES, 5, 2, 2)).shape == (CLASSES, 3, 4, 6)


ILLEGAL = [
    ("counter_current", {"scale": 0.0}),
    ("counter_current", {"decorrelation": -0.5}),
    ("gradient_reconciliation", {"weight": -1.0}),
    ("gradient_reconciliation", {"distance": "l1"}),
    ("interlocking", {"n": 0}),
    ("dgl", {"network": "conv"}),
    ("predsim", {"beta": 1.5}),
    ("predsim", {"loss": "both"}),
    ("predsim", {"group": 0}),
    ("mono_forward", {"predictor": "first"}),
    ("mono_forward", {"group": 0}),
]


@pytest.mark.parametrize(("rule", "option"), ILLEGAL, ids=str)
def test_an_illegal_value_is_refused_before_training(rule, option):
    (value,) = option.values()
    with pytest.raises(LayerwiseError, match=str(value)):
        Learner(net("mlp"), create_rule(rule, **option), example=X)
