"""The update order: what it must equal (plain torch), what it must not depend on, what each option does."""

import copy
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from support.nets import KINDS, batches, net, problem, same_bits, trained, whole
from torch import nn

from layerwise import LayerwiseError, Learner, Rule, Schedule, Signal, partition
from layerwise.core.optim import decay_groups
from layerwise.core.randomness import derive_seed

DATA = batches(3)
SGD = {"optimizer": torch.optim.SGD, "weight_decay": 0.0}


def dropping(kind):
    return net(kind, dropout=0.2)


# --- What it equals


@pytest.mark.parametrize("kind", KINDS)
def test_local_ce_with_one_block_is_backprop_bit_for_bit(kind):
    model = whole(dropping(kind))
    assert same_bits(trained(model, "local_ce", DATA), trained(model, "backprop", DATA))


@pytest.mark.parametrize("kind", KINDS)
def test_backprop_is_the_loop_that_one_would_write_by_hand(kind):
    model = net(kind)
    learner = trained(model, "backprop", DATA, lr=0.01, weight_decay=0.1)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=True)
    for x, y in DATA:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(learner.network.model, model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["backprop_checkpoint", "backprop_offload"])
def test_checkpoint_and_offload_are_backprop_bit_for_bit(kind, rule):
    model = dropping(kind)
    found, expected = trained(model, rule, DATA), trained(model, "backprop", DATA)
    pairs = zip(found.network.named_parameters(), expected.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)


