"""SID: gradients and minima in closed form, the cascade against one summed backward pass, the trunk of the engine."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, batches, cascade, net, problem, same_bits, trained, wide
from torch import nn

from layerwise import Classification, LayerwiseError, Learner, create_rule
from layerwise.core.rule import BlockContext, Site
from layerwise.measure.beliefs import Cascade, alphas, least_loss, minimiser
from layerwise.rules.sid import EXTRACTOR, BeliefHead, divergences, log_softmax, uniform_belief

SGD = {"optimizer": torch.optim.SGD, "weight_decay": 0.0}
DIRECTIONS = ("forward", "reverse")
X, Y = batches(1)[0]


def random_logits(samples=6, seed=0):
    return torch.randn(samples, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(direction, samples=6):
    task = Classification(CLASSES, label_smoothing=0.2 if direction == "reverse" else 0.0)
    return task.distribution(torch.arange(samples) % CLASSES).double()


def objective(log_p, log_before, target, alpha, direction):
    label, consistency = divergences(log_p, log_before, target, direction)
    return alpha * label + (1 - alpha) * consistency


# --- The objective


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_the_gradient_on_the_logits_is_the_belief_less_the_arithmetic_mix(alpha):
    logits, log_before, target = (
        random_logits().requires_grad_(),
        random_logits(seed=1).log_softmax(-1),
        targets("forward"),
    )
    objective(logits.log_softmax(-1), log_before, target, alpha, "forward").sum().backward()
    mix = alpha * target + (1 - alpha) * log_before.exp()
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - mix, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_the_gradient_in_the_reverse_direction_vanishes_at_the_geometric_mix_only(alpha):
    """d/du KL(softmax(u) || m) = p (log p - log m - KL), with m the normalised geometric mix."""
    logits, log_before, target = (
        random_logits().requires_grad_(),
        random_logits(seed=1).log_softmax(-1),
        targets("reverse"),
    )
    objective(logits.log_softmax(-1), log_before, target, alpha, "reverse").sum().backward()
    log_mix = (alpha * target.log() + (1 - alpha) * log_before).log_softmax(-1)
    log_p = logits.detach().log_softmax(-1)
    distance = (log_p.exp() * (log_p - log_mix)).sum(-1, keepdim=True)
    assert torch.allclose(logits.grad, log_p.exp() * (log_p - log_mix - distance), atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_what_lies_above_the_least_loss_is_the_divergence_from_the_minimiser(direction, alpha):
    log_p, log_before, target = (*(random_logits(seed=s).log_softmax(-1) for s in (0, 1)), targets(direction))
    log_mix = minimiser(log_before, target, alpha, direction)
    assert torch.allclose(log_mix.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    excess = objective(log_p, log_before, target, alpha, direction) - least_loss(log_before, target, alpha, direction)
    if direction == "forward":
        expected = (torch.special.entr(log_mix.exp()) * -1 - log_mix.exp() * log_p).sum(-1)
    else:
        expected = (log_p.exp() * (log_p - log_mix)).sum(-1)
    assert torch.allclose(excess, expected, atol=1e-12)
    assert (excess >= 0).all()


def test_the_exact_reverse_cascade_is_a_power_of_the_target():
    """p_L is proportional to y^(1 - (1-a)^L) p_0^((1-a)^L)."""
    target, belief, alpha = targets("reverse"), random_logits().log_softmax(-1), 0.4
    start = belief
    for _ in range(7):
        belief = minimiser(belief, target, alpha, "reverse")
    left = (1 - alpha) ** 7
    assert torch.allclose(belief, ((1 - left) * target.log() + left * start).log_softmax(-1), atol=1e-12)


@pytest.mark.parametrize(("classes", "modules", "value"), [(10, 5, 0.860), (10, 10, 0.879), (100, 8, 1.058)])
def test_the_loss_at_the_fixed_point_and_at_the_start(classes, modules, value):
    assert Cascade(classes, modules).fixed_point_loss() == pytest.approx(value, abs=1e-3)
    assert Cascade(classes, modules).first_loss() == pytest.approx(modules * 0.5 * math.log(classes))
    assert Cascade(classes, modules).first_loss() > Cascade(classes, modules).fixed_point_loss()


def test_the_fixed_point_is_not_the_smallest_sum():
    """Without stopgrad one can go below it, which is why it is no bound of the summed loss."""
    classes, modules, target = 10, 5, torch.eye(10, dtype=torch.float64)[0]
    belief = uniform_belief(target, classes)
    path = [minimiser(belief, target, 0.5)]
    for _ in range(modules - 1):
        path.append(minimiser(path[-1], target, 0.5))

    def total(path):
        found = [objective(p, q, target, 0.5, "forward") for p, q in zip(path, [belief, *path[:-1]], strict=True)]
        return float(sum(found))

    assert total(path) == pytest.approx(Cascade(classes, modules).fixed_point_loss())
    surer = [(p * torch.where(target > 0, 1.0, 1.2)).log_softmax(-1) for p in path]
    assert total(surer) < total(path)


def test_alpha_over_depth():
    assert alphas(0.5, 3) == [0.5, 0.5, 0.5]
    assert alphas((1.0, 0.2), 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert alphas((0.9, 0.1, 0.5, 0.7), 4) == pytest.approx([0.9, 0.1, 0.5, 0.7])


@pytest.mark.parametrize("rule", ["sid", "sid_cascade"])
@pytest.mark.parametrize("count", [2, 5])
def test_every_belief_has_its_own_alpha_from_a_list(rule, count):
    """One number per belief: the loss of each is that of its number."""
    listed = tuple(0.1 + 0.8 * i / count for i in range(count))
    made = create_rule(rule, alpha=listed)
    blocks = count if rule == "sid" else count + EXTRACTOR - 1
    sites = [Site(i, blocks, "") for i in range(blocks + 1)]
    places = [made.place(site) for site in sites if made.place(site) is not None]
    assert [place.index for place in places] == list(range(count))
    assert {place.blocks for place in places} == {count}


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("sid", {"alpha": 0.0}, "alpha is 0.0"),
        ("sid", {"alpha": (0.5, 1.5)}, "alpha is 1.5"),
        ("sid", {"alpha": ()}, r"alpha is \(\)"),
        ("sid", {"hidden": -1}, "hidden is -1"),
        ("sid", {"group": 0}, "group is 0"),
        ("sid_cascade", {"alpha": -1.0}, "alpha is -1.0"),
    ],
)
def test_wrong_options_are_refused(rule, options, words):
    with pytest.raises(LayerwiseError, match=words):
        create_rule(rule, **options)


@pytest.mark.parametrize(
    ("rule", "kind"), [("sid", "mlp"), pytest.param("sid_cascade", "sid_cascade", marks=pytest.mark.slow)]
)
def test_the_reverse_direction_wants_a_target_without_zeros(rule, kind):
    with pytest.raises(LayerwiseError, match="label_smoothing"):
        Learner(net(kind), create_rule(rule, direction="reverse"), example=X)
    learner = Learner(net(kind), create_rule(rule, direction="reverse"), label_smoothing=0.1, lr=0.01)
    x, y = problem(64)
    losses = [learner.step(x, y).read()["head/loss"] for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_cascades_rule_refuses_another_model():
    for kind in ("mlp", "vgg"):
        with pytest.raises(LayerwiseError, match="for any other network use rule 'sid'"):
            Learner(net(kind), "sid_cascade", example=X)
    with pytest.raises(LayerwiseError, match="no --cuts"):
        Learner(cascade(), "sid_cascade", cuts=["extractor2", "module2"], example=wide(X))


def test_other_rules_have_no_beliefs():
    with pytest.raises(LayerwiseError, match="has no beliefs"):
        Learner(net("mlp"), "sll").beliefs(X)


# --- The belief stack


def test_the_stack_starts_as_the_plain_network_does():
    """V is zero at first, so that the last belief is the network's softmax."""
    model = net("mlp")
    learner = Learner(model, "sid", example=X)
    assert torch.allclose(learner(X).softmax(-1), model.eval()(X).softmax(-1), atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("group", [1, 2])
def test_the_stack_by_hand(hidden, group):
    """One SGD step of every block against autograd with stopgrad beliefs and detached blocks."""
    model = net("mlp", depth=4).double()
    rule = create_rule("sid", hidden=hidden, group=group, alpha=(0.9, 0.3))
    learner = Learner(copy.deepcopy(model), rule, lr=0.5, **SGD, example=wide(X))
    heads = copy.deepcopy(learner.auxiliary)
    with torch.no_grad():  # V not zero, so that its part is seen
        draw = torch.randn(CLASSES, CLASSES, dtype=torch.float64)
        heads["4"].weight.copy_(draw)
        learner.auxiliary["4"].weight.copy_(draw)
    learner.step(wide(X), Y)

    weights = alphas((0.9, 0.3), 4 // group)
    target = F.one_hot(Y, CLASSES).double()
    before, h, total = uniform_belief(target, CLASSES), wide(X), 0.0
    for i, name in enumerate(model.block_names):
        h = model.get_submodule(name)(h)
        if i == 3:
            logits = model.head(h) + before.exp() @ heads["4"].weight.T
        elif (i + 1) % group == 0:
            inputs = torch.cat([before.exp(), h], -1)
            layers = heads[str(i)].layers
            logits = layers(inputs) if hidden else F.linear(inputs, layers.weight, layers.bias)
            h = h.detach()
        else:
            continue
        log_p = logits.log_softmax(-1)
        total = total + objective(log_p, before, target, weights.pop(0), "forward").mean()
        before = log_p.detach()
    total.backward()
    expected = [*model.parameters(), *heads.parameters()]
    found = [*learner.network.parameters(), *learner.auxiliary.parameters()]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b - 0.5 * b.grad, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_the_beliefs_of_prediction_are_those_of_training(kind):
    """Without an update in between: what `beliefs` gives is what the rule passed on."""
    seen = []

    class Spy(type(create_rule("sid"))):
        def distil(self, at, logits, log_before):
            signal = super().distil(at, logits, log_before)
            seen.append(signal.message.detach())
            return signal

    learner = Learner(net(kind), Spy(), example=X)
    beliefs = learner.beliefs(X)
    assert torch.allclose(beliefs[0].exp(), torch.full((len(X), CLASSES), 1 / CLASSES))
    seen.clear()
    learner.evaluate(X, Y)
    assert len(beliefs) == len(seen) + 1 == 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(beliefs[1:], seen, strict=True))
    assert torch.equal(learner(X), beliefs[-1])


def test_labels_per_position_need_every_position():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    x, y = torch.randn(2, 7, 5), torch.randint(CLASSES, (2, 7))
    with pytest.raises(LayerwiseError, match='set pool="none"'):
        Learner(copy.deepcopy(model), "sid").step(x, y)
    learner = Learner(model, create_rule("sid", pool="none"), lr=0.01)
    first = learner.step(x, y).loss
    for _ in range(20):
        last = learner.step(x, y).loss
    assert last < first
    assert [belief.shape for belief in learner.beliefs(x)] == [(2, 7, CLASSES)] * 3


def test_a_belief_head_sees_the_belief():
    head = BeliefHead(CLASSES, 3, hidden=0, dtype=torch.float32)
    features = torch.randn(2, 3)
    first = head(uniform_belief(features, CLASSES), features)
    moved = head(log_softmax(torch.eye(CLASSES)[:2] * 5), features)
    expected = (log_softmax(torch.eye(CLASSES)[:2] * 5).exp() - 1 / CLASSES) @ head.layers.weight[:, :CLASSES].T
    assert torch.allclose(moved - first, expected, atol=1e-6)


# --- The cascade


def by_hand(model, x, y, alpha, direction, task, weights):
    """The authors' way: all losses on stopgrad beliefs, one backward pass of their sum.

    `weights` multiply what flows from each module into the features; parameters of the modules get their own loss.
    """
    classes = task.classes
    modules = [*(m for name, m in model.named_children() if name.startswith("module")), model.head]
    state = model.extractor2(model.extractor1(x))
    z, before, total = state[:, classes:], state[:, :classes].detach(), 0.0
    beliefs = [before]
    for i, (module, weight) in enumerate(zip(modules, weights, strict=True)):
        lent = z.detach() + weight * (z - z.detach())
        log_p = module.logits(torch.cat([before, lent], -1)).log_softmax(-1)
        loss = objective(log_p, before, task.distribution(y).double(), alphas(alpha, len(modules))[i], direction)
        total = total + loss.mean()
        before = log_p.detach()
        beliefs.append(before)
    total.backward()
    return beliefs


WEIGHTS = {"sum": [1.0] * 4, "mean": [0.25] * 4, "last": [0.0, 0.0, 0.0, 1.0]}


@pytest.mark.parametrize("extractor", WEIGHTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_module_after_module_gives_the_gradients_of_one_summed_backward_pass(extractor, direction):
    model, smoothing = cascade(), 0.1
    rule = create_rule("sid_cascade", extractor=extractor, direction=direction, alpha=(0.9, 0.4))
    learner = trained(model, rule, [(wide(X), Y)], lr=0.5, label_smoothing=smoothing, **SGD)
    by_hand(model, wide(X), Y, (0.9, 0.4), direction, Classification(CLASSES, smoothing), WEIGHTS[extractor])
    assert all(p.grad.norm() > 0 for p in model.parameters())
    for a, b in zip(learner.network.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b - 0.5 * b.grad, atol=1e-6, rtol=0)


def test_what_is_passed_on_is_what_the_papers_first_phase_would_have_computed():
    """A module's belief goes on before the module is updated."""
    seen = []

    class Spy(type(create_rule("sid_cascade"))):
        def distil(self, at, logits, log_before):
            seen.append(log_before)
            return super().distil(at, logits, log_before)

    model = cascade()
    learner = Learner(model, Spy(), lr=0.5, **SGD, example=wide(X))
    with torch.no_grad():
        first_phase = list(learner.rule.beliefs(learner.network, {}, wide(X)))
    learner.step(wide(X), Y)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen, first_phase[:-1], strict=True))
    assert not torch.allclose(learner.beliefs(wide(X))[1], first_phase[1])  # the update moved them afterwards


