"""What must hold for every rule, with every family of models; a new rule is tested once it is registered."""

import copy
import dataclasses
import itertools
import typing

import pytest
import torch
from support.nets import CLASSES, FAMILIES, MANY_PASSES, batches, kinds, made, net, problem, same_bits, tensors, trained

from layerwise import Learner, Rule, create_rule, rule_names
from layerwise.core import pieces
from layerwise.core.contract import groups_of_update, learns_in_update
from layerwise.core.engine import Engine
from layerwise.core.rule import Locality, Site
from layerwise.rules import get

RULES = rule_names()
DATA = batches(3)
X, Y = DATA[0]
every_rule = pytest.mark.parametrize("rule", RULES)
ON_ALL_MODELS = ("sll", "sid", "local_ce", "backprop")
# In the fast suite. Of the others it has a rule of each way to run blocks, on one model; the slow suite has the rest.


def on_models(fast):
    return pytest.mark.parametrize(
        ("rule", "kind"),
        [
            pytest.param(rule, kind, marks=() if fast(rule, kind) and rule not in MANY_PASSES else pytest.mark.slow)
            for rule in RULES
            for kind in kinds(rule)
        ],
    )


every_rule_and_model = on_models(
    lambda rule, kind: (kind == kinds(rule)[0] and rule in FAMILIES) or rule in ON_ALL_MODELS
)


# --- What a rule declares


@every_rule
def test_a_rule_declares_what_it_is(rule):
    kind = get(rule)
    assert issubclass(kind, Rule)
    assert kind.name == rule
    assert kind.locality in typing.get_args(Locality)
    assert isinstance(kind.flat_memory, bool)
    for words in (kind.boundary, kind.source, kind.restrictions):
        assert isinstance(words, str)
    assert len(kind.boundary) > 5
    assert len(kind.source) > 5
    assert kind.__doc__ != Rule.__doc__
    assert kind.signal is not Rule.signal


@every_rule
def test_a_rule_is_immutable_and_comparable_so_that_it_can_be_recorded(rule):
    one = create_rule(rule)
    assert dataclasses.is_dataclass(one)
    assert one == create_rule(rule)
    assert create_rule(rule, **dataclasses.asdict(one)) == one
    for field in dataclasses.fields(one):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, field.name, getattr(one, field.name))


@every_rule
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_groups_are_neighbours_and_cover_every_site_once(rule, blocks):
    groups = create_rule(rule).groups(blocks)
    assert all(group.step == 1 and len(group) > 0 for group in groups)
    own = [range(g.start, later.start) for g, later in itertools.pairwise([*groups, range(blocks + 1, blocks + 2)])]
    assert [i for sites in own for i in sites] == list(range(blocks + 1))
    assert all(sites.stop <= group.stop <= blocks + 1 for sites, group in zip(own, groups, strict=True))
    assert own == groups or create_rule(rule).locality == "interlocking"


@every_rule
def test_the_groups_of_any_update_are_those_of_the_rule_or_neighbours_joined(rule):
    one = made(rule)
    own, names = one.groups(6), [*"123456", "head"]
    for update in range(24):
        groups = groups_of_update(one, update, names)
        assert {group.start for group in groups} <= {group.start for group in own}
        assert groups[0].start == 0 and groups[-1].stop == 7
        assert groups == groups_of_update(one, update, names)
        sites = [Site(group.start, 6, "") for group in groups]
        learn = [learns_in_update(one, update, site) for site in sites]
        assert any(learn) and learn == [learns_in_update(one, update, site) for site in sites]


@every_rule
def test_a_local_rule_has_more_than_one_group_and_a_global_one_only_one(rule):
    count = len(create_rule(rule).groups(6))
    assert (count == 1) == (get(rule).locality == "global")
    assert get(rule).locality != "perturbation" or not get(rule).builds_graph


# --- Locality


class Watch:
    """Follows every group's update: whose gradients are there, and what enters with a history."""

    def __init__(self, learner, monkeypatch):
        self.owner = {}
        self.reached = {}  # per step and group, the groups whose parameters had a gradient until it stepped
        self.with_gradient = set()  # the groups whose parameters have got a gradient since the last optimizer's step
        self.history = []  # names of groups whose input or message could carry a gradient back
        self.learner = learner
        for i, group in enumerate(learner.groups):
            for unit in group.units:
                self.owner |= {id(p): i for p in unit.parameters()}
                for p in (p for p in unit.parameters() if p.requires_grad):
                    p.register_post_accumulate_grad_hook(lambda p: self.with_gradient.add(self.owner[id(p)]))
        update = Engine.update
        step_optimizer = Engine._step_optimizer

        def watched_update(engine, group, h, message, y, step, trace, trunk):
            leaves = [h, *torch.utils._pytree.tree_leaves(message)]
            if any(isinstance(t, torch.Tensor) and t.requires_grad for t in leaves):
                self.history.append(group.name)
            return update(engine, group, h, message, y, step, trace, trunk)

        def watched_step(engine, group, optimizer):
            found = {self.owner[id(p)] for _, p in learner.named_parameters() if p.grad is not None}
            turn = learner.steps, next(i for i, own in enumerate(learner.groups) if own.units[0] is group.units[0])
            self.reached.setdefault(turn, set()).update(found | self.with_gradient)
            self.with_gradient = set()
            step_optimizer(engine, group, optimizer)

        monkeypatch.setattr(Engine, "update", watched_update)
        monkeypatch.setattr(Engine, "_step_optimizer", watched_step)


