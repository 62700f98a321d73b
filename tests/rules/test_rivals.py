"""The rivals of locality `global`: gradients of backprop to the bit, and what each of them saves."""

import errno
import os
import threading

import pytest
import torch
from support.nets import KINDS, PLAIN_SGD, batches, net, problem, same_bits, trained
from torch import nn

from layerwise import LayerwiseError, Learner, Signal, create_rule
from layerwise.core.perturbation import Perturbation
from layerwise.core.randomness import derive_seed
from layerwise.learner.metrics import Metrics
from layerwise.measure.bench_speed import flops_of
from layerwise.memory.activations import ActivationOffload
from layerwise.memory.stores import DiskStore
from layerwise.rules import ZerothOrder

DATA = batches(3)
X, Y = problem(32)
EXACT = [
    ("backprop_checkpoint", {}),
    ("backprop_checkpoint", {"policy": "matmul"}),
    ("backprop_checkpoint", {"policy": "attention"}),
    ("backprop_fused", {}),
    ("backprop_offload", {}),
    ("backprop_offload", {"where": "disk"}),
]


def use_of(rule, kind="vit", depth=7, **options):
    wide = {"mlp": {"width": 64}, "vgg": {"width": 8}, "vit": {"width": 32, "heads": 2}}[kind]
    learner = Learner(net(kind, depth, **wide), create_rule(rule, **options))
    learner.step(X, Y)
    return learner.measured_step(X, Y)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rule", "options"), EXACT, ids=str)
def test_the_bits_are_those_of_backprop(rule, options, kind):
    model = net(kind, dropout=0.2)
    found = trained(model, create_rule(rule, **options), DATA)
    assert same_bits(found, trained(model, "backprop", DATA))


# --- Checkpointing


def test_a_policy_keeps_what_it_says_and_recomputes_the_rest():
    """Attention is kept by two policies; matrix products by one, which then runs none of them again."""
    x, y = problem(256)
    ways = {policy: create_rule("backprop_checkpoint", policy=policy) for policy in ("all", "attention", "matmul")}
    held, flops = {}, {}
    for name, rule in {**ways, "plain": create_rule("backprop")}.items():
        learner = Learner(net("vit", 4), rule)
        learner.step(x, y)
        _, use = learner.measured_step(x, y)
        held[name], flops[name] = use.activations + use.gradients, flops_of(learner, x, y)
    assert held["all"] < held["attention"] < held["matmul"] < held["plain"]
    # torch has no formula for attention on the CPU, so that it does not show in the count.
    assert flops["plain"] == flops["matmul"] < flops["attention"] == flops["all"]


# --- The step in the backward pass


def test_one_gradient_is_alive_at_a_time():
    model = net("mlp", 12, width=64)
    learner = Learner(model, "backprop_fused", example=X)
    learner.step(X, Y)
    _, use = learner.measured_step(X, Y)
    assert use.gradients <= max(p.nbytes for p in model.parameters()) + 4 * 64  # a bias may be ready with its weight


