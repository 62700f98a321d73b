"""Skipped updates: a batch that is not finite changes nothing, with any rule and after any resumption."""

import copy

import pytest
import torch
from support.nets import batches, by_family, by_parameter, kinds, made, net, same_bits, tensors
from support.ranks import same_state

from layerwise import LayerwiseError, Learner, create_rule, rule_names

DATA = batches(5)
RULES = [name for name in rule_names() if not by_parameter(name) and name != "block_rota"]
LOOKING = [create_rule(name, ahead="both", ahead_momentum=0.5) for name in ("local_ce", "dgl", "infopro", "predsim")]
TURNS = create_rule("block_rota", period=9)  # at the end of a turn state is dropped anyway
OTHERS = [
    TURNS,
    create_rule("local_ce", overlap=1, own=True),
    create_rule("solo", refresh=9),
    create_rule("interlocking", n=3),
    create_rule("feedback_alignment", mode="ebd", memory=0.5),
    create_rule("feedback_alignment", mode="dkp"),
    create_rule("pepita", mirror=0.5),
]


def broken(batch):
    x, y = batch
    x = x.clone()
    x[1, 0] = torch.nan
    return x, y


def everything(learner):
    """All tensors that training moves, and the state, without the counters of steps and updates."""
    state = {name: part for name, part in learner.state_dict().items() if name not in ("steps", "skipped")}
    state["accumulation"] = {**state["accumulation"], "updates": 0}
    return copy.deepcopy(state), tensors(learner.network), tensors(learner.auxiliary)


def same(one, other):
    return same_state(one[0], other[0]) and same_bits(one[1], other[1]) and same_bits(one[2], other[2])


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("rule", [*by_family(RULES), *LOOKING, *OTHERS], ids=str)
def test_a_batch_that_is_not_finite_leaves_nothing_behind(rule, accumulate):
    name = rule if isinstance(rule, str) else rule.name
    if accumulate == 1 and isinstance(rule, str) and name not in ("boosted", "last_layer", "sid_cascade"):
        pytest.skip("two batches show more")
    if name.startswith("noprop") or kinds(name)[0] in ("gcn", "gat"):
        pytest.skip("its head never reads the batch, or its batch is a graph")
    kind = "vgg" if "vgg" in kinds(name) else kinds(name)[0]  # batch norm where that is possible
    learner = Learner(
        net(kind, 3), made(rule) if isinstance(rule, str) else rule, nonfinite="skip", accumulate=accumulate
    )
    for batch in DATA[:2]:
        learner.step(*batch)
    before, drawn = everything(learner), torch.get_rng_state()
    for batch in [broken(DATA[2]), DATA[3]][:accumulate]:
        learner.step(*batch)
    assert learner.skipped == 1
    assert same(everything(learner), before)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("rule", ["local_ce", "last_layer", "boosted", "periodic_guidance"])
@pytest.mark.parametrize(("bad", "stop"), [(2, 3), (3, 3)])
def test_a_state_within_an_update_goes_on_to_the_same_bits_when_it_is_skipped(rule, bad, stop):
    """Accumulating two batches: the bad one is before the state is taken, or after it."""

    def steps(learner, batches):
        for batch in batches:
            learner.step(*batch)
        return learner

    def fresh():
        return Learner(net("vgg", 3), made(rule), nonfinite="skip", accumulate=2, example=DATA[0][0])

    data = [broken(batch) if i == bad else batch for i, batch in enumerate(DATA)]
    whole, first = steps(fresh(), data), steps(fresh(), data[:stop])
    assert all(tensor.isfinite().all() for tensor in tensors(first.network).values())  # it can be evaluated there
    second = fresh()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, data[stop:])
    for learner in (whole, second):
        learner.flush()
    assert whole.skipped == second.skipped == 1
    assert same(everything(whole), everything(second))


def test_a_state_within_an_update_that_was_edited_is_refused():
    learner = Learner(net("vgg", 3), "local_ce", nonfinite="skip", accumulate=2)
    learner.step(*broken(DATA[0]))
    state = learner.state_dict()
    assert state["broken"] == ["block1", "block2", "block3..head"]
    name = next(iter(state["before"]))
    for edited in (
        {"broken": "block1"},
        {"broken": [3]},
        {"before": []},
        {"before": {**state["before"], name: torch.zeros(99)}},
        {"before": {**state["before"], "nothing": torch.zeros(1)}},
    ):
        with pytest.raises(LayerwiseError, match="the checkpoint does not fit"):
            learner.load_state_dict({**state, **edited})