@every_rule_and_model
def test_a_groups_signal_reaches_its_own_parameters_and_no_others(rule, kind, monkeypatch):
    """Absent, not zero: at no time has a parameter of another group a gradient."""
    learner = Learner(net(kind), made(rule), example=X)
    watch, expected = Watch(learner, monkeypatch), []
    for step, (x, y) in enumerate(DATA):
        turns = [i for i, g in enumerate(learner.groups_at(step)) if g.optimizers]
        turns = turns[1:] + turns[:1] if pieces.has_trunk(learner.rule) else turns  # a trunk learns last
        expected += [(step, own) for own in turns]
        learner.step(x, y)
    assert watch.history == []
    assert all(found == {own} for (_, own), found in watch.reached.items())
    assert [*watch.reached] == expected
    assert {own for _, own in expected} == {i for i, g in enumerate(learner.groups) if g.optimizers}


@every_rule
def test_a_local_block_does_not_feel_what_comes_after_it(rule):
    """Another head: the first block's update keeps its bits under a local rule, and not under a global one."""
    model, other = (net(kinds(rule)[0]) for _ in range(2))
    with torch.no_grad():
        [*other.head.parameters()][-2].mul_(-3)
    a, b = (trained(m, made(rule), DATA[:1], weight_decay=0.0).network.model for m in (model, other))
    if get(rule).locality == "local":
        assert same_bits(a[0], b[0])
    one, blocks = create_rule(rule), len(model.block_names)
    if get(rule).locality == "global" or pieces.has_trunk(one) or blocks in one.groups(blocks)[0]:
        assert not same_bits(a[0], b[0])


BROADCAST = [rule for rule in RULES if get(rule).locality in ("broadcast", "equilibrium")]


@pytest.mark.parametrize("rule", BROADCAST)
def test_a_block_sees_what_is_sent_to_all_and_nothing_else_of_later_blocks(rule):
    """The same beginning (an error, targets, a feedback network), other later blocks: the first one keeps its bits."""

    class Told(get(rule)):
        def begin(self, ctx):
            return copy.deepcopy(begun) if begun else super().begin(ctx)

        def signal(self, at):
            if at.site.index == 0:
                seen.append((at.h_in, copy.deepcopy(at.message)))
            return super().signal(at)

    begun, seen = [], []
    told, (model, other) = Told(**dataclasses.asdict(made(rule))), (net(kinds(rule)[0]) for _ in range(2))
    reads_head = isinstance(told, pieces.ReadsOutputMatrix) and told.matrix_refresh() is not None
    with torch.no_grad():
        for p in [
            *other.block2.parameters(),
            *other.block3.parameters(),
            *([] if reads_head else other.head.parameters()),
        ]:
            p.mul_(-3)
    a = trained(model, told, DATA[:1]).network.model
    begun = seen[0]
    b = trained(other, told, DATA[:1]).network.model
    assert same_bits(a[0], b[0]) and not same_bits(a[1], b[1])


@pytest.mark.parametrize("rule", [rule for rule in RULES if not get(rule).builds_graph])
def test_a_rule_without_a_graph_saves_nothing_for_a_backward_pass(rule):
    saved, learner = [], Learner(net(kinds(rule)[0]), made(rule), example=X)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        learner.step(X, Y)
    assert not saved


@every_rule_and_model
def test_what_the_rule_sees_of_a_message_carries_no_gradient_back(rule, kind):
    """Inside `signal`: the first input of a group, and its message, have no history."""
    seen = []

    class Spy(get(rule)):
        def signal(self, at):
            leaves = torch.utils._pytree.tree_leaves(at.message)
            tensors_ = [t for t in [at.h_in, *leaves] if isinstance(t, torch.Tensor)]
            if at.site.index == at.view.start or at.site.index not in firsts:  # else it lends its graph
                seen.append((at.site.index, any(t.grad_fn is not None for t in tensors_)))
            return super().signal(at)

    spy, model = Spy(), net(kind)
    blocks = len(model.block_names)
    firsts = {group.start for group in spy.groups(blocks)}
    Learner(model, spy).step(X, Y)
    assert {index for index, _ in seen} == set(range(blocks + 1))
    assert not [index for index, history in seen if index in firsts and history]


# --- Memory


def working_memory(kind, rule, depth):
    """Bytes of activations and gradients in a step, at their peak."""
    wide = {"mlp": {"width": 64}, "vgg": {"width": 8}, "vit": {"width": 16, "heads": 2}}.get(kind, {})
    learner = Learner(net(kind, depth=depth, **wide), made(rule))
    x, y = problem(32)
    learner.step(x, y)
    seen, held = [], []
    for step in range(1, 12):  # the first step of every grouping
        if learner.groups_at(step) not in seen:
            seen.append(learner.groups_at(step))
            learner.engine.accumulation.updates = step
            _, use = learner.measured_step(x, y)
            held.append(use.activations + use.gradients)
    return max(held)