class Twice(nn.Module):
    """A layer that is used two times: its gradient is complete after the second use."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, h):
        return self.layer(torch.relu(self.layer(h)))


def test_a_parameter_that_is_used_twice_steps_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), Twice(), nn.Linear(8, 4))
    assert same_bits(trained(model, "backprop_fused", DATA), trained(model, "backprop", DATA))


def test_schedules_and_rates_reach_every_parameter():
    options = {"schedule": lambda update: 0.5**update, "lr_multipliers": {"block2": 0.1}}
    model = net("mlp")
    assert same_bits(trained(model, "backprop_fused", DATA, **options), trained(model, "backprop", DATA, **options))


def test_a_gradient_that_is_not_finite_stops_before_its_parameter_moves():
    learner = Learner(net("mlp"), "backprop_fused", example=X)
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    with pytest.raises(LayerwiseError, match="non-finite loss or gradient"):
        learner.step(torch.full_like(X, torch.nan), Y)
    assert all(torch.equal(p, before[name]) for name, p in learner.named_parameters())
    learner.step(X, Y)


@pytest.mark.parametrize(
    ("option", "value"), [("clip", 1.0), ("accumulate", 2), ("nonfinite", "skip"), ("precision", "fp16")]
)
def test_what_needs_all_gradients_at_once_is_refused(option, value):
    with pytest.raises(LayerwiseError, match=rf"updates one parameter at a time, and {option}.* needs all gradients"):
        Learner(net(), "zeroth_order", example=X, **{option: value})


# --- Activations on disk


def test_activations_on_disk_do_not_grow_with_depth():
    shallow, deep = (use_of("backprop_offload", "mlp", depth, where="disk") for depth in (6, 24))
    assert deep.activations <= 1.05 * shallow.activations
    assert deep.gradients > 2 * shallow.gradients


def test_a_storage_is_written_once_and_its_file_has_no_name(tmp_path, monkeypatch):
    written = []

    def write(store, key, length, chunks):
        written.append((key, length))
        real(store, key, length, chunks)

    real = DiskStore.write
    monkeypatch.setattr(DiskStore, "write", write)
    rule = create_rule("backprop_offload", where="disk")
    layers = [nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Unflatten(1, (2, 32)), nn.Linear(32, 32), nn.Linear(32, 4)]
    model = nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:5], nn.Flatten()), nn.Linear(64, 4))
    learner = Learner(model, rule, offload_folder=tmp_path, example=X)
    learner.step(X, Y)  # in their first run blocks get copies of their inputs
    written.clear()
    learner.step(X, Y)
    # The batch; tanh's output, which tanh and the next layer save; that layer's output.
    assert written == [(0, 32 * 64 * 4), (1, 32 * 64 * 4), (2, 32 * 64 * 4)]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(handle, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    learner = Learner(net("mlp", 4, width=64), create_rule("backprop_offload", where="disk"), offload_folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(LayerwiseError, match=r"No space left.*free space there"):
            learner.step(X, Y)
    assert isinstance(learner.step(X, Y), Metrics)


def test_what_is_changed_while_it_is_written_is_refused(tmp_path):
    offload = ActivationOffload("disk", tmp_path, torch.device("cpu"))
    for changes in (False, True):
        going = threading.Event()
        with offload.kept([]):
            offload._mover.submit(going.wait)
            x = torch.ones(2000, requires_grad=True)
            h = x * 1
            out = h.sin().sum()
            if changes:
                with torch.no_grad():
                    h.add_(1)
            going.set()
            if changes:
                with pytest.raises(RuntimeError, match="changed by an in-place operation while it was written"):
                    out.backward()
            else:
                out.backward()
                assert torch.equal(x.grad, torch.ones(2000).cos())


# --- Blocks that take turns


def test_only_the_blocks_of_a_turn_move_and_keep_state():
    rule = create_rule("block_rota", period=2, order="up")
    learner = Learner(net("mlp"), rule, example=X)
    for update in range(8):
        sites = {("block1", "block2", "block3")[update // 2 % 3], "head"}
        before = {name: p.detach().clone() for name, p in learner.named_parameters()}
        learner.step(X, Y)
        assert {
            name.split(".")[0] for name, p in learner.named_parameters() if not torch.equal(p, before[name])
        } == sites
        assert {name.split(".")[0] for name in learner.optimizer_states()} == sites
        steps = {int(state["step"]) for name, state in learner.optimizer_states().items() if "head" not in name}
        assert steps == {update % 2 + 1}, "its optimizer began anew"
    assert all(p.requires_grad for _, p in learner.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_is_backprop_with_the_other_blocks_frozen(kind):
    model = net(kind)
    found = trained(model, create_rule("block_rota", order="down"), DATA)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("block3", "head")))
    assert same_bits(found, trained(model, "backprop", DATA))


def test_a_turn_keeps_nothing_for_blocks_before_it_and_no_gradient_of_others():
    first, last = (
        use_of("block_rota", "mlp", 12, order=order, period=100) for order in ("up", "down")
    )  # the first block learns, or the last one
    plain = use_of("backprop", "mlp", 12)
    held = [use.activations + use.gradients for use in (first, last, plain)]
    assert held[1] < held[0] / 2 < held[2] / 3
    assert max(first.optimizer, last.optimizer) < plain.optimizer / 3


def test_the_graph_keeps_nothing_for_parameters_at_rest():
    """The first block learns, so that all have a graph; a linear layer keeps its input for its weight alone."""
    assert use_of("block_rota", order="up", period=100).activations < 0.8 * use_of("backprop").activations


@pytest.mark.parametrize("order", ["random", "up", "down"])
@pytest.mark.parametrize("head", ["always", "turn"])
def test_every_block_has_one_turn_per_round(order, head):
    rule = create_rule("block_rota", period=3, order=order, head=head, at_once=2)
    turns = -(-(7 + (head == "turn")) // 2)
    rounds = []
    for number in range(2):
        seen = [rule.sites_at(3 * (number * turns + turn) + 2, 7) for turn in range(turns)]
        learned = [site for sites in seen for site in sites]
        assert all((7 in sites) or head == "turn" for sites in seen)
        assert sorted({*learned}) == list(range(8))
        assert len([site for site in learned if site != 7]) == 7
        rounds.append(seen)
    assert (rounds[0] == rounds[1]) == (order != "random")


# --- Zeroth order


class Quadratic(ZerothOrder):
    """Half the squared distance of the network's output from a target: a quadratic function of a linear network."""

    def signal(self, ctx):
        if not ctx.site.is_head:
            return Signal()
        loss = (ctx.h - torch.arange(ctx.h.numel(), dtype=ctx.h.dtype).view_as(ctx.h)).square().sum() / 2
        return Signal(loss=loss, metrics={"accuracy": loss.detach()})


