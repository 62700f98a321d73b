"""Stationary state feedback against loops over time, and where it is backpropagation through time."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, PLAIN_SGD, net, problem, trained
from torch import nn

from layerwise import LayerwiseError, Learner, Partition, create_rule, models
from layerwise.rules.stationary_feedback import reverse_scan, scan

X, Y = problem(8)
KINDS = ("rnn", "gru", "lstm")


def gradients(model, rule, x=X, y=Y, **options):
    """The gradients of one step, by name, from what SGD with the rate 1 does."""
    learner = Learner(copy.deepcopy(model), rule, **{**PLAIN_SGD, "lr": 1.0}, example=x, **options)
    before = {name: p.detach().clone() for name, p in learner.network.named_parameters()}
    learner.step(x, y)
    return {name: before[name] - p.detach() for name, p in learner.network.named_parameters()}


def by_autograd(model, loss):
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))


def wide_net(kind, **options):
    return net(kind, depth=2, **options).double()


# --- The scans


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_the_scans_are_the_loops_over_time(length):
    g, f = torch.randn(3, length, 4).double(), torch.rand(3, length, 4).double()
    a, first = torch.tensor([-0.9, 0.0, 0.5, 1.0]).double(), torch.randn(3, 1, 4).double()
    back, onward = [torch.zeros(3, 4).double()], [first[:, 0]]
    for t in reversed(range(length)):
        back.append(g[:, t] + a * back[-1])
    for t in range(length):
        onward.append(f[:, t] * onward[-1] + g[:, t])
    torch.testing.assert_close(reverse_scan(g, a), torch.stack(back[:0:-1], 1))
    torch.testing.assert_close(scan(g, f, first), torch.stack(onward[1:], 1))


def test_a_long_sequence_neither_overflows_nor_loses_what_is_near():
    """The sum of a geometric series, where a^T underflows and a^-T would overflow."""
    a = torch.tensor([1e-4, 0.5, 0.999])
    delta = reverse_scan(torch.ones(1, 5000, 3), a)
    left = torch.arange(5000, 0, -1)[:, None].double()
    torch.testing.assert_close(delta[0].double(), (1 - a.double() ** left) / (1 - a.double()), rtol=1e-4, atol=0)


# --- Where it is backpropagation through time


def truncated(kind, layer, x):
    """All states of a layer, step by step; no gradient reaches the step before."""
    cell = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](x.shape[-1], layer.hidden_size).double()
    weights = {name.removesuffix("_l0"): p for name, p in layer.named_parameters()}
    state, found = None, []
    for t in range(x.shape[1]):
        state = torch.func.functional_call(cell, weights, (x[:, t], state))
        found.append(state[0] if kind == "lstm" else state)
        state = tuple(s.detach() for s in state) if kind == "lstm" else state.detach()
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_it_is_backpropagation_truncated_to_one_step(kind):
    model = wide_net(kind)
    h = X.double()[:, 0]
    for block in (model.block1, model.block2):
        h = truncated(kind, block.states.layer, h)
    expected = by_autograd(model, F.cross_entropy(model.head(h), Y))
    found = gradients(model, create_rule("stationary_feedback", decay=0.0), X.double())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    full = gradients(model, "backprop", X.double())
    assert not torch.allclose(full["block1.states.layer.weight_hh_l0"], found["block1.states.layer.weight_hh_l0"])


@torch.no_grad()
def with_linear_recurrence(kind, diagonal):
    """A network whose state at a step depends on that before through a constant diagonal matrix and in no other way."""
    model = wide_net(kind, **({"activation": "relu"} if kind == "rnn" else {}))
    n = len(diagonal)
    for layer in (model.block1.states.layer, model.block2.states.layer):
        layer.weight_hh_l0.zero_()
        if kind == "rnn":  # everything is positive, where a ReLU is linear
            for p in layer.parameters():
                p.abs_()
            layer.weight_hh_l0.copy_(torch.diag(diagonal))
        else:  # the update gate and the forget gate are constants
            rows = slice(n, 2 * n)
            layer.weight_ih_l0[rows] = 0
            layer.bias_hh_l0[rows] = 0
            layer.bias_ih_l0[rows] = torch.logit(diagonal)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_matrix_of_a_linear_recurrence_it_is_full_backpropagation_through_time(kind):
    model = with_linear_recurrence(kind, torch.linspace(0.3, 0.6, 12).double())
    x = X.double().abs()
    found = gradients(model, create_rule("stationary_feedback", decay=0.6, spread=0.5), x)
    expected = gradients(model, "backprop", x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    other = gradients(model, create_rule("stationary_feedback", decay=0.6), x)
    assert not torch.allclose(other["block1.states.layer.weight_ih_l0"], expected["block1.states.layer.weight_ih_l0"])


def test_weights_of_a_simple_layer_get_the_sum_over_steps_of_the_definition():
    model, a = net("rnn", depth=1).double(), 0.8
    layer, x = model.block1.states.layer, X.double()[:, 0]
    states = layer(x)[0].detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model.head(states), Y), states)
    expected, delta = torch.zeros(12, 12).double(), torch.zeros(8, 12).double()
    for t in reversed(range(8)):
        delta = g[:, t] + a * delta
        before = states[:, t - 1] if t else torch.zeros(8, 12).double()
        expected += ((1 - states[:, t] ** 2) * delta).T @ before
    found = gradients(model, create_rule("stationary_feedback", decay=a), X.double())
    torch.testing.assert_close(found["block1.states.layer.weight_hh_l0"], expected.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_computes_what_it_computes_without_the_rule(kind):
    model = net(kind)
    first = [
        Learner(copy.deepcopy(model), rule, example=X).step(X, Y).loss for rule in ("stationary_feedback", "backprop")
    ]
    assert torch.equal(*first)


# --- Networks of one's own


class Own(nn.Module):
    """The last states of a recurrent layer that starts from learned ones, in either order of its dimensions."""

    def __init__(self, kind, batch_first, bias):
        super().__init__()
        self.layer = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind](8, 6, batch_first=batch_first, bias=bias)
        self.first = nn.Parameter(torch.randn(2, 1, 6))

    def forward(self, x):
        x = x[:, 0] if self.layer.batch_first else x[:, 0].transpose(0, 1)
        h, c = self.first.expand(-1, len(x) if self.layer.batch_first else x.shape[1], -1).unsqueeze(1).contiguous()
        if not isinstance(self.layer, nn.LSTM):
            return self.layer(x, h)[1][0]
        _, (h, c) = self.layer(x, hx=(h, c))
        return torch.cat([h[0], c[0]], -1)


def own(kind, batch_first=True, bias=True, width=6):
    torch.manual_seed(0)
    model = nn.Sequential(Own(kind, batch_first, bias), nn.Linear(12 if kind == "lstm" else 6, CLASSES)).double()
    return Partition(model, ["0"])


@pytest.mark.parametrize(
    ("kind", "batch_first", "bias"), [*itertools.product(KINDS, (True, False), (True,)), ("gru", True, False)]
)
def test_initial_and_last_states_have_their_gradients(kind, batch_first, bias):
    """One step, so that there is nothing to go back through: backprop."""
    x = X.double()[:, :, :1]
    found, expected = (gradients(own(kind, batch_first, bias), rule, x) for rule in ("stationary_feedback", "backprop"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_dimensions_does_not_matter(kind):
    found, expected = (gradients(own(kind, order), "stationary_feedback", X.double()) for order in (False, True))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(8, 6, batch_first=True)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[2])
        return self.layer(nn.utils.rnn.pack_padded_sequence(x[:, 0], lengths, batch_first=True))[1][0]


class Holding(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[:, 0])[0][:, -1]


def of(part, width=6):
    return Partition(nn.Sequential(part, nn.Linear(width, CLASSES)), ["0"])


WRONG = [
    (lambda: net("mlp"), "finds no recurrent layer (nn.RNN, nn.GRU, nn.LSTM) in the network; choose the model rnn"),
    (lambda: of(Holding(nn.GRU(8, 6, 2, batch_first=True))), "cannot separate the recurrences of GRU(8, 6, num_"),
    (lambda: of(Holding(nn.LSTM(8, 6, batch_first=True, bidirectional=True)), 12), "one layer, one direction"),
    (lambda: of(Packed()), "pad them instead of packing them"),
]


@pytest.mark.parametrize(("model", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_what_it_cannot_train_is_refused_in_one_sentence(model, sentence):
    with pytest.raises(LayerwiseError) as caught:
        Learner(model(), "stationary_feedback", example=X).step(X, Y)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_compiled_blocks_are_refused():
    learner = Learner(net("gru"), "stationary_feedback", example=X)
    learner.network.blocks[0].compiled = True
    with pytest.raises(LayerwiseError, match="is compiled, so the rule cannot access its recurrent layers"):
        learner.step(X, Y)


def test_a_layer_that_fails_leaves_gradients_on():
    learner = Learner(net("gru"), "stationary_feedback", example=X)
    with pytest.raises(LayerwiseError, match="cannot run its input"):
        learner.step(X[..., :5], Y)
    assert torch.is_grad_enabled()
    learner.step(X, Y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_in_bfloat16_and_on_text(kind):
    if kind != "lstm":  # torch has no LSTM in bfloat16 on every processor
        trained(net(kind), "stationary_feedback", [(X, Y)], precision="bf16")
    model = models.create(kind, (1, 1, 6), 5, depth=2, width=16, sequence="tokens")
    start = torch.arange(20)[:, None]
    x, y = (start + torch.arange(6)) % 5, (start + torch.arange(1, 7)) % 5
    learner = Learner(model, "stationary_feedback", lr=1e-2, task="language_model", example=x)
    losses = [float(learner.step(x, y).loss) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
