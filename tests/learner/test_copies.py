"""Copies of a learner, learners in threads, learners that are built elsewhere: the same bits."""

import copy
import os
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


def test_what_reads_or_writes_the_state_waits_for_the_end_of_a_step(tmp_path):
    """A step that has begun in another thread is not over: its gradients come and go, its counters are those before."""
    entered, gate = threading.Event(), threading.Event()

    class Gate(torch.nn.Module):
        def forward(self, h):
            if armed:
                entered.set()
                gate.wait(20)
            return h

    armed = []
    learner = Learner(torch.nn.Sequential(Gate(), *dense()), "sll", example=X)
    state = learner.state_dict()
    waiting = {
        "state_dict": learner.state_dict,
        "optimizer_states": learner.optimizer_states,
        "load_state_dict": lambda: learner.load_state_dict(state),
        "save_weights": lambda: learner.save_weights(tmp_path),
        "build": lambda: learner.build(X),
        "measured_step": lambda: learner.measured_step(X, Y),
        "average": learner.average,
        "onload": learner.onload,
        "copy": lambda: copy.deepcopy(learner),
    }
    done = []

    def then_note(name, call):
        call()
        done.append(name)

    armed.append(True)
    step = threading.Thread(target=learner.step, args=(X, Y))
    step.start()
    assert entered.wait(20)
    threads = [threading.Thread(target=then_note, args=item) for item in waiting.items()]
    for thread in threads:
        thread.start()
    threads[0].join(0.1)
    assert done == []
    gate.set()
    for thread in (step, *threads):
        thread.join()
    assert sorted(done) == sorted(waiting)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have():
    """Neither for a step nor for a trace, which another thread of the parent was in the middle of."""
    entered, gate = [threading.Event(), threading.Event()], threading.Event()

    def hold(lock, event):
        with lock():
            event.set()
            gate.wait(20)

    from layerwise.core import randomness, tracing

    holders = [lambda: randomness.preserved_generators(torch.device("cpu")), lambda: tracing._TRACING]
    threads = [threading.Thread(target=hold, args=pair) for pair in zip(holders, entered, strict=True)]
    for thread, event in zip(threads, entered, strict=True):
        thread.start()
        assert event.wait(20)
    child = os.fork()
    if child == 0:
        free = tracing._TRACING.acquire(timeout=2) and randomness._IN_USE.acquire(timeout=2)
        os._exit(0 if free else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    gate.set()
    for thread in threads:
        thread.join()
    assert code == 0


@pytest.mark.parametrize("built", [True, False])
def test_a_state_is_that_of_its_moment_when_it_is_loaded(built):
    """As in torch, `state_dict()` has the learner's own tensors: what is loaded has to be a copy, at once."""
    data = batches(4)
    learner = trained(net(), "sll", data[:2])
    twin = Learner(net(), "sll", **({"example": X} if built else {}))
    twin.load_state_dict(learner.state_dict())
    learner.step(*data[3])
    twin.step(*data[2])
    assert same_bits(twin, trained(net(), "sll", data[:3]))
    moved = Learner(model := net(), "sll")  # weights that come from the network itself follow it until then
    moved.load_state_dict({**trained(net(), "sll", data[:2]).state_dict(), "model": model.state_dict()})
    model.load_state_dict(learner.network.state_dict())
    moved.build(X)
    assert same_bits(moved.network, learner.network)
