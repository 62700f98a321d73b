"""Several batches in one update: the update of all their samples, whole or not at all."""

import copy
import math

import pytest
import torch
from support.nets import CLASSES, PLAIN_SGD, batches, dense, moved, problem, same_bits, snapshot, trained

from layerwise import LayerwiseError, Learner
from layerwise.core.pieces import JoinsGroups
from layerwise.rules.local_ce import LocalCE

X, Y = problem()


def one_step(model, x, y, rule="local_ce"):
    """The move of a plain step on a batch."""
    learner = trained(copy.deepcopy(model), rule, [(x, y)], **PLAIN_SGD | {"lr": 1.0})
    return [a - b for a, b in zip(learner.network.parameters(), model.parameters(), strict=True)]


@pytest.mark.parametrize("rule", ["local_ce", "sid", "backprop", "mono_forward"])
def test_batches_of_any_size_make_the_update_of_all_their_samples(rule):
    model = dense().double()
    x, y = torch.randn(12, 64, dtype=torch.float64), torch.randint(CLASSES, (12,))
    learner = Learner(copy.deepcopy(model), rule, accumulate=3, **PLAIN_SGD | {"lr": 1.0})
    for start, end in ((0, 1), (1, 8), (8, 12)):
        learner.step(x[start:end], y[start:end])
    for a, b, move in zip(learner.network.parameters(), model.parameters(), one_step(model, x, y, rule), strict=True):
        assert torch.allclose(a - b, move, atol=1e-9)


def test_labels_that_do_not_count_do_not_weigh():
    model = dense().double()
    x, y = torch.randn(8, 64, dtype=torch.float64), torch.randint(CLASSES, (8,))
    y[:3] = -100
    learner = Learner(copy.deepcopy(model), "backprop", accumulate=2, **PLAIN_SGD | {"lr": 1.0})
    learner.step(x[:4], y[:4])  # one label counts
    learner.step(x[4:], y[4:])  # four do
    for a, b, move in zip(
        learner.network.parameters(), model.parameters(), one_step(model, x, y, "backprop"), strict=True
    ):
        assert torch.allclose(a - b, move, atol=1e-9)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_flush_makes_the_update_of_the_batches_that_are_there(left):
    model = dense().double()
    x, y = torch.randn(4 * left, 64, dtype=torch.float64), torch.randint(CLASSES, (4 * left,))
    learner = Learner(copy.deepcopy(model), "local_ce", accumulate=4, **PLAIN_SGD | {"lr": 1.0})
    for part, labels in zip(x.chunk(left), y.chunk(left), strict=True):
        learner.step(part, labels)
    assert learner.updates == 0 and same_bits(learner.network.model, model)
    assert learner.flush() and not learner.flush()
    assert learner.updates == 1 and all(p.grad is None for p in model.parameters())
    for a, b, move in zip(learner.network.parameters(), model.parameters(), one_step(model, x, y), strict=True):
        assert torch.allclose(a - b, move, atol=1e-9)


def test_an_update_under_way_continues_from_a_state():
    data = [(X[:3], Y[:3]), (X[3:8], Y[3:8])]
    straight = trained(dense(), "local_ce", data, accumulate=2)
    half = trained(dense(), "local_ce", data[:1], accumulate=2)
    resumed = Learner(dense(), "local_ce", accumulate=2, example=X)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    resumed.step(*data[1])
    assert same_bits(resumed, straight) and resumed.updates == 1


def test_a_batch_that_is_not_finite_is_blamed_for_itself():
    broken = X.clone()
    broken[0] = math.nan
    learner = Learner(dense(), "local_ce", accumulate=3)
    with pytest.raises(LayerwiseError, match="at step 0: its input already holds NaN"):
        learner.step(broken, Y)
    skipping = Learner(dense(), "local_ce", accumulate=2, nonfinite="skip")
    before = snapshot(skipping)
    skipping.step(broken, Y)
    metrics = skipping.step(X, Y)
    assert len(metrics.skipped) == 2 and moved(skipping, before) == set()
    assert skipping.step(X, Y).skipped == skipping.step(X, Y).skipped == ()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", ["local_ce", "sll", "backprop"])
def test_a_step_that_fails_leaves_nothing_behind(rule, accumulate):
    """NaN, a wrong shape, an interrupt: afterwards the learner trains like one that has seen none of it."""
    model = dense()
    learner = Learner(copy.deepcopy(model), rule, accumulate=accumulate, example=X)
    layer = learner.network.model[1]

    def interrupt(*_):
        raise KeyboardInterrupt

    for x, error in ((X * math.nan, LayerwiseError), (X[:, :, :4], LayerwiseError), (X, KeyboardInterrupt)):
        hook = layer.register_forward_pre_hook(interrupt) if error is KeyboardInterrupt else None
        with pytest.raises(error):
            learner.step(x, Y)
        if hook is not None:
            hook.remove()
        assert learner.accumulated == 0 and all(p.grad is None for _, p in learner.named_parameters())
    assert learner.steps == 0
    other = Learner(copy.deepcopy(model), rule, accumulate=accumulate, example=X)
    for x, y in batches(2):
        learner.step(x, y)
        other.step(x, y)
    assert same_bits(learner, other) and learner.updates == other.updates > 0


class JoinsEverySecond(JoinsGroups, LocalCE):
    """Goes through all blocks at once in every second update."""

    def groups_at(self, update, blocks):
        return self.groups(blocks) if update % 2 else [range(blocks + 1)]


def test_what_a_rule_does_in_some_updates_counts_updates_and_not_batches():
    rule, model = JoinsEverySecond(), dense().double()
    data = [(x.double(), y) for x, y in batches(3, size=8)]
    halves = [half for x, y in data for half in zip(x.chunk(2), y.chunk(2), strict=True)]
    accumulated = trained(copy.deepcopy(model), rule, halves, accumulate=2, **PLAIN_SGD)
    whole = trained(copy.deepcopy(model), rule, data, **PLAIN_SGD)
    for a, b in zip(accumulated.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("where", [0, -1])
def test_a_flush_that_fails_gives_the_update_up(where):
    learner = Learner(dense(), "local_ce", accumulate=3, example=X, **PLAIN_SGD)
    learner.step(X, Y)
    optimizer = learner.groups[where].optimizers[0]
    step = optimizer.step

    def interrupt(*_):
        raise KeyboardInterrupt

    optimizer.step = interrupt
    with pytest.raises(KeyboardInterrupt):
        learner.flush()
    optimizer.step = step
    assert learner.accumulated == 0 and all(p.grad is None for _, p in learner.named_parameters())
    before = snapshot(learner)
    assert not learner.flush() and moved(learner, before) == set()
