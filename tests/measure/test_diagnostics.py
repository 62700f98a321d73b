"""Diagnostics against closed forms."""

import base64
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.nets import batches, by_family, net, problem, same_bits, tensors

from layerwise import LayerwiseError, Learner, rules
from layerwise.core import functional
from layerwise.measure import diagnostics as dx


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Linear CKA


@pytest.mark.parametrize(("samples", "width"), [(50, 6), (6, 20)], ids=["tall", "wide"])
def test_cka_is_blind_to_rotation_scale_and_shift_and_to_nothing_else(samples, width):
    x = draw(samples, width)
    rotation = torch.linalg.qr(draw(width, width, seed=1))[0]
    assert dx.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    stretched = x * torch.linspace(0.1, 3, width, dtype=torch.float64)
    assert dx.linear_cka(x, stretched) < 0.999


def test_cka_of_uncorrelated_features_is_zero():
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert dx.linear_cka(x, y) == pytest.approx(0, abs=1e-12)


def test_cka_of_single_features_is_their_squared_correlation():
    x, y = draw(30, 1), draw(30, 1, seed=1)
    assert dx.linear_cka(x, y) == pytest.approx(float(torch.corrcoef(torch.cat([x, y], 1).T)[0, 1]) ** 2)


def test_cka_of_orthogonal_parts():
    """Of orthonormal centred columns, Y holds k out of the d of X: CKA = k / (sqrt(d) sqrt(k)) = sqrt(k/d)."""
    x = draw(40, 4)
    x = torch.linalg.qr(x - x.mean(0))[0]
    assert dx.linear_cka(x, x[:, :1]) == pytest.approx(math.sqrt(1 / 4))


def test_cka_does_not_depend_on_which_gram_matrix_is_smaller():
    x, y = draw(12, 9), draw(12, 30, seed=1)
    centred = [t - t.mean(0) for t in (x, y)]
    a, b = (t @ t.T for t in centred)
    assert dx.linear_cka(x, y) == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    assert dx.linear_cka(x, y[:, :5]) == pytest.approx(dx.linear_cka(y[:, :5], x))


def test_cka_of_a_constant_is_nan():
    assert math.isnan(dx.linear_cka(draw(5, 2), torch.ones(5, 2)))


# Sparsity, dead units, Bhattacharyya


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 50), st.data())
def test_hoyer_of_k_equal_entries(width, data):
    """k entries of one size: l1/l2 = sqrt(k)."""
    k = data.draw(st.integers(1, width))
    h = torch.zeros(1, width)
    h[0, :k] = -2.5
    wanted = (math.sqrt(width) - math.sqrt(k)) / (math.sqrt(width) - 1)
    assert dx.hoyer_sparsity(h) == pytest.approx(wanted, abs=1e-6)


def test_hoyer_leaves_zero_rows_out():
    h = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert dx.hoyer_sparsity(h) == pytest.approx(0.5)
    assert math.isnan(dx.hoyer_sparsity(torch.zeros(3, 4)))


def test_dead_units_are_counted_per_unit():
    h = draw(8, 5)
    h[:, 1] = 0
    h[:, 3] = 2.5
    assert dx.dead_units(h) == pytest.approx(2 / 5)
    images = draw(4, 3, 2, 2)
    images[:, 0] = 1.0
    images[0, 1] = 1.0  # one sample only: alive
    assert dx.dead_units(images) == pytest.approx(1 / 3)
    tokens = draw(4, 6, 8)
    tokens[..., 2:4] = 0
    assert dx.dead_units(tokens) == pytest.approx(2 / 8)


def test_bhattacharyya_coefficient_is_a_cosine_of_roots():
    p, q = draw(7, 5).softmax(1), draw(7, 5, seed=1).softmax(1)
    wanted = (p.sqrt() * q.sqrt()).sum(1).mean()
    assert dx.bhattacharyya(p.log(), q.log()) == pytest.approx(float(wanted))
    assert dx.bhattacharyya(p.log(), p.log()) == pytest.approx(1)
    apart = torch.eye(2).log().clamp_min(-1e4)
    assert dx.bhattacharyya(apart[:1], apart[1:]) == pytest.approx(0, abs=1e-12)


# Probes


