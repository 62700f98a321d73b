"""Rules for streams: hedge backpropagation and continual backpropagation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import KINDS, PLAIN_SGD, batches, gone_on, linear_blocks, net, problem, same_bits, trained, vectors
from support.own import decoder, text
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, Partition, create_rule
from layerwise.core.hidden_units import hidden_units
from layerwise.core.renewal import forget
from layerwise.core.tasks import Classification
from layerwise.rules.continual_backprop import UnitHistory
from layerwise.rules.hedge_backprop import HedgeWeights

DATA = batches(3)
X, Y = problem(32)


# --- Hedge backpropagation


def weights_of(learner):
    return [*learner.auxiliary.values()][-1].running_weights


def test_without_a_floor_a_weight_is_the_discount_to_the_sum_of_its_losses():
    losses, hedge = torch.tensor([[0.3, 2.0, 0.7], [1.0, 0.1, 0.5], [0.0, 3.0, 0.2]]), HedgeWeights(3)
    for row in losses:
        hedge.follow(row, discount=0.9, smoothing=0.0)
    expected = 0.9 ** losses.sum(0)
    torch.testing.assert_close(hedge.running_weights, expected / expected.sum())


def test_no_classifier_falls_under_the_floor_and_a_better_one_gets_the_weight_back():
    hedge, (s, n) = HedgeWeights(2), (0.2, 2)
    for _ in range(50):
        hedge.follow(torch.tensor([0.0, 9.0]), discount=0.5, smoothing=s)
    # The fixed point of a <- a / (a + s/N).
    torch.testing.assert_close(hedge.running_weights, torch.tensor([1 - s / n, s / n]))
    for _ in range(2):  # the first makes both as large as the floor
        hedge.follow(torch.tensor([9.0, 0.0]), discount=0.5, smoothing=s)
    assert hedge.running_weights.argmax() == 1


def test_the_weights_of_a_learner_follow_the_losses_of_its_classifiers():
    """By the definition: from the losses that each step reports, and that of the network's own output."""
    learner = Learner(net("mlp"), create_rule("hedge_backprop", discount=0.7, smoothing=0.3), example=X)
    expected = [1 / 3] * 3
    for x, y in DATA:
        with torch.no_grad():
            last = float(F.cross_entropy(learner.network.model(x), y))
        read = learner.step(x, y).read()
        losses = [read["block1/loss"], read["block2/loss"], last]
        assert read["head/depth"] == pytest.approx(sum(w * i for i, w in enumerate(expected, 1)), rel=1e-5)
        raised = [max(w * 0.7**loss, 0.1) for w, loss in zip(expected, losses, strict=True)]
        expected = [w / sum(raised) for w in raised]
        assert weights_of(learner).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_classifier_it_is_backpropagation_to_the_bit(kind):
    model = net(kind, depth=1, dropout=0.2)
    found = trained(model, "hedge_backprop", DATA)
    assert same_bits(found.network, trained(model, "backprop", DATA).network)


def test_a_block_follows_the_gradient_of_the_weighted_losses():
    model, (x, y) = linear_blocks(), vectors()
    cuts = {"cuts": ["0", "1", "2"], "example": x}
    learner = Learner(model, create_rule("hedge_backprop", discount=0.1, smoothing=0.0), **PLAIN_SGD, **cuts)
    learner.step(x, y)  # so that the weights differ
    alpha, first = weights_of(learner).clone(), model[0].weight
    h, losses = x, []
    for block, classifier in zip(model[:2], learner.auxiliary.values(), strict=False):
        h = block(h)
        losses.append(F.cross_entropy(classifier.readout(h), y))
    losses.append(F.cross_entropy(model[3](model[2](h)), y))
    weighted = sum(a * loss for a, loss in zip(alpha, losses, strict=True))
    (gradient,) = torch.autograd.grad(weighted, first)
    before = first.detach().clone()
    learner.step(x, y)
    assert alpha.std() > 0.01
    torch.testing.assert_close(first.detach(), before - 0.1 * gradient)


