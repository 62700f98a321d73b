"""Rules that relax states, or pass cotangents over one block at a time, before the update: in closed form."""

import copy
from itertools import pairwise

import pytest
import torch
from support.nets import CLASSES, KINDS, batches, net, problem, snapshot, trained
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule
from layerwise.core.runner import Runner
from layerwise.parallel.stage import check_can_pipeline
from layerwise.rules.hebbian_global import hebbian_updates
from layerwise.rules.synthetic_gradient import Synthesizer, SyntheticGradient

X, Y = batches(1)[0]
SETTLING = ("predictive_coding", "inference_learning", "highway_backprop", "equilibrium_propagation")


def double(kind="mlp", **options):
    return net(kind, **options).double()


def gradients(model, rule, x=X, y=Y, **options):
    """What a rule gives every parameter in the first step."""
    learner = Learner(copy.deepcopy(model), rule, optimizer=torch.optim.SGD, lr=1.0, weight_decay=0.0, **options)
    before = snapshot(learner)
    learner.step(x.to(next(model.parameters()).dtype), y)
    return {name: before[name] - p.detach() for name, p in learner.network.named_parameters()}


def distance(a, b):
    """Relative distance of two sets of gradients."""
    a, b = (torch.cat([g.flatten() for g in found.values()]) for found in (a, b))
    return float((a - b).norm() / b.norm())


# --- What is backprop


EXACT = [
    ("highway_backprop", {"k": 3, "gamma": 0.2}, (*KINDS, "resnet")),
    ("highway_backprop", {"k": 9, "gamma": 1.0}, ("mlp",)),
    ("predictive_coding", {"variant": "fixed_prediction", "rate": 1.0, "steps": 3}, (*KINDS, "resnet")),
    ("predictive_coding", {"variant": "fixed_prediction", "rate": 0.5, "steps": 60}, ("mlp",)),
]


@pytest.mark.parametrize(
    ("rule", "options", "kind"),
    [(rule, options, kind) for rule, options, kinds in EXACT for kind in kinds],
    ids=str,
)
def test_with_as_many_steps_as_blocks_it_is_backprop(rule, options, kind):
    model = double(kind, **({} if kind == "resnet" else {"dropout": 0.3}))
    assert distance(gradients(model, create_rule(rule, **options)), gradients(model, "backprop")) < 1e-5


def test_highway_backprop_reaches_one_block_more_with_every_step():
    model = double(depth=5)
    exact = gradients(model, "backprop")
    for k in range(5):
        found = gradients(model, create_rule("highway_backprop", k=k))
        right = [
            torch.allclose(found[f"block{i}.linear.weight"], exact[f"block{i}.linear.weight"]) for i in range(1, 6)
        ]
        assert right == [i >= 5 - k for i in range(1, 6)]


