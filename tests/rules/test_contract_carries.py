"""Other families of rules in a few lines each: the contract suffices for them, and the engine stays as it is."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, batches, net, problem, same_bits, trained
from torch import nn

from layerwise import LayerwiseError, Learner, Rule, Signal
from layerwise.core.layers import layer_gradients, seeing_layers
from layerwise.core.rule import cross_entropy_at_head


class Feedback(nn.Module):
    """A fixed random matrix from the classes to a block's output."""

    def __init__(self, classes, width):
        super().__init__()
        self.register_buffer("matrix", torch.randn(classes, width) / width**0.5)


def error(logits, y):
    """Gradient of the mean cross-entropy on the logits."""
    return (logits.softmax(-1) - F.one_hot(y, logits.shape[-1])) / len(y)


class DRTP(Rule):
    """Direct random target projection: a block is pushed along a fixed random image of its label."""

    name, locality, boundary, flat_memory = "drtp", "local", "activation", True
    source = "Frenkel et al. 2021"

    def auxiliary(self, site, h, task):
        return None if site.is_head else Feedback(task.classes, h[0].numel())

    def signal(self, at):
        if at.site.is_head:
            return cross_entropy_at_head(at)
        matrix = at.auxiliary.matrix
        pushed = F.one_hot(at.y, at.task.classes).to(matrix) @ matrix
        return Signal(cotangent=pushed.view_as(at.h) / len(at.y))


class DFA(DRTP):
    """Direct feedback alignment: a first pass gives the error, fixed matrices bring it to every block."""

    name, locality, boundary = "dfa", "broadcast", "activation and the error at the logits"
    source = "Nøkland 2016"

    def begin(self, start):
        return start.x, error(start.forward(start.x), start.y)

    def signal(self, at):
        if at.site.is_head:
            return cross_entropy_at_head(at)
        cotangent = (at.message @ at.auxiliary.matrix).view_as(at.h)
        return Signal(cotangent=cotangent, message=at.message)


@dataclass(frozen=True)
class ForwardForward(Rule):
    """Goodness of true and false labels written into the input; prediction asks for every label."""

    threshold: float = 1.0
    name, locality, boundary, flat_memory = "ff", "local", "normalised activation", True
    source = "Hinton 2022"

    @staticmethod
    def overlay(x, y):
        x = x.flatten(1).clone()
        x[:, :CLASSES] = 3.0 * F.one_hot(y, CLASSES)
        return x.view(len(x), 1, 8, 8)

    def trains(self, site):
        return not site.is_head

    def begin(self, start):
        wrong = (start.y + torch.randint(1, CLASSES, start.y.shape)) % CLASSES
        return torch.cat([self.overlay(start.x, start.y), self.overlay(start.x, wrong)]), None

    def signal(self, at):
        if at.site.is_head:
            return Signal()
        true, false = at.h.square().mean(-1).chunk(2)
        loss = F.softplus(self.threshold - true).mean() + F.softplus(false - self.threshold).mean()
        return Signal(loss=loss, output=F.layer_norm(at.h, at.h.shape[-1:]))

    def predict(self, network, auxiliary, x):
        def goodness(label):
            h, total = self.overlay(x, torch.full((len(x),), label)), 0.0
            for block in network.blocks:
                h = block(h)
                total = total + h.square().mean(-1)
                h = F.layer_norm(h, h.shape[-1:])
            return total

        return torch.stack([goodness(label) for label in range(CLASSES)], -1)


class Relaxation(Rule):
    """Predictive-coding-like: the output relaxes towards the label, every block predicts where it came to rest."""

    name, locality, boundary, flat_memory = "relaxation", "equilibrium", "activation, target", True
    source = "this test"
    steps, rate = 20, 0.5

    def auxiliary(self, site, h, task):
        return None if site.is_head else nn.Linear(h[0].numel(), task.classes)

    def begin(self, start):
        z = start.forward(start.x)
        for _ in range(self.steps):  # descent on the squared distances to the prediction and to the label
            z = z - self.rate * ((z - start.forward(start.x)) + (z - F.one_hot(start.y, CLASSES)))
        return start.x, z

    def signal(self, at):
        guess = at.h if at.site.is_head else at.auxiliary(at.h.flatten(1))
        loss = (guess - at.message).square().mean()
        return Signal(loss=loss, message=at.message, metrics={"accuracy": at.task.correct(guess, at.y)})


class Outer(DFA):
    """As DFA, without a graph: the rule makes the outer products of what reaches a layer and what the layer has got."""

    name, builds_graph = "outer", False

    def signal(self, at):
        calls, block = [], at.site.network.head if at.site.is_head else at.site.network.blocks[at.site.index]
        with seeing_layers(block, lambda layer, x, out: calls.append((layer, x, out))):
            at.run(at.h_in, at.message)
        layer, x, a = next(call for call in calls if isinstance(call[0], nn.Linear))
        if at.site.is_head:
            return replace(cross_entropy_at_head(at), gradients=layer_gradients(layer, x, error(at.h, at.y)))
        pushed = (at.message @ at.auxiliary.matrix) * (a > 0)
        return Signal(message=at.message, gradients=layer_gradients(layer, x, pushed))


