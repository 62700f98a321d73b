"""The loss in chunks equals torch's own loss, and the logits of all positions never exist at once."""

import pytest
import torch
import torch.nn.functional as F
from support.nets import PLAIN_SGD
from torch import nn

from layerwise import LanguageModel, Learner, models, rules
from layerwise.core.chunked import Aligned, LinearOutputs, objective
from layerwise.core.posteriors import Categorical, divergence
from layerwise.memory.meter import measure_memory

V, D, T = 37, 8, 11


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape):
    y = torch.randint(V, shape, generator=torch.Generator().manual_seed(5))
    y[..., ::4] = -100
    return y


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_gradients_and_hits_are_torchs(chunk, smoothing, weighted, bias):
    x, weight = drawn(4, T, D).requires_grad_(), drawn(V, D, seed=1).requires_grad_()
    shift = drawn(V, seed=2).requires_grad_() if bias else None
    weights = drawn(V, seed=3).abs() if weighted else None
    y = labels(4, T)
    leaves = [t for t in (x, weight, shift) if t is not None]
    plain = F.linear(x, weight, shift).flatten(0, 1)
    wanted = F.cross_entropy(plain, y.flatten(), weights, label_smoothing=smoothing)
    loss, _, _, nats, right = objective(LinearOutputs(x, weight, shift), y, weights, smoothing, chunk=chunk)
    torch.testing.assert_close(nats, F.cross_entropy(plain, y.flatten(), reduction="sum"), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    assert int(right) == int((plain.argmax(-1) == y.flatten()).sum())
    found, asked = torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * wanted, leaves)
    torch.testing.assert_close(found, asked, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("surrogate", ["neg_log_bc", "one_minus_bc", "hellinger", "kl"])
@pytest.mark.parametrize("plain", [True, False])
def test_the_divergence_of_a_neighbour_has_the_gradient_of_the_posteriors(surrogate, plain):
    x, weight = drawn(4, T, D).requires_grad_(), drawn(V, D, seed=1).requires_grad_()
    u, matrix, shift = drawn(4, T, D, seed=6), drawn(V, D, seed=7), drawn(V, seed=8)
    smoothing, weights = (0.0, None) if plain else (0.2, drawn(V, seed=3).abs())
    y = labels(4, T)
    z, before = F.linear(x, weight), F.linear(u, matrix, shift)
    own = (y != -100) * (torch.ones(()) if weights is None else weights[y.clamp_min(0)])
    each = divergence(surrogate, Categorical(before.log_softmax(-1)), Categorical(z.log_softmax(-1)))
    likelihood = F.cross_entropy(z.flatten(0, 1), y.flatten(), weights, label_smoothing=smoothing)
    apart = (own * each).sum() / own.sum()
    aligned = Aligned(LinearOutputs(u, matrix, shift), surrogate, 0.7)
    found = objective(LinearOutputs(x, weight), y, weights, smoothing, -100, 5, 0.4, aligned)
    wanted = 0.4 * likelihood + 0.7 * apart
    torch.testing.assert_close(found[:3], (wanted, likelihood, apart), atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(3 * found[0], (x, weight)), torch.autograd.grad(3 * wanted, (x, weight))
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=1e-4)


def test_a_neighbour_that_says_the_same_pulls_nowhere():
    x, weight = drawn(6, D).requires_grad_(), drawn(V, D)
    for surrogate in ("neg_log_bc", "one_minus_bc", "hellinger", "kl"):
        aligned = Aligned(LinearOutputs(x, weight), surrogate, 1.0)
        found, _, apart, *_ = objective(LinearOutputs(x, weight), labels(6), None, 0.0, -100, 4, 0.0, aligned)
        assert abs(float(apart)) < 4e-4  # the Hellinger distance is cut off at the root of 1e-7
        assert float(torch.autograd.grad(found, x)[0].abs().max()) < 1e-6


def test_a_matrix_that_does_not_learn_has_no_gradient_and_a_second_backward_pass_is_refused():
    x, weight = drawn(6, D).requires_grad_(), drawn(V, D)
    loss, _, _, nats, right = objective(LinearOutputs(x, weight), labels(6), chunk=2)
    assert not nats.requires_grad and not right.requires_grad
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    with torch.no_grad():
        assert not objective(LinearOutputs(x, weight), labels(6), chunk=2)[0].requires_grad


def test_under_autocast_it_is_as_near_as_bf16():
    x, weight = drawn(64, D).requires_grad_(), drawn(V, D, seed=1).requires_grad_()
    y = labels(64)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.cross_entropy(F.linear(x, weight).float(), y)
        loss, *_ = objective(LinearOutputs(x, weight), y, chunk=7)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    found, asked = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(wanted, (x, weight))
    torch.testing.assert_close(found, asked, atol=2e-3, rtol=2e-2)


@pytest.mark.slow
def test_the_peak_does_not_grow_with_positions_times_vocabulary():
    def peak(positions, vocabulary):
        x, weight = drawn(positions, D).requires_grad_(), drawn(vocabulary, D).requires_grad_()
        y = torch.zeros(positions, dtype=torch.int64)

        def step():
            objective(LinearOutputs(x, weight), y, chunk=2**12 // vocabulary)[0].backward()

        return measure_memory(step, parameters=[x, weight], inputs=[y]).activations

    logits = 4 * 2**12  # bytes of a chunk
    for positions, vocabulary in ((512, 512), (2048, 512), (2048, 2048)):
        whole = 4 * positions * vocabulary
        # Three of a chunk at most, the gradients, and what there is per position.
        allowed = 3 * logits + 2 * 4 * (positions + vocabulary) * D + 64 * positions + 8 * vocabulary + 4096
        assert peak(positions, vocabulary) < allowed
        assert allowed < whole / 2 or positions == 512


# --- Through the learner


def decoder(**options):
    torch.manual_seed(0)
    return models.create("gpt", (1, 1, T), V, depth=3, **{"width": 12, "heads": 2, **options})


def after_three_steps(rule, task, make=decoder, **options):
    model = make()
    learner = Learner(model, rule, task=task, optimizer="sgd", lr=0.5, **options)
    for step in range(3):
        x = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(step))
        metrics = learner.step(x, labels(4, T)).read()
    return learner, metrics, learner.evaluate(x, labels(4, T)).read()


@pytest.mark.parametrize("rule", ["backprop", "backprop_checkpoint", "local_ce", "mono_forward", "last_layer"])
def test_a_learner_in_chunks_is_the_learner_without(rule):
    options = {"shift": False, "label_smoothing": 0.1, "weights": tuple(0.5 + i % 3 for i in range(V))}
    one, *wanted = after_three_steps(rule, LanguageModel(**options))
    other, *found = after_three_steps(rule, LanguageModel(positions_at_once=3, **options))
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), atol=2e-6, rtol=2e-5)
    for plain, chunked in zip(wanted, found, strict=True):
        assert chunked == pytest.approx(plain, abs=2e-6, rel=2e-6)


