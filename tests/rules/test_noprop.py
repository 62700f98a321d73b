"""NoProp: the diffusion's identities, losses written down, blocks in any order, the samplers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, batches, net, problem, same_bits, trained
from support.noprop import HOT, IDLE, KINDS, MANY_X, MANY_Y, X, Y, every_label, every_rule, made
from torch.distributions import Normal, kl_divergence

from layerwise import LayerwiseError, Learner, create_rule, data, models
from layerwise.core.engine import Engine
from layerwise.core.functional import (
    denoising_step,
    integrate,
    medoid,
    mixture,
    prior_divergence,
    signal_share,
    squared_distances,
)
from layerwise.core.progress import Trace
from layerwise.core.rule import Site
from layerwise.models.noprop import CosineSchedule, LearnedSchedule


def answer(monkeypatch, learner, logits):
    """Let the one network give these logits of (z, x, t), by a graph that its parameters have no part in."""
    block = learner.network.model.block1
    nothing = 0 * block.joined[-1].bias.sum()
    monkeypatch.setattr(block, "logits", lambda *given: logits(*given) + nothing)


def is_a_standard_normal(noise):
    """Every column, within five standard errors."""
    spread = len(noise) ** 0.5
    assert noise.mean(0).abs().max() < 5 / spread
    assert (noise.square().mean(0) - 1).abs().max() < 5 * 2**0.5 / spread


# --- The mathematics


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_step_towards_the_true_label_keeps_mean_and_variance(steps):
    shares = [signal_share(t, steps) for t in range(steps + 1)]
    assert shares == sorted(set(shares))
    assert shares[0] > 0 and shares[-1] < 1
    for t in range(1, steps + 1):
        a, b, c = denoising_step(t, steps)
        assert a + b * shares[t - 1] ** 0.5 == pytest.approx(shares[t] ** 0.5, abs=1e-12)
        assert b * b * (1 - shares[t - 1]) + c == pytest.approx(1 - shares[t], abs=1e-12)
        assert min(a, b, c) > 0


def test_the_weights_of_the_blocks_add_up_to_the_whole_gain():
    rule, steps = create_rule("noprop_dt", eta=0.3), 6
    total = sum(rule.loss_weight(Site(i, steps, "")) for i in range(steps))
    first, last = (signal_share(t, steps) for t in (0, steps))
    assert total == pytest.approx(steps / 2 * 0.3 * (last / (1 - last) - first / (1 - first)))


def any_schedule(seed):
    torch.manual_seed(seed)
    schedule = LearnedSchedule().double()
    for parameter in schedule.parameters():
        parameter.data += 3 * torch.randn_like(parameter)
    return schedule


SCHEDULES = [CosineSchedule(), LearnedSchedule().double(), *map(any_schedule, range(5))]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_rises_and_tells_its_slope(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)[:, None]
    log_snr, slope = schedule(t)
    step = 1e-5
    assert (log_snr.diff(dim=0) > 0).all()
    assert torch.allclose(slope, (schedule(t + step)[0] - schedule(t - step)[0]) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_ends_where_it_should(schedule):
    log_snr = schedule(torch.tensor([[0.0], [1.0]], dtype=torch.float64))[0]
    assert log_snr[1].item() == pytest.approx(3, rel=1e-6)
    if schedule in SCHEDULES[:2]:  # how noisy it begins is learned
        assert log_snr[0].item() == pytest.approx(-3, rel=1e-5)


def test_the_angle_of_the_cosine_rises_evenly():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
    angle = CosineSchedule()(t)[0].sigmoid().sqrt().asin()[:, 0]
    assert torch.allclose(angle.diff(), angle.diff()[:1])


def test_the_divergence_from_the_prior_is_that_of_the_normals():
    u, share = torch.randn(5, 7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    q = Normal(share.sqrt() * u, (1 - share).sqrt())
    expected = kl_divergence(q, Normal(torch.zeros_like(u), 1.0)).sum(1)
    assert torch.allclose(prior_divergence(u, share), expected)


def test_the_medoid_has_the_smallest_median_distance_to_the_others():
    for count in (1, 2, 7, 8):
        x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        medians = []
        for i in range(count):
            others = sorted((x[i] - x[j]).norm().item() for j in range(count) if j != i)
            medians.append(others[len(others) // 2] if others else 0.0)
        assert medians[medoid(x)] == pytest.approx(min(medians))


def test_mixtures_and_distances_keep_their_precision_under_autocast():
    p, u = torch.rand(6, CLASSES), torch.randn(CLASSES, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, distances = mixture(p, u), squared_distances(mixture(p, u), u)
    assert torch.allclose(mixed, (p[:, :, None] * u).sum(1), atol=1e-6)
    assert torch.allclose(distances, (mixed[:, None] - u).square().sum(2), atol=1e-4)


def test_the_solvers_are_of_first_and_second_order():
    """dz/dt = -z from 1: halving the steps halves the error of Euler's, and quarters that of Heun's."""
    start, end = torch.tensor(1.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64).exp()
    for solver, ratio in (("euler", 2), ("heun", 4)):
        few, many = ((integrate(lambda z, t: -z, start, n, solver) - end).abs().item() for n in (50, 100))
        assert few / many == pytest.approx(ratio, rel=0.05)


# --- Losses


@pytest.mark.parametrize("model", [{"embedding": "mlp"}, {}, {"labels": "learned", "label_size": 6}], ids=str)
def test_a_blocks_loss_is_the_weighted_distance_of_its_label(model, monkeypatch):
    """In evaluation; the label that a block tells is put together from its parts."""
    learner = trained(net("noprop", **model), "noprop_dt", batches(3))
    given, forward = [], Engine.forward

    def watched(engine, group, h, *others):
        given.append(h)
        return forward(engine, group, h, *others)

    monkeypatch.setattr(Engine, "forward", watched)
    told, network = learner.evaluate(X, Y).read(), learner.network.model.eval()
    for t, h in enumerate(given[:-1], 1):
        block = getattr(network, f"block{t}")
        u, size = block.embedding, block.embedding.shape[1]
        with torch.no_grad():
            z = h[:, :CLASSES] @ u + h[:, CLASSES : CLASSES + size]
            label = block.label.first(z).relu()
            parts = [block.image(X), label + block.label.second(label).relu()]
            q = block.joined(torch.cat(parts, 1)).softmax(1)
        distance = (q @ u - u[Y]).square().sum(1).mean()
        after, before = (signal_share(s, 3) / (1 - signal_share(s, 3)) for s in (t, t - 1))
        assert told[f"block{t}/loss"] == pytest.approx(3 / 2 * 0.1 * (after - before) * distance.item(), rel=1e-3)
        assert told[f"block{t}/accuracy"] == pytest.approx((q.argmax(1) == Y).float().mean().item())
        assert torch.equal(h[:, CLASSES + size :], X.flatten(1))


@IDLE
@pytest.mark.parametrize("schedule", ["cosine", "learned"])
def test_a_perfect_label_costs_nothing_in_continuous_time_but_the_divergence(schedule, monkeypatch):
    learner = made("noprop_ct", schedule=schedule)
    answer(monkeypatch, learner, lambda z, x, t: z.sum() * 0 + 100 * HOT)
    told = learner.step(X, Y).read()
    first = torch.tensor(-3.0).sigmoid()
    divergence = prior_divergence(HOT, first).mean().item() if schedule == "learned" else 0.0
    assert told["block1/loss"] == pytest.approx(divergence, rel=1e-4, abs=1e-7)


@IDLE
def test_the_loss_in_continuous_time_is_the_distance_times_the_rise_of_the_ratio(monkeypatch):
    learner, times = made("noprop_ct", {"eta": 0.7}, schedule="cosine"), []

    def even(z, x, t):
        times.append(t)
        return z * 0

    answer(monkeypatch, learner, even)
    told = learner.step(X, Y).read()
    first, last = torch.tensor([-1.5, 1.5]).exp().atan()
    angle, distance = first + (last - first) * times[0], (1 / CLASSES - HOT).square().sum(1, keepdim=True)
    rise = 2 * angle.tan() / angle.cos().square() * (last - first)  # of SNR = tan^2
    assert told["block1/loss"] == pytest.approx((0.7 / 2 * rise * distance).mean().item(), rel=1e-4)


@IDLE
def test_a_perfect_velocity_costs_nothing(monkeypatch):
    """Without noise around the way, the way's direction can be told from where one is and where it leads."""
    learner = made("noprop_fm", {"sigma": 0.0})
    answer(monkeypatch, learner, lambda z, x, t: (HOT - z) / (1 - t))
    assert learner.step(X, Y).read()["block1/loss"] == pytest.approx(0.0, abs=1e-5)


