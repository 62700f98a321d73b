"""Copies of a learner, learners in threads, learners that are built elsewhere: the same bits."""

import copy
import pickle
import threading

import pytest
import torch
from support.nets import batches, dense, net, problem, same_bits, trained

from layerwise import Learner

X, Y = problem()


@pytest.mark.parametrize("rule", ["sll", "backprop", "noprop_dt"])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_copy_continues_to_the_same_bits(rule, twin, steps):
    kind = "noprop" if rule.startswith("noprop") else "mlp"
    model = net(kind) if kind == "noprop" else net(kind, dropout=0.3)
    data = batches(5)
    learner = trained(model, rule, data[:steps], accumulate=2)
    other = twin(learner)
    assert other.network.model is not learner.network.model
    for x, y in data[steps:]:
        learner.step(x, y)
        other.step(x, y)
    assert same_bits(learner, other)


def test_learners_in_threads_have_their_own_draws():
    """Two learners in two threads, and four threads in one learner: the bits of no threads at all."""
    data = batches(12)
    alone = [trained(net("mlp", dropout=0.5), "sll", data, seed=seed) for seed in (0, 1)]
    learners = [Learner(net("mlp", dropout=0.5), "sll", seed=seed) for seed in (0, 1)]
    one = Learner(net("mlp", dropout=0.5), "sll", seed=0)

    def work(learner):
        for x, y in data:
            learner.step(x, y)

    def same_batch(learner):
        for _ in range(3):
            learner.step(*data[0])

    threads = [threading.Thread(target=work, args=(learner,)) for learner in learners]
    threads += [threading.Thread(target=same_batch, args=(one,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(a, b) for a, b in zip(alone, learners, strict=True))
    assert one.steps == 12 and same_bits(one, trained(net("mlp", dropout=0.5), "sll", [data[0]] * 12, seed=0))


def test_a_learner_that_is_built_in_inference_mode_trains():
    learner = Learner(dense(), "sll")
    with torch.inference_mode():
        learner(X)
    learner.step(X, Y)