def test_the_prediction_is_the_weighted_sum_of_the_classifiers_probabilities():
    learner = trained(net("mlp"), create_rule("hedge_backprop", discount=0.5), DATA)
    model = learner.network.model.eval()
    with torch.no_grad():
        h1 = model.block1(X)
        h2 = model.block2(h1)
        outputs = [learner.auxiliary["0"].readout(h1), learner.auxiliary["1"].readout(h2), model(X)]
        expected = sum(w * z.softmax(-1) for w, z in zip(weights_of(learner), outputs, strict=True))
        torch.testing.assert_close(learner(X).softmax(-1), expected)
        loss = F.nll_loss(expected.log(), Y)
    assert learner.evaluate(X, Y).read()["head/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_labels_per_position_need_the_task_of_positions():
    x, y = torch.randint(8, (4, 5)), torch.randint(8, (4, 5))
    model = torch.nn.Sequential(torch.nn.Embedding(8, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 8))
    learner = Learner(model, "hedge_backprop", cuts=["0", "1"], task=Classification(8), example=x)
    with pytest.raises(LayerwiseError, match="language model"):
        learner.step(x, y)


# --- Hidden units


def of(model, *cuts):
    return hidden_units(Partition(model, list(cuts or model.block_names)))


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("mlp", {1: [16], 2: [16], 3: [16]}),
        ("vgg", {1: [4], 2: [8], 3: [16]}),
        ("vit", {0: [32], 1: [32], 2: [32]}),  # of the perceptrons; tokens and queries are read in several places
        ("resnet", {0: [4], 1: [8], 2: [16]}),
    ],
)
def test_units_are_outputs_that_one_layer_alone_reads(kind, counts):
    found = {}
    for units in of(net(kind)):
        found.setdefault(units.site, []).append(units.count)
    assert found == counts


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit", "resnet"])
def test_a_renewed_unit_does_not_move_the_output(kind):
    """The output is that without the unit: its new incoming weights reach nothing."""
    model = net(kind).eval()
    units = of(model)[1]
    chosen = torch.arange(units.count) == 1
    before = model(X)
    with torch.no_grad():
        units.reader.weight[:, 1] = 0
    without, incoming = model(X), units.layer.weight.detach().clone()
    units.renew(chosen, torch.Generator().manual_seed(0))
    assert not torch.equal(before, without)
    torch.testing.assert_close(model(X), without, rtol=0, atol=1e-6)
    new = units.layer.weight[1]
    assert new.abs().max() <= new.numel() ** -0.5 and new.abs().max() > 0.5 * new.numel() ** -0.5
    assert torch.equal(units.layer.weight[~chosen], incoming[~chosen])


def test_a_channel_that_is_flattened_has_all_weights_of_its_pixels():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 4))
    (units,) = of(model, "1")
    units.renew(torch.tensor([False, True, False]), torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = model[3](model[:3](X).unflatten(1, (3, 36)).index_fill(1, torch.tensor(1), 0).flatten(1))
        torch.testing.assert_close(model(X), without)
        assert (model[3].weight == 0).sum() == 4 * 36
        h = model[:2](X)
        torch.testing.assert_close(units.activity(model[2](h)), h.abs().mean((0, 2, 3)))
        torch.testing.assert_close(units.outgoing(), model[3].weight.unflatten(1, (3, 36)).abs().mean((0, 2)))


def test_norms_and_biases_of_a_renewed_unit_start_anew_and_the_pairs_name_what_did():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for tensor in [*model[0].parameters(), *model[1].parameters(), *list(model[1].buffers())[:2]]:
            tensor.fill_(7.0)
    (units,) = of(model, "2")
    chosen = torch.tensor([False, False, True])
    pairs = units.renew(chosen, torch.Generator().manual_seed(0))
    norm = model[1]
    for tensor, value in [
        *((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)),
        (model[0].bias, 0),
    ]:
        assert tensor.tolist() == [7, 7, value]
    expected = {model[0].weight: 4, model[0].bias: 1, norm.weight: 1, norm.bias: 1, model[3].weight: 2}
    assert {parameter: int(mask.sum()) for parameter, mask in pairs} == expected
    assert all(mask.shape == parameter.shape for parameter, mask in pairs)


class Reading(nn.Module):
    def __init__(self, twice):
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), twice

    def forward(self, x):
        h = F.relu(self.first(x))
        return self.second(h) + (h if self.twice else x)