@IDLE
def test_the_loss_of_flow_matching_is_the_distance_from_the_way(monkeypatch):
    """A velocity of zero costs |u - z_0|^2: the length of u, and one for every dimension."""
    learner = made("noprop_fm")
    answer(monkeypatch, learner, lambda z, x, t: z * 0)
    expected = 1 + CLASSES
    deviation = (2 * CLASSES + 4) ** 0.5 / len(MANY_X) ** 0.5
    assert abs(learner.step(MANY_X, MANY_Y).read()["block1/loss"] - expected) < 5 * deviation


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_radial_head_is_a_softmax_over_distances(share):
    head = net("noprop", head="radial", labels="learned", label_size=6).head
    p, r = share * HOT, torch.randn(len(HOT), 6)
    y = head.linear(p @ head.embedding + r).softmax(1) @ head.embedding
    densities = Normal(head.embedding, head.log_sigma.exp()).log_prob(y[:, None]).sum(2)
    assert torch.allclose(head(torch.cat([p, r], 1)).log_softmax(1), densities.log_softmax(1), atol=1e-5)


# --- Draws


def inputs_of(learner, x, y, monkeypatch):
    """What every group is given in a step."""
    given, update = [], Engine.update
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", lambda e, g, h, *o: (given.append(h), update(e, g, h, *o))[1])
        learner.step(x, y)
    return given


