"""The forward-only pipeline: the bits of one process."""

import copy
import itertools
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support.jobs import (
    PIPELINE,
    TINY,
    run,
)
from support.nets import KINDS, batches, by_family, net, problem, same_bits, trained
from support.ranks import same_state
from support.stages import stages, through
from torch import nn
from torch.utils._pytree import tree_leaves

from layerwise import LayerwiseError, Learner, rules
from layerwise.core.cost import balanced_ends
from layerwise.data import Batches, InMemorySource
from layerwise.learner.state import joined
from layerwise.parallel.serialization import TensorSpec, encode
from layerwise.parallel.stage import Stage
from layerwise.parallel.transport import TreeBuffers
from layerwise.runs.pipelined import PipelineRun


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["sll", "sid", "local_ce"])
def test_stages_have_the_bits_of_one_process(rule, kind, ranks):
    rule = rules.create(rule, **({"dropout": 0.2} if rule == "sll" else {}))
    model = net(kind, 4, **({} if kind == "vgg" else {"dropout": 0.2}))
    data = batches(3)
    one = trained(model, rule, data)
    learners = stages(model, rule, ranks, data[0][0])
    for x, y in data:
        through(learners, "step", x, y)
    assert same_state(joined([learner.state_dict() for learner in learners]), one.state_dict())
    x, y = problem(24, seed=5)
    assert same_state(through(learners, "evaluate", x, y), one.evaluate(x, y).blocks)
    # No rank holds anything of another one's.
    held = [{n for n, p in learner.named_parameters() if not p.is_meta} for learner in learners]
    assert sum(map(len, held)) == len(set.union(*held)) == len(dict(one.named_parameters()))


@pytest.mark.parametrize("name", by_family(name for name in rules.names() if name != "sid_cascade"))
def test_a_rule_is_served_to_the_same_bits_or_refused(name):
    model, data = net("mlp", 4), batches(2)
    # graph_forward begins with the network's graph, NoProp with its embeddings.
    if (rules.get(name).locality != "local" and name != "solo") or name.startswith(("graph_forward", "noprop")):
        with pytest.raises(LayerwiseError, match=f"{name!r} cannot be trained by a pipeline, because"):
            stages(model, name, 2, data[0][0])
        return
    learners = stages(model, name, 2, data[0][0])
    for x, y in data:
        through(learners, "step", x, y)
    state = joined([learner.state_dict() for learner in learners])
    assert same_state(state, trained(model, name, data).state_dict())


FAMILIES = [
    ("forward_forward", {"peer": 0.03}),
    ("forward_forward", {"predictor": "softmax", "loss": "symba"}),
    ("forward_forward", {"predictor": "softmax", "negatives": "hybrid"}),
    ("layer_collaboration", {}),
    ("mono_forward", {"predictor": "sum"}),
    ("mono_forward", {}),
    ("boosted", {"updates": 1}),
    ("ssl_local", {}),
    ("scalable_ff", {}),
    ("scalable_ff", {"predictor": "last"}),
]


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        pytest.param("mlp", 2, marks=pytest.mark.slow),
        ("mlp", 4),
        pytest.param("vgg", 4, marks=pytest.mark.slow),
        pytest.param("vit", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("rule", "options"), FAMILIES)
def test_rules_that_make_samples_or_add_up_votes_have_the_bits_of_one_process(rule, options, kind, ranks):
    rule = rules.create(rule, **options)
    model, data = net(kind, 4), batches(3)
    one = trained(model, rule, data)
    learners = stages(model, rule, ranks, data[0][0])
    for x, y in data:
        through(learners, "step", x, y)
    assert same_state(joined([learner.state_dict() for learner in learners]), one.state_dict())
    x, y = problem(24, seed=5)
    expected = one.evaluate(x, y).blocks
    assert same_state(through(learners, "evaluate", x, y), expected)
    # What is evaluated is what is predicted.
    assert expected["head"]["accuracy"] == (one(x).argmax(1) == y).float().mean()


@pytest.mark.parametrize(
    ("rule", "options", "why"),
    [
        ("forward_forward", {"negatives": "hard"}, "its locality is 'broadcast'"),
        ("layer_collaboration", {"gamma": "all"}, "its locality is 'broadcast'"),
        ("counter_current", {}, "feedback activations of the K classes downwards"),
        ("sll", {"overlap": 1}, "its signals pass through blocks of later groups"),
    ],
)
def test_a_rule_that_needs_later_blocks_is_refused_with_the_reason(rule, options, why):
    with pytest.raises(LayerwiseError, match=f"{rule}' cannot be trained by a pipeline, because .*{why}"):
        stages(net("mlp", 4), rules.create(rule, **options), 2, problem(2)[0])


@dataclass(frozen=True)
class LooksAround(rules.get("local_ce")):
    """Declares nothing of what it begins with."""

    def begin(self, start):
        return start.x, start.forward(start.x)


@dataclass(frozen=True)
class AllAtOnce(rules.get("local_ce")):
    """Predicts from the whole network."""

    def predict(self, network, auxiliary, x):
        return -network(x)


@pytest.mark.parametrize(("rule", "why"), [(LooksAround, "input may depend on"), (AllAtOnce, "network at once")])
def test_a_rule_that_declares_nothing_is_refused(rule, why):
    with pytest.raises(LayerwiseError, match=why):
        stages(net("mlp", 4), rule(), 2, problem(2)[0])


