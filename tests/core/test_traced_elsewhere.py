"""Values that a forward pass reads from outside are followed, and a trace that would freeze them is refused."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.traced import Base, X, net, same
from torch import nn

from layerwise import LayerwiseError, Learner, partition

DIALS = {"gain": 1.0}
RNG = random.Random(0)


class Elsewhere(Base):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.drop, self.factor, self.table = nn.Dropout(0.5), torch.tensor(2.0), np.array([2.0])
        self.deep = {"a": {"b": {"c": {"d": {"e": 2.0}}}}}


class ChildsDropout(Elsewhere):
    def between(self, h):
        return F.dropout(h, self.drop.p, self.drop.training)

    def change(self):
        self.drop.p = 0.0


class GlobalValue(Elsewhere):
    def between(self, h):
        return h * DIALS["gain"]

    def change(self):
        DIALS["gain"] += 1.0


class ClassValue(Elsewhere):
    def between(self, h):
        return h * self.scale

    def change(self):
        ClassValue.scale += 1.0


class Array(Elsewhere):
    def between(self, h):
        return h * float(self.table[0])

    def change(self):
        self.table[0] += 1.0


class PlainTensor(Elsewhere):
    def between(self, h):
        return h * float(self.factor)

    def change(self):
        self.factor += 1.0


class DeepDict(Elsewhere):
    def between(self, h):
        return h * self.deep["a"]["b"]["c"]["d"]["e"]

    def change(self):
        self.deep["a"]["b"]["c"]["d"]["e"] += 1.0


@pytest.mark.parametrize("kind", [ChildsDropout, GlobalValue, ClassValue, Array, PlainTensor, DeepDict])
def test_what_is_read_from_elsewhere_is_followed(kind):
    model = kind()
    parts = partition(model, ["a", "b"])
    for mode in (True, False, True):
        parts.train(mode)
        assert same(parts, model)
    model.drop.eval()
    assert same(parts, model)
    model.train()
    before = parts(X)
    model.change()
    assert same(parts, model)
    assert not torch.equal(parts(X), before)


class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            h = self.a(x)
        return self.c(self.b(h))


class Grad(Base):
    def forward(self, x):
        with torch.enable_grad():
            return self.c(self.b(self.a(x)))


class Autocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.c(self.b(self.a(x)))


class LayerDrop(Base):
    def between(self, h):
        return h if self.training and RNG.random() < 0.5 else h * 2


@pytest.mark.parametrize("kind", [NoGrad, Grad, Autocast, LayerDrop])
def test_switches_of_modes_and_draws_of_other_generators_are_refused_where_the_model_is_cut(kind):
    with pytest.raises(LayerwiseError, match=r"cut it at its own calls.*nn\.Sequential"):
        partition(kind(), ["a", "b"])


class ByType(Base):
    def between(self, h):
        return h * 2 if isinstance(h, torch.Tensor) else h


class ByExactType(Base):
    def between(self, h):
        return h * 2 if type(h) is torch.Tensor else h


class InTrainingOnly(Base):
    def between(self, h):
        return h * 2 if self.training and isinstance(h, torch.Tensor) else h


@pytest.mark.parametrize("kind", [ByType, ByExactType, InTrainingOnly])
def test_a_trace_that_differs_from_the_model_is_refused(kind):
    words = r"does something that a trace cannot represent.*cut it at its own calls"
    with pytest.raises(LayerwiseError, match=words):
        Learner(kind(), "local_ce", cuts=["a", "b"], example=X)
    with pytest.raises(LayerwiseError, match=words):
        partition(kind(), ["a", "b"])(X)


class Norms(Base):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def between(self, h):
        return F.dropout(self.norm(h), 0.5, self.training)


def test_the_comparison_moves_no_buffer_no_mode_and_no_generator():
    model = Norms()
    model.norm.eval()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    parts = partition(model, ["a", "b"])
    parts.probe(X)
    assert [m.training for m in (model, model.a, model.norm)] == [True, True, False]
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]


def replaced_forward(model):
    model.forward = lambda h: h
    return model


class OwnCall(nn.Sequential):
    def __call__(self, h):
        return super().__call__(h) * 2


@pytest.mark.parametrize(
    "make", [lambda: replaced_forward(net()), lambda: OwnCall(*net()), lambda: replaced_forward(Base())]
)
def test_a_call_that_is_put_over_the_class_is_refused(make):
    with pytest.raises(LayerwiseError, match="replaces that of its class"):
        partition(make(), ["a", "b"] if isinstance(make(), Base) else ["1"])


@pytest.mark.parametrize("later", [False, True])
def test_a_container_that_holds_a_cut_and_has_a_call_of_its_own_is_refused(later):
    model = net()
    if not later:
        model[2] = OwnCall(*model[2])
        with pytest.raises(LayerwiseError, match="'2' has a forward or a __call__"):
            partition(model, ["1", "2.0"])
        assert torch.equal(partition(model, ["1", "2"])(X), model(X))  # it is called as a whole
        return
    parts = partition(model, ["1", "2.0"])
    replaced_forward(model[2])
    with pytest.raises(LayerwiseError, match="'2' has a forward or a __call__"):
        parts(X)