@pytest.mark.parametrize("labels", ["one_hot", "learned"])
def test_what_a_block_is_given_is_a_draw_around_the_share_of_the_label(labels, monkeypatch):
    learner = made("noprop_dt", labels=labels, label_size=6)
    u = learner.network.model.head.embedding.detach().clone()
    for t, h in enumerate(inputs_of(learner, MANY_X, MANY_Y, monkeypatch)):
        share, z = signal_share(t, 3), h[:, :CLASSES] @ u + h[:, CLASSES : CLASSES + u.shape[1]]
        is_a_standard_normal((z - share**0.5 * u[MANY_Y]) / (1 - share) ** 0.5)


@pytest.mark.parametrize("rule", ["noprop_ct", "noprop_fm"])
def test_what_the_network_sees_at_any_time_is_a_draw_around_the_label(rule, monkeypatch):
    learner, seen = made(rule, labels="learned", label_size=6), []
    learner.network.model.block1.label.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    state, at_the_end = inputs_of(learner, MANY_X, MANY_Y, monkeypatch)
    (z,), t, u = seen, state[:, :1], net(KINDS[rule], labels="learned", label_size=6).head.embedding.detach()
    assert (t.sort(0).values - torch.linspace(0, 1, 4096)[:, None]).abs().max() < 0.05
    if rule == "noprop_ct":
        share = torch.sigmoid(LearnedSchedule()(t)[0].detach())
        is_a_standard_normal((z - share.sqrt() * u[MANY_Y]) / (1 - share).sqrt())
        end, share = at_the_end[:, :CLASSES] @ u + at_the_end[:, CLASSES : CLASSES + 6], torch.tensor(3.0).sigmoid()
        is_a_standard_normal((end - share**0.5 * u[MANY_Y]) / (1 - share) ** 0.5)
    else:
        is_a_standard_normal((z - t * u[MANY_Y]) / ((1 - t).square() + 0.1**2).sqrt())


