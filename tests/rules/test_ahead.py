"""Heads that look ahead: what they read, what the moving average is, and that nothing else of a rule changes."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches, gone_on, net, problem, same_bits, trained
from support.own import decoder, text
from support.ranks import same_state
from support.stages import stages, through
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, Partition, rules
from layerwise.core.first_layer import first_layer
from layerwise.learner.state import joined

RULES = ("local_ce", "dgl", "infopro", "auglocal", "predsim")
DATA = batches(3)
X, Y = DATA[0]


def looking(rule, ahead, **options):
    return rules.create(rule, ahead=ahead, **options)


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_copies_start_as_the_next_block_and_the_rule_goes_on_to_the_same_bits(rule):
    model, one = net("resnet", 4), looking(rule, "both", **({"depth": 1} if rule == "auglocal" else {}))
    start = Learner(copy.deepcopy(model), one, example=X)
    found = {name for name, head in start.auxiliary.items() if hasattr(head, "learned")}
    assert found == {"0", "1", "2"}  # the block after the last one is the head
    for name in found:
        head, block = start.auxiliary[name], start.network.blocks[int(name) + 1]
        for made in (head.learned, head.average):
            assert all(torch.equal(a, b) for a, b in zip(made.parameters(), block.parameters(), strict=True))
    assert same_bits(trained(model, one, DATA), gone_on(model, one, DATA, stop=2))


@pytest.mark.parametrize("kind", ["resnet", "mlp", "vit"])
def test_a_head_reads_the_weighted_sum_of_both_copies(kind):
    learner = trained(net(kind, 4), looking("local_ce", "both"), DATA, lr=0.05)
    learner.network.eval()
    learner.auxiliary.eval()
    h = learner.network.blocks[0](X)
    head, site = learner.auxiliary["0"], learner.groups[0].units[0].site
    assert not torch.equal(head.scale, torch.ones(()))
    z = head.scale * head.learned(h) + (2 - head.scale) * head.average(h)
    z = z.mean((2, 3)) if z.dim() == 4 else z.mean(1) if z.dim() == 3 else z
    wanted = F.linear(z, head.head.weight, head.head.bias)
    assert torch.allclose(learner.rule.outputs_at(site, h, head, learner.task), wanted, atol=1e-6)
    assert torch.isclose(learner.evaluate(X, Y).blocks["block1"]["loss"], F.cross_entropy(wanted, Y))


@pytest.mark.parametrize("ahead", ["momentum", "both"])
def test_the_average_is_that_of_the_next_blocks_parameters_before_each_update(ahead):
    learner = Learner(net("resnet", 3), looking("dgl", ahead, ahead_momentum=0.7), lr=0.05, weight_decay=0.5, example=X)
    head, block = learner.auxiliary["0"], learner.network.blocks[1]
    average, norm = parameters(block), head.average[0].norm1
    for x, y in DATA:
        average = [0.7 * a + 0.3 * p for a, p in zip(average, parameters(block), strict=True)]
        learner.step(x, y)
        for found, wanted in zip(head.average.parameters(), average, strict=True):
            assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(parameters(head.average)[0], parameters(block)[0], atol=1e-3)
    # Running statistics are the copy's own.
    assert norm.num_batches_tracked == len(DATA)
    assert not torch.equal(norm.running_mean, block._model.block2.norm1.running_mean)
    assert not [name for name in learner.optimizer_states() if ".average." in name]


def test_the_average_moves_once_per_update_however_a_batch_is_split():
    model = net("mlp", 3)
    learner = Learner(model, looking("local_ce", "momentum", ahead_momentum=0.5), accumulate=2, micro=2, lr=0.1)
    seen = []
    for x, y in [*DATA, *DATA[:2]]:
        learner.step(x, y)
        seen.append(parameters(learner.auxiliary["0"].average)[0])
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [False, False, True, False]  # after the second update; in the first the layer was the copy itself
    learner.flush()
    assert not torch.equal(parameters(learner.auxiliary["0"].average)[0], seen[-1])


def test_a_copy_of_its_own_never_hears_of_the_next_block_and_an_average_does_once_it_has_learned():
    def first_block(ahead, steps):
        learner = Learner(net("mlp", 3), looking("local_ce", ahead, ahead_momentum=0.5), example=X, lr=0.05)
        with torch.no_grad():
            learner.network.blocks[1].parameters()[0].mul_(-2)
        for x, y in DATA[:steps]:
            learner.step(x, y)
        return learner.network.model.block1.linear.weight

    def untouched(ahead, steps):
        learner = trained(net("mlp", 3), looking("local_ce", ahead, ahead_momentum=0.5), DATA[:steps], lr=0.05)
        return learner.network.model.block1.linear.weight

    assert torch.equal(first_block("learned", 3), untouched("learned", 3))
    assert torch.equal(first_block("momentum", 1), untouched("momentum", 1))
    assert not torch.equal(first_block("momentum", 2), untouched("momentum", 2))


@pytest.mark.parametrize("rule", ["local_ce", pytest.param("infopro", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:the readouts of rule")
def test_working_memory_stays_flat_in_depth(rule):
    def held(depth):
        learner = Learner(net("vgg", depth, width=8), looking(rule, "both"))
        learner.step(*problem(32))
        _, use = learner.measured_step(*problem(32))
        return use.activations + use.gradients

    assert held(14) <= 1.01 * held(7)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_offloaded_blocks_have_the_same_bits(where):
    one, away = (trained(net("mlp", 5), looking("local_ce", "both"), DATA, offload=to) for to in ("none", where))
    a, b = one.state_dict(), away.state_dict()
    assert all(torch.equal(a[part][name], b[part][name]) for part in ("model", "auxiliary") for name in a[part])
    assert torch.equal(one(X), away(X))


def test_only_the_first_layer_of_a_longer_block_is_copied():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [Twice(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    parts = Partition(nn.Sequential(*layers), ["1", "7"])
    first = first_layer(parts.blocks[1])
    assert [type(m).__name__ for m in first.modules] == ["Conv2d", "BatchNorm2d", "ReLU", "Twice"]
    assert (first.whole, first.parameter_names()) == (False, ["2.weight", "2.bias", "3.weight", "3.bias"])
    for chain, size in (
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU())), 2),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 3),  # of several kinds: a layer itself
    ):
        model = nn.Sequential(nn.Linear(2, 2), chain, nn.Linear(2, 4))
        (found,) = first_layer(Partition(model, ["0", "1"]).blocks[1]).modules
        assert len(list(found.children())) == size
    learner = trained(parts.model, looking("dgl", "both"), DATA, cuts=["1", "7"])
    assert learner.auxiliary["0"].sample(torch.zeros(2, 4, 8, 8)).shape == (2, 6, 3, 3)
    assert learner.auxiliary["0"].average[1].num_batches_tracked == len(DATA)  # not by the pass that asks for the shape


def test_auglocal_copies_the_next_block_once():
    plain, ahead = (looking("auglocal", kind, depth=3, taper=0) for kind in ("none", "learned"))
    assert plain.chosen(0, 4) == plain.chosen(0, 4) == [1, 2, 3]
    counts = {}
    for rule in (plain, ahead):
        head = Learner(net("resnet", 4), rule, example=X).auxiliary["0"]
        counts[rule.ahead] = sum(type(m).__name__ == "BasicBlock" for m in head.modules())
    assert counts == {"none": 3, "learned": 3}


def test_a_model_that_is_cut_at_its_calls_looks_ahead_where_it_is_regular():
    batch, task = text(), LanguageModel()
    learner = Learner(decoder(), looking("local_ce", "both"), cuts="layers.*", task=task, lr=0.01)
    losses = [learner.step(batch).read() for _ in range(30)]
    assert losses[-1]["layers.0/loss"] < losses[0]["layers.0/loss"]
    names = learner.rule.followed(learner.groups[0].units[0].site)
    assert names and all(name.startswith("layers.1.") for name in names)


def test_what_cannot_be_copied_or_followed_is_refused_in_a_sentence():
    with pytest.raises(LayerwiseError, match="dgl's option ahead is 'next'"):
        Learner(net(), looking("dgl", "next"))

    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu())

    with pytest.raises(LayerwiseError, match="traced out of Traced, so its first layer cannot be copied"):
        Learner(Traced(), looking("local_ce", "learned"), cuts=["a", "b"]).step(torch.randn(4, 8), torch.arange(4))


@pytest.mark.parametrize(
    ("ahead", "kind", "ranks", "options"),
    [
        ("learned", "mlp", 2, {}),
        ("both", "resnet", 4, {}),
        ("momentum", "vit", 2, {"accumulate": 2}),
        ("both", "mlp", 2, {"offload": "host"}),
    ],
)
def test_stages_have_the_bits_of_one_process(ahead, kind, ranks, options):
    model, rule = net(kind, 4), looking("local_ce", ahead, ahead_momentum=0.7)
    one = trained(model, rule, DATA, **{**options, "offload": "none"})
    learners = stages(model, rule, ranks, X, **options)
    for x, y in DATA:
        through(learners, "step", x, y)
    held = [{n for n, p in learner.named_parameters() if not p.is_meta} for learner in learners]
    assert sum(map(len, held)) == len(set.union(*held)) == len(dict(one.named_parameters()))
    states = [copy.deepcopy(learner.state_dict()) for learner in learners]
    assert same_state(joined(states), one.state_dict())
    # What crosses: one layer for each boundary between ranks.
    layers = [learner.network.blocks[learner.groups[0].units[0].site.index] for learner in learners[1:]]
    size = sum(p.numel() * 4 for block in layers for p in block.parameters())
    assert learners[0].stage.sent_back == (0 if ahead == "learned" else size)
    for learner in (one, *learners):
        learner.flush()
    assert same_state(joined([copy.deepcopy(learner.state_dict()) for learner in learners]), one.state_dict())
