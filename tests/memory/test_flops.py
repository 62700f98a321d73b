"""Operations are those that torch counts, for every model and every rule."""

import pytest
from support.nets import KINDS, by_family, net, problem
from torch.utils.flop_counter import FlopCounterMode

from layerwise import Learner, rules
from layerwise.measure.bench_speed import flops_of


@pytest.mark.parametrize("kind", [*KINDS, "resnet"])
@pytest.mark.parametrize("rule", ["sll", "backprop_checkpoint"])
def test_the_count_is_torchs(kind, rule):
    x, y = problem(8)
    with FlopCounterMode(display=False) as counter:
        Learner(net(kind), rule, example=x).step(x, y)
    with FlopCounterMode(display=False) as building:
        Learner(net(kind), rule, example=x)
    ours = flops_of(Learner(net(kind), rule, example=x), x, y)
    assert ours == counter.get_total_flops() - building.get_total_flops() > 0


@pytest.mark.parametrize("rule", by_family(name for name in rules.names() if not rules.get(name).models))
def test_every_rule_can_be_counted(rule):
    x, y = problem(8)
    assert flops_of(Learner(net(), rule, example=x), x, y) > 0
