"""Arguments of a learner: options, optimizers and batches of a wrong kind are refused in one sentence."""

import copy
import math

import pytest
import torch
from support.nets import batches, dense, problem, trained
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner

X, Y = problem()


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), "is an instance of SGD, and every block needs"),
        (lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]), "LBFGS needs a closure"),
        (lambda groups: None, "gave NoneType; let it return a torch.optim.Optimizer"),
        (lambda groups: torch.optim.SGD(groups[:1], lr=0.1), "left parameters out"),
        (nn.Linear, "Linear is not a torch.optim.Optimizer"),
        (3, "the optimizer is 3; give a name"),
    ],
)
def test_an_optimizer_that_cannot_serve_is_refused(optimizer, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), "local_ce", optimizer=optimizer).step(X, Y)


def test_the_one_optimizer_saves_loads_and_refuses():
    learner = trained(dense(), "backprop", batches(2))
    other = Learner(copy.deepcopy(learner.network.model), "backprop", example=X)
    other.optimizer.load_state_dict(learner.optimizer.state_dict())
    learner.step(X, Y)
    other.step(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(learner.network.parameters(), other.network.parameters(), strict=True))
    with pytest.raises(LayerwiseError, match="none can be added"):
        learner.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    with pytest.raises(LayerwiseError, match="has no optimizers yet"):
        torch.optim.lr_scheduler.StepLR(Learner(dense(), "local_ce").optimizer, 1)
    torch.optim.lr_scheduler.OneCycleLR(learner.optimizer, 0.1, total_steps=10)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (X.numpy(), Y, "of type ndarray; give torch.from_numpy"),
        ((X, X), Y, "of type tuple"),
        (X, Y.numpy(), "the labels are of type ndarray"),
        (X, Y.tolist(), "the labels are of type list"),
        (X, Y[0], "8 inputs and one number labels|one number labels"),
        (X, Y[:2], "and 2 labels"),
        (torch.tensor(1.0), Y, "a single number"),
        (X.to("meta"), Y, "the inputs are on the meta device"),
        (X.to_sparse(), Y, "the inputs are sparse"),
        (torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged), Y, "the inputs are a nested tensor"),
        (X, Y.to("meta"), "the labels are on the meta device"),
        (X, Y.to_sparse(), "the labels are sparse"),
    ],
)
def test_a_batch_that_is_none_is_refused(x, y, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), "local_ce").step(x, y)


def test_methods_refuse_what_is_no_tensor_and_no_path():
    learner = Learner(dense(), "local_ce", example=X)
    with pytest.raises(LayerwiseError, match="the labels are of type ndarray"):
        learner.check_labels(Y.numpy())
    with pytest.raises(LayerwiseError, match="the folder is of type int; give the path of a folder"):
        learner.save_weights(3)


def test_a_model_that_was_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = dense()
    for rule in ("sll", "zeroth_order"):
        with pytest.raises(LayerwiseError, match=r"made in torch\.inference_mode"):
            Learner(model, rule)


class Broken(nn.Module):
    """Fails as it is told, at once or only in later passes."""

    def __init__(self, fail, passes=0):
        super().__init__()
        self.fail, self.passes = fail, passes

    def forward(self, x):
        self.passes -= 1
        return x if self.passes >= 0 else self.fail(x)


FAILURES = {
    "has no attribute 'linear'": lambda x: x.linear,
    "KeyError: 'mask'": lambda x: {}["mask"],
    "AssertionError": lambda x: (_ for _ in ()).throw(AssertionError()),
    "division by zero": lambda x: 1 / 0,
    "RuntimeError": lambda x: (_ for _ in ()).throw(RuntimeError()),
}


@pytest.mark.parametrize("sentence", FAILURES)
@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("cuts", [None, "[13]"])
def test_whatever_a_module_raises_is_a_sentence_that_says_where(sentence, passes, cuts):
    parts = nn.Linear(64, 8), Broken(FAILURES[sentence], passes), nn.Linear(8, 4)
    learner = Learner(nn.Sequential(nn.Flatten(), *parts), "local_ce", cuts=cuts)
    with pytest.raises(LayerwiseError, match=sentence):
        [learner.step(X, Y) for _ in range(3)]