def test_a_probe_reads_what_is_linear_and_not_what_is_not():
    x = draw(400, 2)
    side, ring = (x[:, 0] > 0).long(), (x.norm(dim=1) > x.norm(dim=1).median()).long()
    assert dx.LinearProbe(x, side).accuracy(x, side) > 0.98
    assert dx.LinearProbe(x, ring).accuracy(x, ring) < 0.65


def test_a_probe_is_at_the_optimum_of_its_loss():
    """Gradient of the penalised log-likelihood at the fit, from its own formula: X^T (p - y) + w = 0 (C = 1)."""
    x, y = draw(60, 3), (torch.arange(60) * 7) % 3
    probe = dx.LinearProbe(x, y)
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    error = probe.log_posterior(x).exp() - torch.nn.functional.one_hot(y, 3)
    weights = torch.from_numpy(probe.fit.coef_).T
    assert (scaled.T @ error + weights).abs().max() < 0.02
    assert error.sum(0).abs().max() < 0.02  # the bias is not penalised


def test_a_probe_does_not_care_for_scale_nor_for_dead_units():
    x, y = draw(50, 3), torch.arange(50) % 2
    moved = torch.cat([1000 * x + 5, torch.ones(50, 1)], 1)
    a, b = (dx.LinearProbe(t, y).log_posterior(t) for t in (x, moved))
    assert torch.allclose(a, b, atol=1e-3)


# Gradients


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_backprop_is_aligned_with_itself(kind):
    learner = Learner(net(kind), "backprop")
    cosines = dx.gradient_cosines(learner, *problem())
    assert list(cosines) == [*learner.network.model.block_names, "head"]
    assert all(value == pytest.approx(1) for value in cosines.values())


def test_the_gradient_of_backprop_is_autograds():
    model, (x, y) = net(), problem()
    found = dx.gradients(Learner(model, "backprop"), x, y)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), wanted, strict=True):
        assert torch.equal(found[name], gradient)


def test_local_gradients_are_the_rules_own():
    """The last block of local_ce, joined with the head, has backprop's gradient; the first has its own head's."""
    learner = Learner(net(), "local_ce")
    (x, y), *_ = batches(1)
    learner.step(x, y)
    cosines = dx.gradient_cosines(learner, x, y)
    assert cosines["block3"] == pytest.approx(1)
    assert cosines["head"] == pytest.approx(1)
    assert -1 <= cosines["block1"] < 0.9999
    head, first = learner.auxiliary["0"], learner.network.blocks[0]
    h = first(x)
    loss = torch.nn.functional.cross_entropy(head(functional.pool_features(h, "mean")), y)
    wanted = torch.autograd.grad(loss, first.parameters())
    found = dx.gradients(learner, x, y)
    names = {id(p): name for name, p in learner.named_parameters()}
    for parameter, gradient in zip(first.parameters(), wanted, strict=True):
        assert torch.allclose(found[names[id(parameter)]], gradient, atol=1e-7)


def test_a_block_that_does_not_learn_has_no_angle():
    cosines = dx.gradient_cosines(Learner(net(), "last_layer"), *problem())
    assert cosines.pop("head") == pytest.approx(1)
    assert set(cosines.values()) == {None}


@pytest.mark.parametrize("rule", ["sll", "local_ce"])
def test_looking_changes_nothing(rule):
    learner = Learner(net("vgg"), rule)
    x, y = problem()
    learner.step(x, y)
    learner.network.train()
    before, states = tensors(learner.network), {k: v["step"].clone() for k, v in learner.optimizer_states().items()}
    dx.gradient_cosines(learner, x, y)
    dx.features(learner, [x])
    assert same_bits(before, tensors(learner.network))
    assert learner.network.model.training
    assert learner.steps == 1
    assert states == {k: v["step"] for k, v in learner.optimizer_states().items()}
    assert all(p.grad is None for _, p in learner.named_parameters())


@pytest.mark.parametrize("rule", by_family(name for name in rules.names() if not rules.get(name).models))
def test_every_rule_has_its_angles(rule):
    """After a step: the cosines are finite or None, and the table of layers is whole."""
    learner = Learner(net(), rule)
    x, y = problem()
    learner.step(x, y)
    cosines = dx.gradient_cosines(learner, x, y)
    assert list(cosines) == ["block1", "block2", "block3", "head"]
    assert any(value is not None for value in cosines.values())
    assert all(value is None or -1.000001 <= value <= 1.000001 for value in cosines.values())


# All layers