def tied():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), nn.Linear(4, 2))


again = nn.Linear(4, 4)
NONE = {
    "read twice": nn.Sequential(Reading(twice=True), nn.Linear(4, 2)),
    "mixed": nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)),
    "halved": nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 2)),
    "tied": tied(),
    "run twice": nn.Sequential(again, nn.ReLU(), again, nn.ReLU(), nn.Linear(4, 2)),
    "per channel": nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4)),
    "columns": nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("model", NONE.values(), ids=NONE.keys())
def test_what_another_layer_may_read_too_is_no_unit(model):
    assert of(model, str(len(model) - 2)) == []
    assert len(of(nn.Sequential(Reading(twice=False), nn.Linear(4, 2)), "0")) == 1


# --- Continual backpropagation


def histories(learner):
    return [history for modules in learner.auxiliary.values() for history in modules]


@pytest.mark.parametrize("kind", KINDS)
def test_without_replacement_it_is_backpropagation_to_the_bit(kind):
    model = net(kind, dropout=0.2)
    expected = trained(model, "backprop", DATA).network
    for options in ({"replacement_rate": 0.0}, {"maturity": 3, "replacement_rate": 1.0}):  # the second: none is mature
        assert same_bits(trained(model, create_rule("continual_backprop", **options), DATA).network, expected)


def test_utility_is_the_running_mean_of_activity_times_outgoing_weights():
    learner = Learner(net("mlp"), create_rule("continual_backprop", decay=0.8), example=X)
    expected = 0.0
    for x, y in DATA:
        with torch.no_grad():
            h = learner.network.model.block1(x)
            own = h.abs().mean(0) * learner.network.model.block2.linear.weight.abs().mean(0)
        expected = 0.8 * expected + 0.2 * own
        learner.step(x, y)
    first = histories(learner)[0]
    torch.testing.assert_close(first.running_utility, expected)
    torch.testing.assert_close(first.utility(0.8), expected / (1 - 0.8**3))
    assert first.running_age.tolist() == [3] * 16


def test_the_mature_unit_of_least_utility_is_replaced_and_all_other_weights_are_those_of_backpropagation():
    model, (x, y) = net("mlp", activation="tanh"), DATA[0]
    with torch.no_grad():
        model.block2.linear.weight[:, 5] *= 1e-3  # the unit 5 of the first block contributes least
    rule = create_rule("continual_backprop", replacement_rate=1.5 / 16, maturity=0)
    learner = Learner(copy.deepcopy(model), rule, example=X)
    learner.step(x, y)
    found, plain = learner.network.model, trained(model, "backprop", DATA[:1]).network.model
    others = torch.arange(16) != 5
    for layer in (found.block1.linear, plain.block1.linear):
        assert bool(layer.bias[5]) == (layer is plain.block1.linear)
    assert torch.equal(found.block1.linear.weight[others], plain.block1.linear.weight[others])
    assert not torch.equal(found.block1.linear.weight[5], plain.block1.linear.weight[5])
    assert (found.block2.linear.weight[:, 5] == 0).all() and (plain.block2.linear.weight[:, 5] != 0).all()
    first = histories(learner)[0]
    assert torch.equal(first.running_age, others.float()) and torch.equal(first.running_utility > 0, others)
    assert float(first.running_due) == 0.5
    state = learner.groups[0].optimizers[0].state
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal((state[found.block1.linear.weight][moment] != 0).any(1), others)
        assert not state[found.block2.linear.weight][moment][:, 5].any()
        assert state[found.block2.linear.weight][moment][:, 6].any()