@pytest.mark.parametrize(("extractor", "share"), [("sum", 1.0), ("mean", 0.25), ("last", None)])
def test_what_goes_back_is_a_share_of_the_features_gradient_and_none_of_the_beliefs(extractor, share):
    rule, gradient = create_rule("sid_cascade", extractor=extractor), torch.randn(5, CLASSES + 7)
    found = rule.to_trunk(Site(2, 5, "module1"), gradient, Classification(CLASSES))
    if share is None:
        assert found is None
        found, share = rule.to_trunk(Site(5, 5, "head"), gradient, Classification(CLASSES)), 1.0
    assert torch.equal(found[:, :CLASSES], torch.zeros(5, CLASSES))
    assert torch.allclose(found[:, CLASSES:], share * gradient[:, CLASSES:])


def test_plain_forward_is_the_cascade():
    model = cascade().eval()
    beliefs = by_hand(model, wide(X), Y, 0.5, "forward", Classification(CLASSES), [1.0] * 4)
    assert torch.allclose(model(wide(X)).log_softmax(-1), beliefs[-1])
    found = Learner(model, "sid_cascade").beliefs(wide(X))
    assert all(torch.allclose(a, b) for a, b in zip(found, beliefs, strict=True))


def test_a_local_extractor_feels_no_module():
    model, other = cascade(), cascade()
    with torch.no_grad():
        other.module1.hidden.weight.mul_(-2)
        other.head.out.weight.mul_(-2)
    local = create_rule("sid_cascade", extractor="local")
    assert (local.locality, local.has_trunk()) == ("local", False)
    a, b = (trained(m, local, [(wide(X), Y)] * 2).network.model for m in (model, other))
    assert same_bits(a.extractor1, b.extractor1)
    assert same_bits(a.extractor2, b.extractor2)
    assert not torch.equal(a.extractor1.conv1.weight, model.extractor1.conv1.weight)
    assert create_rule("sid_cascade").locality == "interlocking"