def test_blocks_may_be_trained_in_any_order(monkeypatch):
    """What a block gets is no function of any weight, so the last block may learn first: the bits are the same."""
    model, other = net("noprop"), net("noprop")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-3)
    straight, last_first = (Learner(copy.deepcopy(model), "noprop_dt", example=X) for _ in range(2))
    given = inputs_of(straight, X, Y, monkeypatch)
    strange = inputs_of(Learner(other, "noprop_dt", example=X), X, Y, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(given, strange, strict=True))
    assert not torch.equal(given[0][:, CLASSES : 2 * CLASSES], given[1][:, CLASSES : 2 * CLASSES])
    last_first.network.train()
    last_first.engine.take(Y)
    for group, h in reversed([*zip(last_first.groups, strange, strict=True)]):
        last_first.engine.update(group, h, None, Y, 0, Trace())
    assert same_bits(last_first, straight)


# --- Samplers


@every_rule
@every_label
def test_the_sampler_is_seeded_and_what_evaluation_reports(rule, labels):
    learner = trained(net(KINDS[rule], labels=labels), rule, batches(3))
    logits = learner(X)
    assert torch.equal(logits, learner(X))
    assert not torch.allclose(logits, learner.network.model.eval()(X))  # which starts from zero and adds no noise
    other = Learner(copy.deepcopy(learner.network.model), rule, seed=1, example=X)
    assert not torch.allclose(logits, other(X))
    assert learner.evaluate(X, Y).read()["head/loss"] == pytest.approx(F.cross_entropy(logits, Y).item(), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 7])
def test_a_perfect_velocity_arrives_at_the_embedding(steps, monkeypatch):
    learner = made("noprop_fm", {"steps": steps})
    answer(monkeypatch, learner, lambda z, x, t: (HOT - z) / (1 - t))
    logits = learner(X)
    assert torch.allclose(logits, -squared_distances(HOT, torch.eye(CLASSES)) / 2, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "learned"])
def test_a_perfect_label_keeps_the_marginals_of_continuous_time(schedule, monkeypatch):
    """z_1 is the share of the label that belongs there, and as much of the noise of z_0."""
    learner = made("noprop_ct", {"steps": 200, "solver": "heun"}, schedule=schedule)
    answer(monkeypatch, learner, lambda z, x, t: 100 * HOT)
    learner.network.model.head.linear.weight.data = torch.eye(CLASSES)
    learner.network.model.head.linear.bias.data.zero_()
    torch.manual_seed(0)
    with torch.no_grad():
        z = learner.rule.predict(learner.network, {}, X)
    torch.manual_seed(0)
    noise = torch.randn(len(X), CLASSES)
    first, last = torch.tensor([-3.0, 3.0]).sigmoid()
    rest = (1 - last) ** 0.5 / (1 - first) ** 0.5 * (noise - first**0.5 * HOT)
    assert torch.allclose(z, last**0.5 * HOT + rest, atol=2e-3)


@pytest.mark.parametrize(("options", "calls"), [({}, 3), ({"steps": 5}, 5), ({"solver": "heun"}, 6)], ids=str)
@pytest.mark.parametrize("rule", ["noprop_ct", "noprop_fm"])
def test_a_sampler_takes_the_models_steps_or_its_own(rule, options, calls):
    learner, seen = made(rule, options), []
    learner.network.model.block1.label.register_forward_pre_hook(lambda *_: seen.append(0))
    learner(X)
    assert len(seen) == calls


def test_flow_matching_may_ask_its_head(monkeypatch):
    learner = made("noprop_fm", {"predictor": "head"})
    answer(monkeypatch, learner, lambda z, x, t: (HOT - z) / (1 - t))
    with torch.no_grad():
        assert torch.allclose(learner(X), learner.network.model.head.linear(HOT), atol=1e-5)