def test_as_many_units_are_replaced_as_the_rate_says_and_none_before_it_is_mature():
    history, replaced = UnitHistory(10, seed=0), 0
    for batch in range(1, 41):
        history.follow(torch.arange(10.0), decay=0.9)
        before = history.running_age.clone()
        chosen = history.choose(rate=0.02, maturity=20, decay=0.9)
        assert batch > 20 or not chosen.any()
        assert (before[chosen] > 20).all()
        history.restart(chosen)
        replaced += int(chosen.sum())
    # 20 steps of 10 mature units at first, of one less from every replacement on, one per step at most.
    assert replaced == 3 and history.running_age.sort().values[:3].max() < 20


def test_a_run_with_replacements_goes_on_from_its_state_to_the_same_bits():
    model, rule = net("mlp"), create_rule("continual_backprop", replacement_rate=0.1, maturity=1)
    data = batches(6)
    straight = trained(model, rule, data)
    assert any(bool((history.running_age < 6).any()) for history in histories(straight))
    assert same_bits(gone_on(model, rule, data, 3), straight)


def test_replacements_are_drawn_by_the_seed_and_leave_no_trace_in_the_generators():
    rule, state = create_rule("continual_backprop", replacement_rate=1.0, maturity=0), torch.get_rng_state()
    a, b, c = (trained(net("mlp"), rule, DATA[:1], seed=seed).network.model for seed in (0, 0, 1))
    assert same_bits(a, b) and not same_bits(a[0], c[0])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    learner = Learner(net("mlp"), rule, example=X)
    torch.set_rng_state(state)
    learner.step(X, Y)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_layers_keep_their_units():
    model = net("mlp")
    model.block1.linear.weight.requires_grad_(False)
    before = model.block1.linear.weight.clone()
    learner = Learner(model, create_rule("continual_backprop", replacement_rate=1.0, maturity=0), example=X)
    learner.step(X, Y)
    assert torch.equal(model.block1.linear.weight, before)
    assert model.block2.linear.weight.abs().sum(0).all()
    assert not model.block3.linear.weight.any()


def test_a_network_without_hidden_units_and_state_that_cannot_be_reset_are_refused():
    with pytest.raises(LayerwiseError, match="no hidden units"):
        Learner(NONE["mixed"], "continual_backprop", cuts=["1"], example=torch.zeros(2, 4))

    class Averaging(torch.optim.SGD):
        def train(self):
            """As schedule-free optimizers have it."""

    with pytest.raises(LayerwiseError, match="Averaging holds weights"):
        Learner(net(), "continual_backprop", optimizer=Averaging, lr=0.1, example=X)

    class Coded(torch.Tensor):
        pass

    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight]["code"] = torch.zeros(2).as_subclass(Coded)
    with pytest.raises(LayerwiseError, match="SGD keeps its state as Coded"):
        forget([optimizer], weight, torch.tensor([True, False]))


class Summed(nn.Module):
    """No chain: its forward is its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = torch.tanh(self.one(x))
        return self.three(torch.relu(self.two(h)) + 1)


def test_units_of_a_traced_model_are_seen_at_the_block_that_reads_them():
    x, y = (t.float() if t.is_floating_point() else t for t in vectors())
    learner = Learner(Summed(), create_rule("continual_backprop", decay=0.0), cuts=["one"], example=x)
    assert [units.site for units in hidden_units(learner.network)] == [1]  # of the second layer a sum is read
    model = learner.network.model
    with torch.no_grad():
        expected = torch.tanh(model.one(x)).abs().mean(0) * model.two.weight.abs().mean(0)
    learner.step(x, y)
    torch.testing.assert_close(histories(learner)[0].running_utility, expected)


def test_units_of_a_model_that_is_cut_at_its_calls_are_those_of_its_perceptrons():
    batch, task = text(), LanguageModel()
    rule = create_rule("continual_backprop", replacement_rate=1.0, maturity=0)
    learner = Learner(decoder(), rule, cuts="layers.*", output="logits", task=task, example=batch["tokens"])
    assert [(units.site, units.count) for units in hidden_units(learner.network)] == [(0, 32), (1, 32), (2, 32)]
    learner.step(batch["tokens"], batch["labels"])
    assert not any(layer.down.weight.any() for layer in learner.network.model.layers)