def test_without_steps_every_block_of_a_residual_net_gets_the_gradient_on_the_heads_input():
    """Linear blocks x + W x: with K = I and k = 0 block i gets dL/dh_L, so its gradient is that times its input."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return x + self.branch(x)

    torch.manual_seed(0)
    model = nn.Sequential(*[Residual() for _ in range(3)], nn.Linear(6, CLASSES)).double()
    x = torch.randn(16, 6, dtype=torch.float64)
    found = gradients(model, create_rule("highway_backprop", k=0, gamma=0.0), x)
    h = [x]
    for block in model[:3]:
        h.append(block(h[-1]).detach())
    top = h[-1].requires_grad_()
    nn.functional.cross_entropy(model[3](top), Y).backward()
    for i in range(3):
        assert torch.allclose(found[f"{i}.branch.weight"], top.grad.T @ h[i])


class Oracle(Synthesizer):
    """Says the true gradient: it runs the rest of the network."""

    def __init__(self, network, first):
        nn.Module.__init__(self)
        self.rest = [[*network.blocks, network.head], first]
        self.none = nn.Parameter(torch.zeros(()))

    def forward(self, h, y):
        blocks, first = self.rest
        with torch.enable_grad():
            leaf = out = h.detach().requires_grad_()
            for block in blocks[first:]:
                out = block(out)
            (true,) = torch.autograd.grad(nn.functional.cross_entropy(out, y, reduction="sum"), leaf)
        return true

    def miss(self, h, y, true):
        assert torch.allclose(self(h, y), true)
        return self.none.square()


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_gradients_without_error_are_backprop(kind):
    class Told(SyntheticGradient):
        def auxiliary(self, site, h, task):
            return Oracle(site.network, site.index) if site.index else None

    model = double(kind)
    assert distance(gradients(model, Told()), gradients(model, "backprop")) < 1e-6


@pytest.mark.slow
def test_a_module_that_has_seen_enough_predicts_the_gradient():
    """Blocks at rest (frozen): what the module misses of the true gradient gets small."""
    x, y = problem(64)
    learner = Learner(net().requires_grad_(False), create_rule("synthetic_gradient", hidden=64), lr=0.01)
    with pytest.warns(UserWarning, match="only the rule's own modules learn"):
        missed = [learner.step(x, y).read()["head/unexplained"] for _ in range(100)]
    assert missed[0] == pytest.approx(1.0) and missed[-1] < 0.05


# --- Predictive coding


def test_centred_nudging_has_an_error_of_second_order_in_beta():
    """After one step of inference more than the states need, F / beta tends to a limit: linearly, or quadratically."""
    model = double(activation="tanh")

    def errors(centred):
        found = [
            gradients(model, create_rule("predictive_coding", steps=4, beta=beta, centred=centred))
            for beta in (0.4, 0.2, 1e-4)
        ]
        return [distance(one, found[-1]) for one in found[:-1]]

    (wide, half), (wide_centred, half_centred) = errors(False), errors(True)
    assert 1.7 < wide / half < 2.3
    assert 3.4 < wide_centred / half_centred < 4.6


def test_the_energy_falls_in_every_step_of_inference():
    """Gradient descent on the states: the energy of the settled states is lower, the more steps there were."""
    model, energies = double(activation="tanh"), []
    for steps in (1, 2, 4, 8, 16):
        learner = Learner(copy.deepcopy(model), create_rule("predictive_coding", steps=steps), example=X.double())
        seen = spied(learner)
        states = seen[0].message["states"]
        blocks = learner.network.blocks
        h = [X.double(), *states]
        errors = [h[i + 1] - copy.deepcopy(model)[i](h[i]) for i in range(len(blocks))]
        loss = nn.functional.cross_entropy(copy.deepcopy(model)[-1](h[-1]), Y, reduction="sum")
        energies.append((sum(e.square().sum() for e in errors) / 2 + loss).item())
    assert all(later < earlier for earlier, later in pairwise(energies))


def spied(learner, x=X, y=Y):
    """What `signal` is shown in a step."""
    seen, kind = [], type(learner.rule)
    signal = kind.signal
    kind.signal = lambda rule, ctx: (seen.append(ctx), signal(rule, ctx))[1]
    try:
        learner.step(x.to(next(learner.network.parameters()).dtype), y)
    finally:
        kind.signal = signal
    return seen


def test_incremental_coding_is_a_step_of_inference_and_an_update_in_turn():
    """The loop by hand, for one linear block: h follows -dF/dh, then both weights follow dF/dW, twice per batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, CLASSES, bias=False)).double()
    x, y, lr, rate = torch.randn(16, 6, dtype=torch.float64), Y, 0.3, 0.2
    a, b = (layer.weight.detach().clone() for layer in model)
    h = x @ a.T

    def error(h):
        return (h @ b.T).softmax(1) - nn.functional.one_hot(y, CLASSES)

    for _ in range(2):
        h = h - rate * (h - x @ a.T + error(h) @ b)
        a, b = a + lr * (h - x @ a.T).T @ x / 16, b - lr * error(h).T @ h / 16
    rule = create_rule("predictive_coding", variant="incremental", steps=2, rate=rate)
    how = {"optimizer": torch.optim.SGD, "lr": lr, "weight_decay": 0.0}
    learner = Learner(model, rule, **how, schedule=lambda update: float(update == 0))
    learner.step(x, y)
    assert torch.allclose(model[0].weight, a) and torch.allclose(model[1].weight, b)
    assert (learner.updates, learner.steps) == (1, 1)
    with pytest.raises(LayerwiseError, match="leave accumulate out"):
        Learner(model, rule, accumulate=2).step(x, y)