def test_features_are_the_blocks_outputs():
    learner, (x, _) = Learner(net()), problem()
    found = dx.features(learner, [x[:40], x[40:]])
    h = x
    for block in learner.network.blocks:
        h = block(h)
        assert torch.allclose(found[block.name], h)


def test_the_table_of_two_layers_with_the_same_features():
    x, y = problem(120)
    h = x.flatten(1)
    table = dx.layer_table({"a": h, "b": h}, y, {"a": h, "b": -2 * h}, y)
    assert table["a"]["cka"] == pytest.approx(1)
    assert table["a"]["hoyer"] == pytest.approx(table["b"]["hoyer"])
    assert table["a"]["probe_accuracy"] == 1
    assert table["b"]["probe_accuracy"] < 0.5  # the probe of h, on -2h
    assert (table["b"]["cka"], table["b"]["bhattacharyya"]) == (None, None)
    assert table["a"]["bhattacharyya"] < 0.5


def test_a_run_is_diagnosed(comparison):
    found = json.loads((comparison / "runs/sll/seed0/diagnostics.json").read_text())
    assert found["samples"] == 359
    counts, found = found["confusion"], found["blocks"]
    assert list(found) == list(counts) == ["block1", "block2"]
    for block, row in found.items():
        assert sum(map(sum, counts[block])) == 359
        assert sum(counts[block][i][i] for i in range(10)) == pytest.approx(359 * row["probe_accuracy"])
        assert 0.2 < row["probe_accuracy"] <= 1
        assert 0 < row["cka_to_backprop"] <= 1
        assert -1 <= row["gradient_cosine"] <= 1
    filters = json.loads((comparison / "runs/sll/seed0/diagnostics.json").read_text())["filters"]
    weight = load_file(comparison / "runs/sll/seed0/model.safetensors")["block1.linear.weight"]
    rows = weight[weight.norm(dim=1).argsort(descending=True)[:24]]
    assert filters["shape"] == [1, 8, 8]
    for text, row in zip(filters["pixels"], rows, strict=True):
        pixels = torch.tensor(list(base64.b64decode(text)))
        assert torch.allclose((pixels - 128) / 127, row / row.abs().max(), atol=0.5 / 127)
    twin = json.loads((comparison / "runs/backprop/seed0/diagnostics.json").read_text())["blocks"]
    for row in twin.values():
        assert row["gradient_cosine"] == pytest.approx(1)
        assert row["cka_to_backprop"] == pytest.approx(1)


BAD = [
    (lambda x: dx.linear_cka(x, x[:-1]), "x has 6 rows and y 5"),
    (lambda x: dx.linear_cka(x[0], x), "x has shape (3,)"),
    (lambda x: dx.linear_cka("words", x), "x is not a table of numbers"),
    (lambda x: dx.hoyer_sparsity(x[:, :1]), "h has one column"),
    (lambda x: dx.hoyer_sparsity(x[:0]), "h has shape (0, 3)"),
    (lambda x: dx.dead_units(x[0]), "h has shape (3,)"),
    (lambda x: dx.bhattacharyya(x, x[:, :2]), "log_p has shape (6, 3) and log_q (6, 2)"),
    (lambda x: dx.LinearProbe(x, [0] * 6), "all labels are the same"),
    (lambda x: dx.LinearProbe(x, [0, 1]), "give a class number for each of the 6 rows"),
    (lambda x: dx.LinearProbe(x, [0, 1] * 3).confusion(x, [0, -1] * 3), "number the classes from 0"),
    (lambda x: dx.LinearProbe(x, [0, 1] * 3).accuracy(x[:, :2], [0, 1] * 3), "x has 2 columns and the probe 3"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_wrong_tables_are_one_sentence(call, sentence):
    with pytest.raises(LayerwiseError) as raised:
        call(torch.arange(18.0).reshape(6, 3).square())
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_arrays_and_lists_are_taken_like_tensors():
    x = torch.arange(18.0).reshape(6, 3).square()
    for form in (x.numpy(), x.tolist(), x.numpy().astype(int), x.clone().requires_grad_()):
        assert dx.linear_cka(form, x) == pytest.approx(1)
        assert dx.hoyer_sparsity(form) == pytest.approx(dx.hoyer_sparsity(x))
        assert dx.dead_units(form) == 0
        assert dx.LinearProbe(form, [0, 0, 0, 1, 1, 1]).accuracy(form, [0, 0, 0, 1, 1, 1]) == 1