def test_what_is_skipped_anywhere_is_counted_once():
    model, data = net("mlp", 4), batches(2)
    data[1][0][0, 0, 0, 0] = torch.nan
    one = trained(model, "sll", data, nonfinite="skip")
    learners = stages(model, "sll", 3, data[0][0], nonfinite="skip")
    for x, y in data:
        through(learners, "step", x, y)
    assert learners[-1].skipped == one.skipped == 1


def test_what_only_an_early_stage_skips_is_counted_at_the_end():
    """The first block's gradient is infinite and its output is not, so nobody after it skips anything."""
    model, (x, y) = net("mlp", 4), batches(1)[0]
    learners = stages(model, "local_ce", 3, x, nonfinite="skip")
    found = [learner.network.model for learner in learners]
    found[0].block1.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    through(learners, "step", x, y)
    assert [learner.skipped for learner in learners] == [1, 1, 1]
    assert not same_bits(found[-1].head, model.head)


def test_a_state_is_read_by_any_number_of_stages():
    model, data = net("vit", 4), batches(4)
    one = trained(model, "sid", data, clip=1.0)
    first = stages(model, "sid", 4, data[0][0], clip=1.0)
    for x, y in data[:2]:
        through(first, "step", x, y)
    second = stages(model, "sid", 2, data[0][0], clip=1.0)
    for learner in second:
        learner.load_state_dict(joined([part.state_dict() for part in first]))
    for x, y in data[2:]:
        through(second, "step", x, y)
    assert same_state(joined([learner.state_dict() for learner in second]), one.state_dict())


class Sleeping(nn.Module):
    samples: ClassVar[set[int]] = set()

    def forward(self, x):
        self.samples.add(len(x))
        time.sleep(0.01)
        return x


def test_the_cut_is_balanced_or_as_given():
    x, _ = problem(2)
    given = stages(net("mlp", 4), "sll", 2, x, counts=[3, 1])
    assert [len(learner.groups) for learner in given] == [3, 1]
    assert given[0].stage.blocks == ["block1..block3", "block4..head"]
    # By brute force over all cuts into three.
    cost = [5, 1, 1, 7, 2, 3]
    best = min(max(sum(cost[:a]), sum(cost[a:b]), sum(cost[b:])) for a in range(1, 5) for b in range(a + 1, 6))
    ends = [0, *balanced_ends(cost, 3)]
    assert max(sum(cost[a:b]) for a, b in itertools.pairwise(ends)) == best
    # Blocks one of which takes far longer on the first rank than its operations tell: it stands alone.
    slow = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(4)], nn.Linear(5, 2))
    slow[3][1] = Sleeping()
    said = []

    def agree(numbers):
        said.append(numbers)
        return said[0]

    kept = []
    for rank in range(2):
        learner = Learner(copy.deepcopy(slow), "local_ce", stage=Stage(rank, 2, None, agree, samples=7))
        learner.build(torch.randn(2, 5))
        kept.append(len(learner.groups))
    assert len(said[0]) == 5 and said[1] == [], said  # blocks and head; the other rank measures nothing
    assert max(said[0]) == said[0][3] > 0.01
    assert Sleeping.samples == {2, 7}  # two to learn the shapes, a whole batch to take the time
    assert kept == [3, 1]
    for counts in ([2, 1], [4], [4, 0], [5, -1]):
        with pytest.raises(LayerwiseError, match="give one number per rank"):
            stages(net("mlp", 4), "sll", 2, x, counts=counts)


def test_labels_alone_are_the_labels():
    source = InMemorySource(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20))
    both = Batches(source, 6, seed=3, mean=(0.5,), std=(0.5,))
    for (x, y), (nothing, alone) in zip(both.epoch(2, 1), both.without_images().epoch(2, 1), strict=True):
        assert torch.equal(y, alone)
        assert nothing.shape == (len(x), 0)


@pytest.mark.slow
def test_later_ranks_keep_no_images(tmp_path, monkeypatch):
    def train(run):
        data, batches = run.dataset, (run.train_batches, run.val_batches, run.test_batches)
        sources = [data.train, data.val, data.test, *(b.source for b in batches)]
        assert [source.images.is_meta for source in sources] == [not run.stage.first] * 6
        return real(run)

    real = PipelineRun.train
    monkeypatch.setattr(PipelineRun, "train", train)
    codes, errors = run(3, tmp_path / "job", [*PIPELINE, *TINY, "--out", str(tmp_path / "out")])
    assert codes == [0, 0, 0], errors


def test_a_tree_keeps_its_layout_on_the_way():
    """Kernels may depend on the order of dimensions in memory, and their bits with them."""
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tree = {"h": image, "parts": (torch.ones(3, dtype=torch.bool), None, 7), "empty": torch.empty(0, 2)}
    slot = TreeBuffers()
    slot.fit(encode(tree), torch.device("cpu"))
    assert slot.tree["h"].stride() == image.stride()
    assert slot.tree["parts"][0].dtype == torch.bool and slot.tree["parts"][1:] == (None, 7)
    before = slot.flat
    slot.fit(encode(copy.deepcopy(tree)), torch.device("cpu"))
    assert slot.flat is before  # the same buffers for the same layout
    assert TensorSpec.of(image[:, :, :, 0]).shape == (2, 3, 4)
    assert len(tree_leaves(slot.tree)) == 5