def test_fixed_predictions_are_not_centred():
    with pytest.raises(LayerwiseError, match="linear in beta"):
        create_rule("predictive_coding", variant="fixed_prediction", centred=True)


def test_inference_learning_brings_a_linear_layer_to_its_state_in_one_step():
    """The proximal step with rate 1: for one sample, and without damping, the new prediction is the state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)).double()
    x, y = torch.randn(1, 6, dtype=torch.float64), torch.tensor([2])
    how = {"optimizer": torch.optim.SGD, "lr": 1.0, "weight_decay": 0.0}
    learner = Learner(model, create_rule("inference_learning", eps=1e-12), **how)
    states = spied(learner, x, y)[0].message["states"]
    assert torch.allclose(model[0](x), states[0]) and torch.allclose(model[1](states[0]), states[1])
    assert not torch.allclose(model[1](model[0](x)).softmax(1), states[1])


def test_the_target_of_inference_learning_goes_from_the_prediction_to_the_label():
    model = double()
    for alpha, expected in ((1e-9, model(X.double()).softmax(1)), (1e9, nn.functional.one_hot(Y, CLASSES).double())):
        learner = Learner(copy.deepcopy(model), create_rule("inference_learning", alpha=alpha, steps=1))
        assert torch.allclose(spied(learner)[-1].message["target"], expected, atol=1e-6)


# --- Equilibrium propagation


def at_rest(model, x, steps=40, rate=0.7):
    """The states of rest, as a function of the weights that can be differentiated: all steps in one graph."""
    *blocks, _ = model
    states = [torch.zeros_like(h, requires_grad=True) for h in accumulate_outputs(blocks, x)]
    for _ in range(steps):
        inputs = [x, *states]
        phi = sum((s * block(h)).sum() for s, block, h in zip(states, blocks, inputs, strict=False))
        slopes = torch.autograd.grad(phi, states, create_graph=True)
        states = [s + rate * (slope.clamp(0, 1) - s) for s, slope in zip(states, slopes, strict=True)]
    return states


def accumulate_outputs(blocks, x):
    outputs = []
    for block in blocks:
        x = block(x)
        outputs.append(x.detach())
    return outputs


def test_the_update_of_equilibrium_propagation_tends_to_the_gradient_of_the_state_at_rest():
    """With an error of first order in beta one-sided, and of second order centred."""
    model = double(depth=2, width=6, activation="tanh")
    x = X.double()
    nn.functional.cross_entropy(model[-1](at_rest(model, x)[-1]), Y).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    def error(beta, nudging):
        options = {"beta": beta, "nudging": nudging, "free": 40, "nudged": 40}
        return distance(gradients(model, create_rule("equilibrium_propagation", **options)), exact)

    assert 1.7 < error(0.1, "one_sided") / error(0.05, "one_sided") < 2.3
    assert 3.4 < error(0.1, "centred") / error(0.05, "centred") < 4.6
    assert error(1e-3, "centred") < 1e-4


def test_equilibrium_propagation_predicts_from_the_state_at_rest():
    model = double(depth=2, width=6)
    learner = Learner(copy.deepcopy(model), create_rule("equilibrium_propagation", free=40))
    with torch.inference_mode():
        found = learner(X.double())
    assert torch.allclose(found, model[-1](at_rest(model, X.double())[-1]))
    assert learner.evaluate(X.double(), Y).read()["head/accuracy"] == (found.argmax(-1) == Y).double().mean()


def test_equilibrium_propagation_trains_convolutions_and_refuses_batch_norm():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(i, 4, 3, stride=2, padding=1), nn.ReLU()) for i in (1, 4)]
    rule = create_rule("equilibrium_propagation", free=5, nudged=3)
    learner = Learner(nn.Sequential(*layers, nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))), rule, lr=0.01)
    x, y = problem(32)
    losses = [learner.step(x, y).read()["head/loss"] for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]
    with pytest.raises(LayerwiseError, match="batch norm, which couples them"):
        Learner(net("vgg"), rule, example=X)


# --- Hebbian sizes


def test_hebbian_updates_are_ojas_rule_with_a_softmax_over_channels_in_loops():
    torch.manual_seed(0)
    linear, conv = nn.Linear(3, 4).double(), nn.Conv2d(2, 3, 2, stride=2, padding=1).double()
    x, maps = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    patches = nn.functional.unfold(maps, 2, stride=2, padding=1).transpose(1, 2).reshape(-1, 8)
    found = hebbian_updates([(linear, x, linear(x)), (conv, maps, conv(maps))], 2.0)
    for layer, inputs in ((linear, x), (conv, patches)):
        w, expected = layer.weight.detach().flatten(1), torch.zeros_like(layer.weight).flatten(1)
        for row in inputs:
            u = w @ row
            v = (2.0 * u).softmax(0)
            expected += v.outer(row) - (v * u)[:, None] * w
        assert torch.allclose(found[layer.weight].flatten(1), expected)


@pytest.mark.parametrize("kind", ["mlp", "vgg"])
def test_global_direction_has_the_sign_of_the_gradient_and_a_largest_step_of_one(kind):
    model = double(kind)
    found, exact = gradients(model, "hebbian_global"), gradients(model, "backprop")
    for name, own in found.items():
        if own.dim() == 1 or name.startswith("head"):
            assert torch.allclose(own, exact[name])
        else:
            assert torch.all((own == 0) | (own.sign() == exact[name].sign()))
            assert float(own.abs().max()) <= 1 + 1e-9
            assert not torch.allclose(own.abs() / own.abs().max(), exact[name].abs() / exact[name].abs().max())


def test_the_local_direction_is_the_sign_of_the_blocks_own_loss():
    model = double()
    found, own = gradients(model, "hebbian_local"), gradients(model, "local_ce")
    for i in (1, 2, 3):
        name = f"block{i}.linear.weight"
        assert torch.all((found[name] == 0) | (found[name].sign() == own[name].sign()))
        assert torch.allclose(found[f"block{i}.linear.bias"], own[f"block{i}.linear.bias"])


# --- All of them


@pytest.mark.parametrize("rule", SETTLING)
def test_no_graph_reaches_over_a_boundary(rule, monkeypatch):
    """Locality: every run of a block, those before the update too, starts from a tensor without history."""
    crossed, run = [], Runner.run
    monkeypatch.setattr(
        Runner, "run", lambda self, unit, h, *rest: (crossed.append(h.grad_fn), run(self, unit, h, *rest))[1]
    )
    trained(net(), rule, batches(1))
    assert crossed and not any(crossed)


@pytest.mark.parametrize("rule", SETTLING)
def test_a_rule_that_settles_the_whole_batch_is_refused_in_parts_and_in_a_pipeline(rule):
    with pytest.raises(LayerwiseError, match=r"whole batch before its update.*leave micro out"):
        Learner(net(), rule, micro=2).step(X, Y)
    one = create_rule(rule)
    with pytest.raises(LayerwiseError, match="cannot be trained by a pipeline"):
        check_can_pipeline(one, one.groups(3))


def test_what_is_reported_at_the_head_is_the_forward_pass():
    """Not the settled states, which have seen the label."""
    model = net()
    expected = trained(model, "backprop", []).evaluate(X, Y).read()
    for options in (
        {},
        {"centred": True},
        {"variant": "fixed_prediction"},
        {"variant": "incremental", "centred": True},
    ):
        found = Learner(copy.deepcopy(model), create_rule("predictive_coding", **options)).step(X, Y).read()
        assert found["head/loss"] == pytest.approx(expected["head/loss"], rel=1e-5)
        assert found["head/accuracy"] == pytest.approx(expected["head/accuracy"])