def test_a_local_extractors_halves_learn_from_heads_of_their_own():
    model = cascade()
    learner = Learner(copy.deepcopy(model), create_rule("sid_cascade", extractor="local"), lr=0.5, **SGD)
    learner.build(wide(X))
    heads = copy.deepcopy(learner.auxiliary)
    learner.step(wide(X), Y)
    h = model.extractor1(wide(X))
    F.cross_entropy(heads["0"](h.mean((2, 3))), Y).backward()
    state = model.extractor2(h.detach())
    F.cross_entropy(heads["1"](state[:, CLASSES:]), Y).backward()
    for name in ("extractor1", "extractor2"):
        after = learner.network.model.get_submodule(name)
        for a, b in zip(after.parameters(), model.get_submodule(name).parameters(), strict=True):
            assert torch.allclose(a, b - 0.5 * b.grad, atol=1e-6)


def held(rule, depth):
    learner = Learner(net("sid_cascade", depth=depth, width=32), rule)
    x, y = problem(32)
    learner.step(x, y)
    _, use = learner.measured_step(x, y)
    return use.activations + use.gradients


@pytest.mark.parametrize(
    "extractor",
    ["sum", pytest.param("mean", marks=pytest.mark.slow), pytest.param("last", marks=pytest.mark.slow), "local"],
)
def test_memory_does_not_grow_with_the_number_of_modules(extractor):
    rule = create_rule("sid_cascade", extractor=extractor)
    assert held(rule, 32) <= 1.01 * held(rule, 4)


