"""Quantising optimizers use tensor subclasses, tensors in plain objects and compiled steps; the meters count them."""

import pytest
import torch
from support.nets import net, problem
from support.subclasses import Quantised, QuantisedMomentum
from torch import nn

from layerwise import Learner
from layerwise.measure.bench_speed import flops_of
from layerwise.memory.flops import FlopMeter
from layerwise.memory.meter import measure_memory, optimizer_tensors, tensor_bytes


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


def test_a_subclass_counts_as_the_tensors_inside():
    kept = Quantised.of(torch.randn(100, 10))
    assert tensor_bytes([kept]) == 1000 + 4
    assert tensor_bytes([kept, kept.codes, kept.scale]) == 1000 + 4


def test_what_a_subclass_makes_inside_an_operation_is_seen():
    kept = Quantised.of(torch.randn(100, 10))
    # Its product needs the 1000 floats of the plain tensor, and makes 1000 more.
    assert measure_memory(lambda: kept * 2).activations == 2 * 4000
    with FlopMeter() as meter:
        kept @ torch.ones(10, 3)
    assert meter.total == 2 * 100 * 10 * 3


def state_bytes(learner):
    """Codes and a scale, and twice ten floats in the projector, for every parameter that learns."""
    return sum(p.numel() + 4 + 2 * 40 for _, p in learner.named_parameters())


def graphs(learner):
    return sum(optimizer.graphs for group in learner.groups for optimizer in group.optimizers)


@pytest.mark.slow
def test_a_compiled_quantising_optimizer_is_measured_and_goes_on():
    x, y = problem(8)
    learner = Learner(net(), "local_ce", optimizer=QuantisedMomentum, example=x)
    _, use = learner.measured_step(x, y)  # the first step would compile
    assert (use.optimizer, graphs(learner)) == (state_bytes(learner), 0)
    learner.step(x, y)
    assert (compiled := graphs(learner)) > 0
    _, use = learner.measured_step(x, y)
    assert use.optimizer == state_bytes(learner)
    assert flops_of(learner, x, y) > 0
    learner.step(x, y)
    assert graphs(learner) == compiled


def test_state_in_plain_objects_is_the_optimizers():
    layer = nn.Linear(30, 20)
    optimizer = QuantisedMomentum(layer.parameters())
    layer(torch.ones(5, 30)).sum().backward()
    optimizer.step()
    found = optimizer_tensors([optimizer])
    assert all(type(t) is torch.Tensor for t in found)
    assert tensor_bytes(found) == 620 + 2 * 4 + 2 * 2 * 40