def test_an_input_that_cannot_be_predicted_is_a_sentence():
    with pytest.raises(LayerwiseError, match="the network cannot predict"):
        trained(dense(), "sid", [(X, Y)])(X[:, :, :4])


@pytest.mark.parametrize("schedule", [lambda k: math.nan, lambda k: -1.0, lambda k: None, lambda k: 1 / 0])
def test_a_schedule_that_gives_no_rate_is_refused(schedule):
    with pytest.raises(LayerwiseError, match="the schedule gives"):
        Learner(dense(), "local_ce", schedule=schedule).step(X, Y)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer_options": {"lr": 7.0}}, "holds 'lr', which is an option of its own"),
        ({"optimizer_options": {"weight_decay": 7.0}}, "holds 'weight_decay'"),
        ({"optimizer_options": {"amsgrad": "yes"}}, "it is True or False"),
        ({"optimizer_options": {"betas": (0.9,)}}, "AdamW refuses its options"),
        ({"optimizer_options": [1]}, "give a mapping"),
        ({"task": LanguageModel(), "label_smoothing": 0.1}, "give it only to the task"),
        ({"device": "foo"}, "device 'foo' cannot be used"),
        ({"device": "meta"}, "nothing can be trained on the device 'meta'"),
        ({"lr_multipliers": [1]}, "lr_multipliers is of type list"),
        ({"replicas": 3}, "replicas is of type int"),
        ({"stage": 3}, "stage is of type int"),
        ({"layout": 3}, "layout is of type int"),
        ({"compile": 5}, "compile is of type int; give True, False, or the name of a backend"),
        ({"compile": "inductr"}, "unknown backend of torch.compile 'inductr'; did you mean 'inductor'"),
        ({"cuts": 3}, "cuts is of type int"),
        ({"example": X.numpy()}, "example is of type ndarray; give a batch of inputs: a tensor"),
        ({"example": [X]}, "example is of type list"),
        ({"channels_last": "yes"}, "channels_last is of type str"),
        ({"offload_folder": 3}, "offload_folder is of type int; give the path of a folder"),
        ({"tied": X}, "tied is of type Tensor"),
        ({"tied": "", "cuts": "[13]"}, "tied is ''"),
        ({"device": 10**40}, "device 1000.* cannot be used"),
    ],
)
def test_arguments_of_another_kind_are_refused(options, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(dense(), "local_ce", **options).step(X, Y)


def test_several_processes_that_know_nothing_of_each_other_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(LayerwiseError, match=r"runs in 4 processes.*OneProcess\(\)"):
        Learner(dense(), "local_ce").step(X, Y)
    from layerwise.learner import OneProcess

    Learner(dense(), "local_ce", replicas=OneProcess()).step(X, Y)


def test_transforms_of_torch_func_find_no_zeros_in_place_of_gradients():
    learner = trained(dense(), "local_ce", batches(1))
    for transform in (torch.func.grad, torch.func.jacrev, lambda f: torch.func.vjp(f, X)):
        with pytest.raises(LayerwiseError, match="differentiates these inputs"):
            transform(lambda x: learner(x).sum())(X)
    with pytest.raises(LayerwiseError, match="a training step cannot run inside a transform"):
        torch.func.vmap(lambda x: learner.step(x[None], Y[:1]).loss)(X)
    assert torch.allclose(torch.func.vmap(lambda x: learner(x[None])[0])(X), learner(X), atol=1e-6)
    assert torch.func.grad(lambda x: learner.network(x).sum())(X).any()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_a_type_that_torch_cannot_compare_are_refused(dtype):
    y = nn.functional.one_hot(Y, 4)
    with pytest.raises(LayerwiseError, match="give floats, bool or int64"):
        Learner(dense(), "local_ce", task="multilabel").step(X, y.to(dtype))
    Learner(dense(), "local_ce", task="multilabel").step(X, y.to(torch.uint8))
