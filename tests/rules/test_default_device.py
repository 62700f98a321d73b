"""The default device belongs to the user: the library creates no tensor there, and draws no number there."""

import copy

import pytest
import torch
from support.nets import batches, kinds, made, net, problem, same_bits

from layerwise import Learner, create_rule, rule_names
from layerwise.data import Batches, InMemorySource

OTHERS = [
    create_rule("local_ce", ahead="both"),
    create_rule("local_ce", overlap=1, own=True),
    create_rule("sll", targets="codebook"),
    create_rule("sll", readout="shared"),
    create_rule("block_rota", order="random"),
    create_rule("forward_forward", label="map", negatives="hybrid", predictor="softmax"),
    create_rule("graph_forward", variant="nodes"),
]


FAST = ("sll", "sid", "local_ce", "forward_gradient", "backprop")


@pytest.mark.parametrize(
    "rule",
    [*(name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in rule_names()), *OTHERS],
    ids=str,
)
def test_a_rule_has_its_bits_whatever_the_default_device(rule):
    """The meta device stands for any: what lies there meets no other tensor."""
    name = rule if isinstance(rule, str) else rule.name
    kind = kinds(name)[0]
    data = [problem(64)] * 2 if kind in ("gcn", "gat") else batches(2)
    model = net(kind, 3)
    careful = {} if name in ("backprop_fused", "zeroth_order") else {"nonfinite": "skip", "clip": 1.0}

    def learned():
        learner = Learner(copy.deepcopy(model), made(rule) if isinstance(rule, str) else rule, **careful)
        for x, y in data:
            learner.step(x, y)
        learner.evaluate(*data[0])
        again = Learner(copy.deepcopy(model), learner.rule, **careful, example=data[0][0])
        again.load_state_dict(copy.deepcopy(learner.state_dict()))
        return again, again(data[0][0])

    wanted, logits = learned()
    with torch.device("meta"):
        found, same = learned()
    assert same_bits(found, wanted)
    assert torch.equal(same, logits)


def test_offloaded_blocks_and_batches_lie_on_the_host():
    x, y = problem(32)
    source = InMemorySource((x * 50 + 128).clamp(0, 255).byte(), y)

    def learned():
        batches = Batches(source, 8, augment=("flip", "crop", "cutout"), seed=1, mean=(0.5,), std=(0.5,))
        learner = Learner(copy.deepcopy(model), "local_ce", offload="host")
        for epoch in range(2):
            for batch in batches.epoch(epoch):
                learner.step(*batch[:2])
        learner.onload()
        return learner

    model = net("mlp", 4)
    wanted = learned()
    with torch.device("meta"):
        found = learned()
    assert same_bits(found, wanted)
