"""Optimizers of any kind: by dotted path, several in one group, options by parameter name, modes and own numbers."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches, dense, problem
from torch import nn

from layerwise import LayerwiseError, Learner

X, Y = problem()


class Counting(torch.optim.Optimizer):
    """Like a schedule-free optimizer: a count and a mode in its groups, no step out of training mode."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    def train(self):
        for group in self.param_groups:
            group["train_mode"] = True

    def eval(self):
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] / group["k"] * p.grad


def muon_and_adamw(groups):
    parameters = [p for group in groups for p in group["params"]]
    matrices = [p for p in parameters if p.ndim == 2]
    vectors = [p for p in parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.01)]


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_muon_for_matrices_and_adamw_for_the_rest_is_the_loop_by_hand():
    model, twin = dense(), dense()
    learner = Learner(model, "backprop", optimizer=muon_and_adamw, example=X)
    by_hand = muon_and_adamw([{"params": list(twin.parameters())}])
    for x, y in batches(3):
        learner.step(x, y)
        F.cross_entropy(twin(x), y).backward()
        for optimizer in by_hand:
            optimizer.step()
            optimizer.zero_grad()
    assert same(model, twin)


@pytest.mark.parametrize("optimizer", [muon_and_adamw, Counting, {"*.bias": {"optimizer": Counting, "lr": 0.5}}])
def test_several_optimizers_continue_to_the_same_bits(optimizer):
    learner = Learner(dense(), "local_ce", optimizer=optimizer, example=X)
    for x, y in batches(3):
        learner.step(x, y)
    other = Learner(dense(), "local_ce", optimizer=optimizer, example=X)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for x, y in batches(2):
        learner.step(x, y)
        other.step(x, y)
    assert same(learner.network.model, other.network.model)


def test_a_dotted_path_is_the_class():
    models = dense(), dense()
    for model, optimizer in zip(models, ("torch.optim.NAdam", torch.optim.NAdam), strict=True):
        learner = Learner(model, "local_ce", optimizer=optimizer, lr=0.01)
        learner.step(X, Y)
    assert same(*models)


def test_options_by_parameter_name():
    """Plain gradient descent with a rate per pattern: the first pattern that matches counts."""
    model, twin = dense(), dense()
    patterns = {"1.*": {"lr": 0.3}, "*.bias": {"lr": 0.2}, "*": {"lr": 0.1}}
    optimizer = {name: {"optimizer": "SGD", "momentum": 0.0, "weight_decay": 0.0, **o} for name, o in patterns.items()}
    learner = Learner(model, "backprop", optimizer=optimizer, lr_multipliers={"head": 10.0}, example=X)
    head = {name for name, p in model.named_parameters() if any(p is q for q in learner.network.head.parameters())}
    learner.step(X, Y)
    F.cross_entropy(twin(X), Y).backward()
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        rate = 0.3 if name.startswith("1.") else 0.2 if name.endswith(".bias") else 0.1
        torch.testing.assert_close(q, p - rate * (10 if name in head else 1) * p.grad)
    assert head


def test_a_mode_that_the_owner_sets_stays():
    learner = Learner(dense(), "local_ce", optimizer=Counting, example=X)
    modes = lambda: {group["train_mode"] for group in learner.optimizer.param_groups}  # noqa: E731
    learner.step(X, Y)
    learner(X)
    assert modes() == {True}
    learner.optimizer.eval()
    learner(X)
    assert modes() == {False}


def test_frozen_and_thawed_parameters_of_one_of_several_optimizers():
    """In fp16 a scaler refuses an optimizer without gradients, such as one whose parameters are all frozen."""
    model = dense()
    learner = Learner(model, "backprop", optimizer={"*.bias": {"optimizer": "rmsprop"}}, precision="fp16", example=X)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    for frozen in (True, False):
        before = [p.detach().clone() for p in model.parameters()]
        for p in biases:
            p.requires_grad_(not frozen)
        learner.step(X, Y)
        changed = {id(p): not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)}
        assert not any(changed[id(p)] for p in biases) if frozen else all(changed[id(p)] for p in biases)
        assert all(done for p, done in changed.items() if p not in {id(b) for b in biases})


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ("schedulfree.AdamW", "there is no module 'schedulfree'"),
        ("torch.optim.Nadam", "unknown optimizer 'torch.optim.Nadam'"),
        ("os.system", "unknown optimizer 'os.system'"),
        ({"lora": {"lr": 0.1}}, "pattern 'lora' matches no parameter"),
        ({"*": 0.1}, "maps '*' to 0.1"),
        ({"*": {"optimizer": {"*": {}}}}, "is a mapping"),
        ({"*": {"lr": -1.0}}, "lr is -1.0"),
        (lambda groups: [torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(groups, lr=0.1)], "into two optimizers"),
        (lambda groups: [torch.optim.SGD(groups, lr=0.1), 3], "gave int"),
    ],
)
def test_what_cannot_serve_is_refused(optimizer, sentence):
    with pytest.raises(LayerwiseError, match=re.escape(sentence)):
        Learner(dense(), "local_ce", optimizer=optimizer).step(X, Y)


def test_blocks_with_other_multipliers_stay_in_groups_of_their_own():
    joined = lambda groups: torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)  # noqa: E731
    with pytest.raises(LayerwiseError, match="keep the groups that it is called with apart"):
        Learner(dense(), "backprop", optimizer=joined, lr_multipliers={"head": 2.0}, example=X)


def test_a_readout_larger_than_the_adapters_of_a_frozen_block_is_warned_of():
    def adapted(frozen):
        block = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 1, bias=False), nn.Linear(1, 64, bias=False))
        block[0].requires_grad_(not frozen)
        return nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 8), block, nn.Linear(64, 64), nn.Linear(64, 4))

    with pytest.warns(UserWarning, match=r"more parameters than what the blocks train: 2 \(260 against 128\)"):
        Learner(adapted(True), "local_ce", example=X)
    Learner(adapted(True), "sll", example=X)  # its projections are fixed
    Learner(adapted(False), "local_ce", example=X)  # nothing is frozen: warnings are errors here