def test_sgd_has_nesterov_momentum():
    model = net("mlp")
    found = trained(model, "backprop", DATA, optimizer="sgd", lr=0.05, weight_decay=0.0)
    wanted = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for x, y in DATA:
        F.cross_entropy(model(x), y).backward()
        wanted.step()
        wanted.zero_grad()
    pairs = zip(found.network.parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_without_draws_backprop_does_not_depend_on_the_cuts():
    model = net("vgg")
    assert same_bits(
        trained(model, "backprop", DATA).network.model,
        trained(whole(model), "backprop", DATA).network.model,
    )


def test_local_ce_is_one_detached_network_per_block():
    """Two hand-written optimizers, two losses, a detach in between."""
    model = net("mlp", depth=2)
    learner = Learner(copy.deepcopy(model), "local_ce", lr=0.1, **SGD)
    learner.build(DATA[0][0])
    head = copy.deepcopy(learner.auxiliary["0"])
    for x, y in DATA:
        learner.step(x, y)
        h = model.block1(x)
        F.cross_entropy(head(h), y).backward()
        F.cross_entropy(model.head(model.block2(h.detach())), y).backward()
        with torch.no_grad():
            for parameter in [*model.parameters(), *head.parameters()]:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    for a, b in zip(learner.network.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# --- Random draws


class Noise(nn.Module):
    """Adds nothing; remembers what it drew in training."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, h):
        if self.training:
            self.drawn.append(torch.rand(3))
        return h


def noisy(first=True):
    torch.manual_seed(0)
    before = [nn.Dropout(0.5), Noise()] if first else []
    return nn.Sequential(
        nn.Linear(64, 6), *before, nn.Linear(6, 6), Noise(), nn.Linear(6, 6), Noise(), nn.Linear(6, 4)
    )  # fmt: skip


def draws(model, steps=2, **options):
    learner = Learner(model, "sll", **options)
    for x, y in batches(steps):
        learner.step(x.flatten(1), y)
    return [m.drawn for m in model if isinstance(m, Noise)]


def equal(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_what_a_block_draws_does_not_depend_on_what_the_others_draw():
    assert equal(draws(noisy())[-1], draws(noisy(first=False))[-1])


def test_every_seed_step_and_block_has_its_own_draws():
    found = [d for seed in (0, 1) for block in draws(noisy(), seed=seed) for d in block]
    assert len({tuple(d.tolist()) for d in found}) == 2 * 3 * 2


def test_a_step_leaves_no_trace_in_the_global_generator():
    learner, (x, y) = Learner(dropping("vit"), "sll", blocks=3), DATA[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    learner.step(x, y)
    learner(x)
    learner.evaluate(x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_changes_nothing():
    model = dropping("mlp")
    torch.manual_seed(1)
    calm = trained(model, "sll", DATA)
    learner = Learner(copy.deepcopy(model), "sll")
    for i, (x, y) in enumerate(DATA):
        torch.manual_seed(100 + i)
        learner.step(x, y)
        learner(x)
    assert same_bits(learner, calm)


def test_the_seed_decides_the_draws_and_the_auxiliary_modules():
    model = dropping("mlp")
    a, b, c = (trained(model, "sll", DATA, seed=seed) for seed in (0, 0, 1))
    assert same_bits(a, b)
    assert not same_bits(a.network, c.network)
    assert not same_bits(a.auxiliary, c.auxiliary)


@hypothesis.given(*[st.lists(st.integers(0, 3) | st.text(max_size=2), max_size=3)] * 2)
def test_seeds_are_equal_only_for_equal_purposes(a, b):
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
    assert 0 <= derive_seed(*a) < 2**63


# --- Options of the update


def displacement(model, learner):
    """What moved, per group, as one vector."""
    start = dict(model.named_parameters())
    with torch.no_grad():
        return [
            torch.cat([(p - start[n]).flatten() for u in g.units for n, p in u.block.named_parameters()])
            for g in learner.groups
        ]


def test_clipping_limits_the_norm_of_each_groups_gradient():
    model = net("mlp").double()
    data = [(x.double(), y) for x, y in DATA[:1]]
    free = displacement(model, trained(model, "sll", data, lr=1.0, **SGD))
    norms = sorted(float(d.norm()) for d in free)
    clip = (norms[0] + norms[-1]) / 2  # some groups are above, some below
    clipped = displacement(model, trained(model, "sll", data, lr=1.0, clip=clip, **SGD))
    for before, after in zip(free, clipped, strict=True):
        expected = before * min(1.0, clip / float(before.norm()))
        assert torch.allclose(after, expected, rtol=1e-4, atol=1e-9)
    assert min(norms) < clip < max(norms)


@pytest.mark.parametrize("rule", ["sll", "svp", "local_ce", "backprop", "deep_supervision"])
def test_accumulated_batches_are_one_large_batch(rule):
    model = net("mlp").double()
    x, y = problem(32)
    parts = list(zip(x.double().split(8), y.split(8), strict=True))
    a = trained(model, rule, parts, lr=0.5, accumulate=4, **SGD)
    b = trained(model, rule, [(x.double(), y)], lr=0.5, **SGD)
    for found, expected in zip(displacement(model, a), displacement(model, b), strict=True):
        assert expected.norm() > 1e-3
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_nothing_moves_before_enough_batches_have_accumulated():
    model = net("mlp")
    learner = trained(model, "sll", DATA[:2], accumulate=3)
    assert same_bits(learner.network, model)
    learner.step(*DATA[2])
    assert not same_bits(learner.network, model)


class Silent(Rule):
    """A signal that is zero everywhere: what moves is moved by the optimizer alone."""

    name, locality, boundary, flat_memory, source = "silent", "local", "nothing", True, "this test"

    def signal(self, at):
        return Signal(cotangent=torch.zeros_like(at.h))


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_and_norms_and_biases_do_not(kind):
    model = net(kind)
    learner = trained(model, Silent(), DATA[:1], lr=0.5, weight_decay=0.5, optimizer="adamw")
    for (name, after), before in zip(learner.network.named_parameters(), model.parameters(), strict=True):
        expected = before * 0.75 if before.dim() >= 2 else before
        assert torch.allclose(after, expected), name


def test_decay_groups_hold_frozen_parameters_as_they_may_thaw_but_no_integers():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    codes = nn.Parameter(torch.zeros(3, 2, dtype=torch.int8), requires_grad=False)
    weights, vectors = decay_groups([*layer.parameters(), codes], 2.0)
    assert weights == {"params": [layer.weight], "lr_multiplier": 2.0}
    assert vectors == {"params": [layer.bias], "lr_multiplier": 2.0, "weight_decay": 0.0}


def test_a_multiplier_scales_its_own_blocks_displacement_only():
    model = net("mlp").double()
    data = [(x.double(), y) for x, y in DATA[:1]]
    plain = displacement(model, trained(model, "sll", data, lr=0.5, **SGD))
    for factor in (0.25, 0.0, 3.0):
        how = {"lr_multipliers": {"block2": factor}, **SGD}
        first, second, last = displacement(model, trained(model, "sll", data, lr=0.5, **how))
        assert torch.equal(first, plain[0])
        assert torch.allclose(second, factor * plain[1], rtol=1e-9, atol=1e-12)
        assert torch.equal(last, plain[2])


def test_the_schedule_multiplies_the_rate_by_update_number_not_by_batch():
    seen = []

    def schedule(update):
        seen.append(update)
        return 0.5**update

    model = net("mlp")
    learner = trained(model, "sll", batches(4), schedule=schedule, accumulate=2, lr_multipliers={"head": 0.5}, lr=0.1)
    assert set(seen) == {0, 1}
    rates = {
        n: group["lr"]
        for g in learner.groups
        for optimizer in g.optimizers
        for group in optimizer.param_groups
        for n, p in learner.network.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert rates["block1.linear.weight"] == pytest.approx(0.05)
    assert rates["head.bias"] == pytest.approx(0.025)


def test_a_callable_optimizer_keeps_its_own_rate_and_is_scheduled():
    learner = trained(
        net("mlp"), "sll", DATA[:1],
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.3), schedule=lambda update: 0.5,
    )  # fmt: skip
    rates = {group["lr"] for g in learner.groups for optimizer in g.optimizers for group in optimizer.param_groups}
    assert rates == {0.15}


# --- Schedules


def test_cosine_is_its_closed_form():
    schedule = Schedule("cosine", total=100, final=0.1)
    for update in (0, 25, 50, 100):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * update / 100)) / 2
        assert schedule(update) == pytest.approx(expected)


def test_constant_is_one():
    assert [Schedule()(update) for update in (0, 5, 10**6)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("update", [-1, -0.5, math.nan, None, "3"])
@pytest.mark.parametrize("kind", ["constant", "cosine", "onecycle"])
def test_a_schedule_refuses_what_is_no_number_of_an_update(kind, update):
    with pytest.raises(LayerwiseError, match="give its number, 0 for the first"):
        Schedule(kind, total=10)(update)


@hypothesis.given(
    st.sampled_from(["cosine", "onecycle"]), st.integers(1, 300), st.floats(0, 0.99), st.floats(0, 0.5)
)  # fmt: skip
def test_schedules_rise_to_one_and_fall_to_final_without_a_jump(kind, total, warmup, final):
    hypothesis.assume(total * (1 - warmup) >= 1)
    schedule = Schedule(kind, total, warmup, final)
    values = [schedule(update) for update in range(total + 3)]
    assert 0 < values[0] <= 1
    assert max(values) <= 1
    top = max(range(len(values)), key=values.__getitem__)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert values[total:] == pytest.approx([final] * 3)
    # No step is steeper than the steepest slope of half a cosine (or of the linear rise).
    rise, fall = warmup * total, total - warmup * total
    steepest = max(1 / (rise + 1), math.pi / 2 / max(rise, 1), math.pi / 2 / max(fall, 1))
    assert all(abs(b - a) <= steepest + 1e-9 for a, b in itertools.pairwise(values))


def test_onecycle_starts_at_a_25th_and_peaks_where_the_warm_up_ends():
    schedule = Schedule("onecycle", total=200, warmup=0.25)
    assert (schedule(0), schedule(50)) == (pytest.approx(0.04), pytest.approx(1.0))
    assert schedule(25) == pytest.approx((0.04 + 1) / 2)
    assert schedule(125) == pytest.approx((1 + 1e-5) / 2)


@pytest.mark.parametrize("wrong", [{"kind": "linear"}, {"kind": "cosine"}, {"warmup": 1.0}, {"warmup": -0.1}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(LayerwiseError):
        Schedule(**wrong)


# --- Precision, compilation, layout


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_trains_and_keeps_the_weights_in_float32(precision, kind):
    learner, (x, y) = Learner(net(kind), "sll", precision=precision, lr=0.03), problem(32)
    losses = [learner.step(x, y).read()["head/loss"] for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 for p in learner.network.parameters())


def test_bf16_really_computes_in_bf16():
    seen = []
    model = net("mlp")
    model.block2.linear.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    trained_model = Learner(model, "sll", precision="bf16")
    trained_model.step(*DATA[0])
    assert seen[-1] == torch.bfloat16


def test_the_gradient_scaler_does_not_change_what_is_learned():
    """Scale 1 against a large one, both without overflow: the same displacement up to fp16's rounding."""
    found = []
    for scale in (1.0, 1024.0):
        learner = Learner(net("mlp"), "sll", precision="fp16", lr=0.1, example=DATA[0][0], **SGD)
        for group in learner.groups:
            group.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        learner.step(*DATA[0])
        found.append(torch.cat(displacement(net("mlp"), learner)))
    assert torch.allclose(found[0], found[1], atol=0.02 * float(found[1].abs().max()))
    assert found[1].norm() > 0


def mixed_widths():
    """14 blocks, no two alike."""
    torch.manual_seed(0)
    sizes = [64, *range(5, 19)]
    layers = [
        layer
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
        for layer in (nn.Linear(a, b), (nn.ReLU, nn.Tanh, nn.GELU)[i % 3]())
    ]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(18, 4))


@pytest.fixture
def dynamo():
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    strict = "fail_on_recompile_limit_hit" if hasattr(dynamo.config, "recompile_limit") else "fail_on_cache_limit_hit"
    with dynamo.config.patch({strict: True}):  # the second is its name up to torch 2.6
        yield dynamo.utils.counters
    dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it itself
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_blocks_compute_the_same(dynamo, backend):
    model = net("vgg")
    plain, compiled = trained(model, "sll", DATA[:2]), trained(model, "sll", DATA[:2], compile=backend)
    for a, b in zip(plain.network.parameters(), compiled.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert len(compiled.network.blocks) + 1 == dynamo["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it itself
def test_many_different_blocks_are_all_compiled_once_and_static(dynamo):
    """Dynamo gives up at the ninth version of one piece of code, so every block needs its own."""
    model = mixed_widths()
    compiled = trained(model, "sll", DATA, compile="eager")
    assert same_bits(compiled, trained(model, "sll", DATA))
    assert dynamo["stats"]["unique_graphs"] == 15
    assert not dynamo["graph_break"]


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, scale=0.5):
        h = self.stem(x)
        h = h + torch.relu(self.a(h)) * scale
        h = h + torch.relu(self.b(h)) * scale
        return self.fc(h)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it itself
def test_traced_blocks_compile_without_a_graph_break(dynamo):
    torch.manual_seed(0)
    model = Skips()
    compiled = trained(model, "backprop", DATA, cuts=["stem"], compile="eager")
    assert same_bits(compiled, trained(model, "backprop", DATA, cuts=["stem"]))
    assert dynamo["stats"]["unique_graphs"] == 2
    assert not dynamo["graph_break"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor warns of much
def test_inductor_trains(dynamo):
    model = net("mlp")
    a, b = trained(model, "sll", DATA), trained(model, "sll", DATA, compile=True)
    for p, q in zip(a.network.parameters(), b.network.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_channels_last_computes_the_same():
    model = net("vgg")
    learner = trained(model, "sll", DATA[:1], channels_last=True)
    weight = learner.network.model.block2.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert learner._placed(DATA[0][0].expand(-1, 3, -1, -1)).is_contiguous(memory_format=torch.channels_last)
    expected = trained(model, "sll", DATA[:1])
    assert torch.allclose(learner(DATA[0][0]), expected(DATA[0][0]), atol=1e-4)


def test_a_partition_given_to_the_learner_is_used_as_it_is():
    parts = partition(net("mlp", depth=4), blocks=2, example=DATA[0][0])
    assert Learner(parts, "sll").network is parts


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fails", ["batch", "optimizer"])
def test_a_learner_goes_on_after_a_step_that_failed_as_if_it_had_not_been(precision, fails):
    """In fp16 the failure comes when the scaler has seen the gradients already."""
    interrupt = []

    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            if interrupt:
                raise KeyboardInterrupt(interrupt.pop())
            return super().step(closure)

    options = {"precision": precision, "optimizer": lambda groups: Interrupted(groups, lr=0.1)}
    *data, (x, y) = batches(4)
    learner = trained(net("mlp"), "backprop", data[:2], **options)
    interrupt += [fails] * (fails == "optimizer")
    with pytest.raises((LayerwiseError, KeyboardInterrupt)):
        learner.step(x if interrupt else x * math.nan, y)
    learner.step(*data[2])
    learner.step(x, y)
    assert same_bits(learner, trained(net("mlp"), "backprop", [*data, (x, y)], **options))