class Capped(nn.Module):
    """A model whose outputs are no longer those of its last linear layer."""

    def __init__(self, cap):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.head, self.cap = nn.Linear(D, V), cap

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        logits = self.head(x)
        return {"logits": self.cap * (logits / self.cap).tanh() if self.cap else logits}


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("rule", ["backprop", "local_ce"])
def test_what_a_model_does_to_its_logits_is_done(rule, cap):
    def make():
        torch.manual_seed(0)
        return Capped(cap)

    tasks = [LanguageModel(positions_at_once=n) for n in (None, 4)]
    pair = [after_three_steps(rule, task, make, cuts="layers.*") for task in tasks]
    (one, *wanted), (other, *found) = pair
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), atol=2e-6, rtol=2e-5)
    for plain, chunked in zip(wanted, found, strict=True):
        assert chunked == pytest.approx(plain, abs=2e-6, rel=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"readout": "shared"},
        {"readout": "random", "surrogate": "one_minus_bc", "weight": (0.5, 2.0), "likelihood_weight": 0.3},
        {"readout": "shared", "head": "separate", "neighbour": "before_previous", "surrogate": "kl"},
        {"readout": "random", "overlap": 1, "scale": 2.0, "surrogate": "one_minus_bc"},
        {"readout": "shared", "surrogate": "none", "group": 2},
    ],
    ids=str,
)
def test_sll_in_chunks_is_sll_without(options):
    rule = rules.create("sll", **options)
    one, *wanted = after_three_steps(rule, LanguageModel(shift=False, label_smoothing=0.1))
    other, *found = after_three_steps(rule, LanguageModel(shift=False, label_smoothing=0.1, positions_at_once=3))
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), atol=5e-5, rtol=1e-3)
    for plain, chunked in zip(wanted, found, strict=True):
        assert chunked == pytest.approx(plain, abs=1e-5, rel=1e-5)
    assert any(name.endswith("divergence") for name in wanted[0]) == (options.get("surrogate") != "none")


def test_sll_with_one_matrix_has_the_gradients_of_its_definition():
    x, y = torch.randint(V, (4, T)), labels(4, T)
    made = rules.create("sll", readout="shared")
    learner = Learner(decoder(), made, task=LanguageModel(shift=False), example=x, **PLAIN_SGD)
    network, task = learner.network, learner.task
    h, before, losses = x, None, []
    matrix = network.output_layer.weight.detach()
    for block in network.blocks:
        h = block(h.detach() if h.is_floating_point() else h)
        last = block is network.blocks[-1]
        v = network.head(h) if last else F.linear(F.layer_norm(h, h.shape[-1:]), matrix)
        q = v.log_softmax(-1)
        loss = task.loss(v, y)
        if before is not None:
            loss = loss + task.average(-torch.logsumexp(0.5 * (before.detach() + q), -1), y)
        losses.append(loss)
        before = q
    gradients = torch.autograd.grad(sum(losses), list(network.model.parameters()))
    wanted = {n: p.detach() - 0.1 * g for (n, p), g in zip(network.model.named_parameters(), gradients, strict=True)}
    learner.step(x, y)
    torch.testing.assert_close(dict(network.model.named_parameters()), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", ["backprop", "backprop_checkpoint", "local_ce", "sll"])
def test_a_step_and_an_evaluation_never_hold_all_logits(rule):
    """Forty times the logits of a chunk would be all of them."""
    vocabulary, positions = 2000, 8 * 40
    torch.manual_seed(0)
    model = models.create("gpt", (1, 1, 40), vocabulary, depth=2, width=8, heads=2)
    made = rules.create("sll", readout="shared") if rule == "sll" else rule
    learner = Learner(model, made, task=LanguageModel(shift=False, positions_at_once=8))
    x = torch.randint(vocabulary, (8, 40))
    learner.step(x, x)
    _, use = learner.measured_step(x, x)
    whole = 4 * positions * vocabulary
    assert use.activations + use.gradients < whole / 2
    assert measure_memory(lambda: learner.evaluate(x, x), inputs=learner.network.parameters()).peak < whole / 2
