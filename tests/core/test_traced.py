"""A traced part does what the program does, or raises an error; a block does not change its input."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.nets import by_family
from support.traced import Base, X, Y, net, same
from torch import nn

from layerwise import LayerwiseError, Learner, legal_cuts, partition, rule_names
from layerwise.rules import get as get_rule


class Dropout(Base):
    def between(self, h):
        return F.dropout(h, self.p, self.training) * self.dials["gain"][0]


class Branch(Base):
    def between(self, h):
        return h * 2 if self.training else h * self.size.exp()


class PythonRandom(Base):
    def between(self, h):
        return h * random.random()


class NumpyRandom(Base):
    def between(self, h):
        return h * np.random.rand()


class OwnGenerator(Base):
    def between(self, h):
        return h * self.draws.random()


class TorchRandom(Base):
    def between(self, h):
        return h * torch.rand(())


class Counter(Base):
    calls = 0

    def between(self, h):
        self.calls += 1
        return h * self.calls


class Once(Base):
    """The first pass makes something that later ones find, such as a cache."""

    table = None

    def between(self, h):
        if self.table is None:
            self.table = 2.0
        return h * self.table


class Values(Base):
    def between(self, h):
        return h * 2 if h.sum() > 0 else h


@pytest.mark.parametrize("kind", [Dropout, Branch])
def test_a_traced_model_follows_its_mode_its_attributes_and_its_buffers(kind):
    model = kind()
    parts = partition(model, ["a", "b"])
    for mode in (True, False, True):
        parts.train(mode)
        assert same(parts, model)
    model.p, model.dials["gain"][0] = 0.0, 3.0
    with torch.no_grad():
        model.size.fill_(0.5)
    assert same(parts, model)
    assert same(parts.eval(), model)
    learner = Learner(kind(), "local_ce", cuts=["a", "b"])
    learner.step(X, Y)
    assert torch.equal(learner(X), learner(X))
    assert torch.equal(learner(X), learner.network.model.eval()(X))


def test_what_the_first_pass_makes_once_does_not_refuse_the_first_attempt():
    model = Once()
    assert same(partition(model, ["a", "b"]), model)
    assert same(partition(model, ["a", "b"]), model)


@pytest.mark.parametrize("kind", [PythonRandom, NumpyRandom, OwnGenerator, TorchRandom, Counter, Values])
def test_what_a_trace_would_freeze_is_refused_and_nothing_is_drawn(kind):
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    with pytest.raises(LayerwiseError, match=r"wrap the model as nn\.Sequential"):
        partition(kind(), ["a", "b"])
    if kind is not Counter:
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tobytes() == states[1]


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize(("where", "cuts"), [("", None), ("2", ["1", "2.0"])])
def test_hooks_that_would_not_run_are_refused(hook, where, cuts):
    model = net()
    parts = partition(model, cuts)
    getattr(model.get_submodule(where), hook)(lambda *given: None)
    for attempt in (lambda: parts(X), lambda: partition(model, cuts)):
        with pytest.raises(LayerwiseError, match="has hooks, which would not run"):
            attempt()


def test_hooks_inside_run():
    model, calls = net(), []
    model[2].register_forward_hook(lambda *given: calls.append(1))
    partition(model)(X)
    assert calls == [1]


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, h):
        return self.inner(h) if h.sum() > 0 else h


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.u, self.c = nn.Linear(6, 8), Opaque(), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(self.u(self.a(x)))


def test_a_part_that_cannot_be_traced_hides_no_legal_cut():
    model = Around()
    assert legal_cuts(model) == ["a", "u"]
    assert torch.equal(partition(model, ["a", "u"])(X), model(X))


# --- in-place operations


class Add(nn.Module):
    def forward(self, h):
        return h + 1


class AddInPlace(nn.Module):
    def forward(self, h):
        h += 1
        return h


def starts_with(add, relu, drop):
    torch.manual_seed(0)
    sizes = [(6, 8), (8, 8), (8, 8), (8, 3)]
    return nn.Sequential(
        *(nn.Sequential(first, nn.Linear(*s)) for first, s in zip((add, relu, add, drop), sizes, strict=True))
    )


@pytest.mark.parametrize("rule", by_family(name for name in rule_names() if not get_rule(name).models))
def test_a_block_that_begins_in_place_trains_as_one_that_does_not(rule):
    results = []
    for first in (
        (Add(), nn.ReLU(), nn.Dropout(0.5)),
        (AddInPlace(), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)),
    ):
        x = X.clone()
        learner = Learner(starts_with(*first), rule)
        read = [learner.step(x, Y).read() for _ in range(3)]
        results.append((read, learner.evaluate(x, Y).read(), learner(x)))
        assert torch.equal(x, X)
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


# --- models that are no plain module


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        pytest.param(torch.compile, "compiled as a whole.*compile=True", marks=pytest.mark.slow),
        (nn.DataParallel, "wrapped in DataParallel.*replicas="),
        (lambda m: torch.jit.trace(m, X), "ScriptModule"),
        (lambda m: nn.Sequential(torch.jit.trace(m, X), nn.Linear(3, 3)), "'0' is a ScriptModule"),
        (lambda m: m.forward, "give a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_wrapped_models_are_refused_in_one_sentence(wrap, words):
    with pytest.raises(LayerwiseError, match=words):
        Learner(wrap(net()))


# --- types


def test_lazy_layers_need_an_example():
    def lazy():
        return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(3))

    with pytest.raises(LayerwiseError, match=r"lazy layer.*example"):
        Learner(lazy())
    model = lazy()
    learner = Learner(model, example=X)
    assert (model[0].in_features, model[3].in_features) == (6, 8)
    assert learner.step(X, Y).loss.isfinite()


def test_tensors_of_inference_mode_are_taken_and_a_step_inside_is_refused():
    with torch.inference_mode():
        x, y = X * 1, Y.clone()
    learner = Learner(net())
    learner.step(x, y)
    expected = learner(X)
    with torch.inference_mode():
        assert torch.equal(learner(x), expected)
        learner.evaluate(x, y)
        with pytest.raises(LayerwiseError, match="inference_mode"):
            learner.step(x, y)
    learner.step(x, y)


class Spectrum(nn.Module):
    def forward(self, h):
        return torch.fft.fft(h)


def test_complex_numbers_are_refused():
    with pytest.raises(LayerwiseError, match="complex"):
        Learner(net()).step(X + 0j, Y)
    model = nn.Sequential(nn.Linear(6, 8), Spectrum(), nn.Sequential(Add(), nn.Linear(8, 3)))
    with pytest.raises(LayerwiseError, match="'1' passes on complex"):
        Learner(model, cuts=["1"]).step(X, Y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", by_family(name for name in rule_names() if not get_rule(name).models))
def test_every_rule_trains_in_every_precision(rule, dtype):
    torch.manual_seed(0)
    x = torch.randn(8, 1, 6, 6).to(dtype)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(216, 3)),
    ).to(dtype)  # fmt: skip
    learner = Learner(model, rule)
    learner.step(x, Y)
    learner.evaluate(x, Y)
    assert learner(x).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_norms_of_any_shape_do_not_decay_and_start_no_block():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.LayerNorm((4, 6, 6)), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    learner = Learner(model, "local_ce", example=torch.randn(2, 1, 6, 6), weight_decay=0.1)
    decay = {
        id(p): group["weight_decay"]
        for made in learner.groups
        for optimizer in made.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert {n: decay[id(p)] > 0 for n, p in model.named_parameters()} == {
        n: n.endswith("weight") and not n.startswith("1.") for n, _ in model.named_parameters()
    }
    assert [block.name for block in learner.network.blocks] == ["1", "3"]


def test_recomputation_leaves_moving_state_alone():
    results = []
    for rule in ("backprop", "backprop_checkpoint"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.ReLU(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip
        learner = Learner(model, rule, optimizer="sgd", lr=0.1)
        for _ in range(3):
            learner.step(X, Y)
        results.append(model.state_dict())
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


def test_sparse_gradients_train_as_dense_ones_and_are_refused_by_optimizers_that_cannot():
    ids, y = torch.arange(12).view(4, 3) % 5, torch.arange(12).view(4, 3) % 4
    trained = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 8, sparse=sparse), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        options = {"momentum": 0.0, "nesterov": False}
        learner = Learner(
            model, "local_ce", optimizer="sgd", lr=0.1, optimizer_options=options, weight_decay=0.0, clip=0.05
        )
        for _ in range(2):
            learner.step(ids, y)
        trained.append(model[0].weight.detach().clone())
    assert torch.allclose(*trained, atol=1e-7)
    with pytest.raises(LayerwiseError, match="sparse"):
        Learner(model, "local_ce").step(ids, y)