@pytest.mark.filterwarnings("ignore:the readouts of rule")
@on_models(lambda rule, kind: kind == kinds(rule)[0] and rule in FAMILIES)
def test_working_memory_is_flat_in_depth_for_the_rules_that_say_so(rule, kind):
    # Seven blocks, so that the shallow net too has wide blocks that are not the last one (which the head may read), and
    # as wide a block half way (which an auxiliary network may be built after).
    shallow, deep = (working_memory(kind, rule, depth) for depth in (7, 11))
    if get(rule).flat_memory:
        assert deep <= 1.01 * shallow
    else:
        assert deep > 1.1 * shallow


# --- Training


@every_rule_and_model
def test_it_learns_a_separable_problem(rule, kind):
    # PEPITA learns little in deep nets, as its page says.
    model = net(kind, **({"depth": 1} if rule == "pepita" else {}))
    slowly = (rule, kind) == ("synthetic_gradient", "vit")  # its modules have to learn first
    steps, lr = (200, 0.002) if slowly else (40, 0.01)
    learner = Learner(model, made(rule), lr=lr)
    x, y = problem(64)
    test_x, test_y = problem(64, seed=5)
    least = 1 if rule in ("lopt", "pepita") else 2  # where lower blocks learn little, or nothing, of the classes

    first = learner.step(x, y).read()["head/loss"]
    for _ in range(steps // 10):  # most need few of them
        losses = [learner.step(x, y).read()["head/loss"] for _ in range(10)]
        accuracy = (learner(test_x).argmax(-1) == test_y).float().mean()
        if losses[-1] < 0.95 * first and accuracy > least / CLASSES:
            break
    assert losses[-1] < 0.95 * first
    assert accuracy > least / CLASSES


def fixed_buffers(learner):
    """Copies of the auxiliary buffers, without running statistics."""
    named = [(name.rpartition(".")[2], name, buffer) for name, buffer in learner.auxiliary.named_buffers()]
    return {name: b.clone() for own, name, b in named if not own.startswith(("running_", "num_batches_tracked"))}


@every_rule_and_model
def test_what_is_fixed_stays_and_what_the_rule_trains_moves(rule, kind):
    model = net(kind)
    learner = Learner(copy.deepcopy(model), made(rule), example=X)
    fixed = fixed_buffers(learner)
    for x, y in DATA:
        learner.step(x, y)
    assert same_bits(fixed, fixed_buffers(learner))
    for i, name in enumerate([*model.block_names, "head"]):
        moved = any(
            not torch.equal(a, b)
            for a, b in zip(
                getattr(model, name).parameters(),
                getattr(learner.network.model, name).parameters(),
                strict=True,
            )
        )
        assert moved == learner.rule.trains(Site(i, len(model.block_names), name)), name


@every_rule_and_model
def test_after_a_step_no_gradient_is_left(rule, kind):
    learner = trained(net(kind), made(rule), DATA[:1])
    assert not [name for name, p in learner.named_parameters() if p.grad is not None]


# --- Repetition


@every_rule_and_model
def test_a_run_is_a_function_of_recipe_and_seed(rule, kind):
    model = net(kind, dropout=0.2)
    a, b = (trained(model, made(rule), DATA) for _ in range(2))
    assert same_bits(a, b)


@every_rule_and_model
def test_a_run_goes_on_from_its_state_to_the_same_bits(rule, kind):
    model = net(kind, dropout=0.2)
    straight = trained(model, made(rule), DATA)
    state = copy.deepcopy(trained(model, made(rule), DATA[:2]).state_dict())
    resumed = Learner(net(kind, dropout=0.2), made(rule))
    resumed.load_state_dict(state)
    resumed.step(*DATA[2])
    assert same_bits(resumed, straight)


# --- Prediction


@every_rule_and_model
def test_prediction_is_a_plain_forward_pass(rule, kind):
    learner = trained(net(kind, dropout=0.2), made(rule), DATA[:2])
    out = learner(X)
    assert out.shape == (len(X), CLASSES)
    if pieces.predicts_plainly(learner.rule):
        with torch.no_grad():
            assert torch.equal(out, learner.network.model.eval()(X))


@every_rule_and_model
def test_evaluation_changes_nothing(rule, kind):
    learner = trained(net(kind, dropout=0.2), made(rule), DATA[:2])
    network, auxiliary = tensors(learner.network), tensors(learner.auxiliary)
    generator = torch.get_rng_state()
    first, second = learner.evaluate(X, Y).read(), learner.evaluate(X, Y).read()
    assert first == second
    assert {"head/loss", "head/accuracy"} <= first.keys()
    assert same_bits(tensors(learner.network), network)
    assert same_bits(tensors(learner.auxiliary), auxiliary)
    assert torch.equal(torch.get_rng_state(), generator)
    assert learner.steps == 2
    assert all(p.grad is None for _, p in learner.named_parameters())