FAMILIES = [DRTP(), DFA(), ForwardForward(), pytest.param(Relaxation(), marks=pytest.mark.slow), Outer()]
each = pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
DATA = batches(3)


@each
def test_it_trains_above_chance(rule):
    learner = Learner(net("mlp", depth=2, width=32), rule, lr=0.01)
    x, y = problem(64)
    for _ in range(60):
        learner.step(x, y)
    test_x, test_y = problem(64, seed=5)
    assert (learner(test_x).argmax(-1) == test_y).float().mean() > 2 / CLASSES


@each
def test_it_is_a_function_of_the_seed_and_leaves_no_gradient(rule):
    model = net("mlp", dropout=0.2)
    a, b = (trained(model, rule, DATA) for _ in range(2))
    assert same_bits(a, b)
    assert all(p.grad is None for _, p in a.named_parameters())


@each
def test_its_working_memory_is_flat_in_depth(rule):
    def working(depth):
        learner, (x, y) = Learner(net("mlp", depth=depth, width=64), rule), problem(32)
        learner.step(x, y)
        _, use = learner.measured_step(x, y)
        return use.activations + use.gradients

    assert working(16) <= 1.01 * working(4)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dfa_with_the_transposed_output_weights_is_backprop(dropout):
    """One hidden layer: the error comes from a first pass, which makes the same draws as the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, CLASSES))
    how = {"optimizer": torch.optim.SGD, "lr": 1.0, "weight_decay": 0.0}
    learner = Learner(model, DFA(), **how, example=DATA[0][0])
    expected = trained(model, "backprop", [], **how)
    for x, y in DATA:
        learner.auxiliary["0"].matrix.copy_(model[4].weight.detach())
        learner.step(x, y)
        expected.step(x, y)
        for a, b in zip(learner.network.parameters(), expected.network.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_drtp_moves_the_first_layer_by_its_closed_form():
    """dW = -lr mean over samples of (B^T y) x^T, for a linear first block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, CLASSES)).double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % CLASSES
    learner = Learner(model, DRTP(), lr=0.3, weight_decay=0.0, optimizer=torch.optim.SGD, example=x)
    before = model[0].weight.detach().clone()
    learner.auxiliary.double()
    learner.step(x, y)
    pushed = learner.auxiliary["0"].matrix[y]
    assert torch.allclose(model[0].weight, before - 0.3 * pushed.T @ x / 16)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip": 0.1}, {"micro": 2, "accumulate": 2}], ids=str)
def test_gradients_that_a_rule_computes_itself_are_used_as_those_of_the_backward_pass(options):
    found, expected = (trained(net("mlp"), rule, batches(4), **options) for rule in (Outer(), DFA()))
    for a, b in zip(found.network.parameters(), expected.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_rule_without_a_graph_saves_nothing_for_a_backward_pass():
    saved = []
    learner = Learner(net("mlp"), Outer())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        learner.step(*DATA[0])
        assert not saved
        Learner(net("mlp"), DFA()).step(*DATA[0])
        assert saved


def test_gradients_of_a_frozen_parameter_are_left_out_and_those_of_another_block_refused():
    class Foreign(Outer):
        def signal(self, at):
            other = at.site.network.head.parameters()[0]
            return replace(super().signal(at), gradients={other: torch.zeros_like(other)})

    learner, before = Learner(net("mlp"), Outer()), net("mlp")
    learner.network.model.block1.linear.bias.requires_grad_(False)
    learner.step(*DATA[0])
    frozen = learner.network.model.block1.linear
    assert torch.equal(frozen.bias, before.block1.linear.bias) and frozen.bias.grad is None
    assert not torch.equal(frozen.weight, before.block1.linear.weight)
    with pytest.raises(LayerwiseError, match="a parameter that is not there"):
        Learner(net("mlp"), Foreign()).step(*DATA[0])


def test_relaxation_rests_half_way_between_prediction_and_label():
    """The minimum of |z - f(x)|^2 + |z - y|^2 is their mean; rate 1/2 finds it in one step."""
    seen = []

    class Spy(Relaxation):
        def signal(self, at):
            seen.append(at.message)
            return super().signal(at)

    x, y = DATA[0]
    learner = Learner(net("mlp"), Spy(), example=x)
    halfway = (learner(x) + F.one_hot(y, CLASSES)) / 2
    learner.step(x, y)
    assert len(seen) == 4  # the same target at every block and at the head
    assert all(torch.allclose(target, halfway, atol=1e-5) for target in seen)


def test_a_rules_own_prediction_is_what_evaluation_reports():
    learner = Learner(net("mlp"), ForwardForward())
    x, y = problem(32)
    learner.step(x, y)
    share = (learner(x).argmax(-1) == y).float().mean().item()
    assert learner.evaluate(x, y).read()["head/accuracy"] == pytest.approx(share)