# --- Use


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "model", "least"),
    [("noprop_dt", {"labels": "learned", "depth": 3}, 0.85), ("noprop_ct", {}, 0.55), ("noprop_fm", {}, 0.7)],
    ids=str,
)
def test_it_learns_the_digits(rule, model, least):
    """Two hundred steps; ten classes."""
    digits = data.load("digits")
    how = {"seed": 0, "mean": digits.mean, "std": digits.std}
    training = data.Batches(digits.train, 64, **how)
    x, y = next(data.Batches(digits.test, len(digits.test), **how).epoch(0))
    torch.manual_seed(0)
    network = models.create(KINDS[rule], digits.shape, 10, width=8, embedding="mlp", **model)
    learner = Learner(network, rule, lr=5e-3)
    while learner.steps < 200:
        for batch in training.epoch(learner.steps // len(training)):
            learner.step(*batch)
    assert (learner(x).argmax(1) == y).float().mean() > least


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("labels", ["learned", "prototype"])
def test_labels_that_are_learned_and_radial_heads_learn(rule, labels):
    x, y = problem(64)
    learner = Learner(net(KINDS[rule], labels=labels, head="radial", width=4), rule, lr=0.01, example=x)
    for _ in range(40):
        learner.step(x, y)
    test_x, test_y = problem(64, seed=5)
    assert (learner(test_x).argmax(-1) == test_y).float().mean() > 2 / CLASSES


@pytest.mark.parametrize("kind", ["mlp", "vgg", "sid_cascade"])
@every_rule
def test_other_networks_are_refused(kind, rule):
    with pytest.raises(LayerwiseError, match=f"trains the model '{KINDS[rule]}'"):
        Learner(net(kind), rule, example=X)


def test_wrong_use_is_told():
    with pytest.raises(LayerwiseError, match="trains the model 'noprop'"):
        Learner(net("noprop"), "noprop_dt", cuts=["block2"], example=X)
    with pytest.raises(LayerwiseError, match="trains the model 'noprop_fm'"):
        Learner(net("noprop", depth=1), "noprop_fm", example=X)
    for rule in ("noprop_dt", "noprop_ct"):
        with pytest.raises(LayerwiseError, match=r"eta is 0\.0"):
            create_rule(rule, eta=0.0)
    with pytest.raises(LayerwiseError, match="steps is 0"):
        create_rule("noprop_fm", steps=0)
    with pytest.raises(LayerwiseError, match=r"sigma is -1"):
        create_rule("noprop_fm", sigma=-1)
    with pytest.raises(LayerwiseError, match="solver is 'rk4'"):
        Learner(net("noprop_ct"), create_rule("noprop_ct", solver="rk4"))
    with pytest.raises(LayerwiseError, match="label_size must be a whole number of at least 1"):
        models.NoProp(label_size=0)


# --- The rival


def test_backprops_blocks_mix_by_a_learned_share():
    """z_t = (1 - a) z_{t-1} + a u with a = tanh(w)."""
    model = models.create("noprop", (1, 8, 8), CLASSES, depth=2, width=2, mixing="learned").eval()
    block = model.block2
    z, x = torch.randn(3, CLASSES), torch.randn(3, 1, 8, 8)
    u = block.logits(z, x.flatten(1)).softmax(1)
    for weight in (0.0, 0.5, 40.0):
        torch.nn.init.constant_(block.weight, weight)
        p, r, same = block.parts(block(torch.cat([torch.zeros(3, CLASSES), z, x.flatten(1)], dim=1)))
        a = torch.tensor(weight).tanh()
        assert torch.allclose(p + r, (1 - a) * z + a * u)
        assert torch.equal(same, x.flatten(1))
    Learner(model, "backprop").step(x, torch.tensor([0, 1, 2]))
    with pytest.raises(LayerwiseError, match=r"no --cuts, --blocks or --model\.mixing"):
        Learner(model, "noprop_dt").step(x, torch.tensor([0, 1, 2]))