def test_one_backward_pass_of_the_cascade_does_grow():
    assert held("backprop", 32) > 1.2 * held("backprop", 4)


def test_a_cascade_of_one_module_with_alpha_one_is_backprop():
    """One module, the label alone: the trunk and the head together are the network."""
    model = cascade(depth=1)
    data = [(wide(x), y) for x, y in batches(3)]
    a = trained(model, create_rule("sid_cascade", alpha=1.0), data, lr=0.1, **SGD)
    b = trained(model, "backprop", data, lr=0.1, **SGD)
    for p, q in zip(a.network.parameters(), b.network.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-9)


def test_without_modules_the_model_is_a_linear_head_on_the_extractor():
    model = cascade(depth=0)
    assert model.block_names == ("extractor1", "extractor2")
    z = model.extractor2(model.extractor1(wide(X)))[:, CLASSES:]
    assert torch.allclose(model(wide(X)), model.head.linear(z))
    assert trained(model, "backprop", [(wide(X), Y)]).steps == 1


def test_metrics_of_a_belief():
    """`descent` is the share of samples with the inequality; KL and consistency are means over the batch."""
    rule, task = create_rule("sid"), Classification(CLASSES)
    logits, before = random_logits(), random_logits(seed=1).log_softmax(-1)
    y = torch.arange(6) % CLASSES
    at = BlockContext(Site(1, 3, "b"), logits, logits, before, y, task, None, training=False)
    found = rule.distil(at, logits, before)
    log_p = logits.log_softmax(-1)
    label, label_before = (-t[torch.arange(6), y] for t in (log_p, before))
    consistency = (before.exp() * (before - log_p)).sum(-1)
    assert torch.allclose(found.metrics["label_kl"], label.mean())
    assert torch.allclose(found.metrics["consistency"], consistency.mean())
    assert torch.allclose(found.loss, (label + consistency).mean() / 2)
    assert float(found.metrics["descent"]) == pytest.approx(
        float((label <= label_before - consistency).double().mean())
    )
    assert float(found.metrics["entropy"]) == pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()))
    assert {"entropy", "descent"}.isdisjoint(rule.distil(replace(at, training=True), logits, before).metrics)