def quadratic(directions):
    """A layer's weights after a step of plain gradient descent at rate 1, what they were, and the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    weight = model[1].weight
    before = weight.detach().clone()
    learner = Learner(model, Quadratic(directions=directions), cuts=["0"], **{**PLAIN_SGD, "lr": 1.0})
    learner.step(x, y)
    target = torch.arange(6, dtype=torch.float64).view(2, 3)
    return weight.detach(), before, (x @ before.T - target).T @ x


def test_the_estimate_is_the_slope_along_the_drawn_direction():
    after, before, gradient = quadratic(1)
    seed = derive_seed(0, "direction", 0, 0)
    z = Perturbation([before], seed).of(0)
    # The difference of a quadratic has no error but rounding.
    assert torch.allclose(before - after, (z * gradient).sum() * z, rtol=1e-8)


@pytest.mark.slow
def test_the_estimate_is_unbiased():
    directions = 400
    after, before, gradient = quadratic(directions)
    # Var(g_hat_i) = |g|^2 + g_i^2 for one direction, as z is normal.
    deviation = ((gradient.square().sum() + gradient.square()) / directions).sqrt()
    assert ((before - after - gradient).abs() < 4.5 * deviation).all()
    assert (gradient.abs() > 3 * deviation).any(), "the test would notice a missing gradient"


def test_weights_come_back_also_from_a_pass_that_fails():
    class Fails(Quadratic):
        def signal(self, ctx):
            raise ValueError("no")

    model = net("mlp")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(LayerwiseError, match="no"):
        Learner(model, Fails()).step(X, Y)
    assert all(torch.allclose(p, before[name], atol=1e-6) for name, p in model.named_parameters())


def test_zeroth_order_keeps_nothing():
    shallow, deep = (use_of("zeroth_order", "mlp", depth, directions=2) for depth in (6, 24))
    assert deep.activations + deep.gradients == shallow.activations + shallow.gradients
