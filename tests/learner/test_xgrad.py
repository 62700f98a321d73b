"""XGrad's weight prediction against the loop of the paper: remember, go ahead, gradient, restore, step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches, dense, problem
from torch import nn

from layerwise import LayerwiseError, Learner
from layerwise.core.xgrad import XGradAdamW, XGradSGD

X, Y = problem()
PATH = "layerwise.core.xgrad."


def by_hand(model, optimizer, data, predicted, s):
    """The paper's loop with torch's own optimizer."""
    for number, (x, y) in enumerate(data):
        before = [p.detach().clone() for p in model.parameters()]
        if number:
            with torch.no_grad():
                for p in model.parameters():
                    p -= s * 0.01 * predicted(optimizer.state[p])
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, b, g in zip(model.parameters(), before, gradients, strict=True):
                p.copy_(b)
                p.grad = g
        optimizer.step()


def adam(state):
    t = float(state["step"])
    return (state["exp_avg"] / (1 - 0.9**t)) / ((state["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8)


CASES = {
    "XGradAdamW": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0), adam),
    "XGradSGD": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), lambda state: state["momentum_buffer"]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("s", [1.0, 2.0])
def test_it_is_the_loop_of_the_paper(name, s):
    make, predicted = CASES[name]
    model, twin, data = dense(), dense(), batches(4)
    by_hand(twin, make(twin.parameters()), data, predicted, s)
    options = {"lr": 0.01, "weight_decay": 0.0, "optimizer_options": {"ahead": s}, "example": X}
    learner = Learner(model, "backprop", optimizer=PATH + name, **options)
    for x, y in data:
        learner.step(x, y)
    torch.testing.assert_close(learner(X), twin.eval()(X), rtol=1e-4, atol=1e-5)  # predicts at the weights themselves
    ahead = [p.detach().clone() for p in model.parameters()]
    learner.optimizer.eval()
    for p, q, a in zip(model.parameters(), twin.parameters(), ahead, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, a)
    learner.optimizer.train()
    assert all(torch.equal(p, a) for p, a in zip(model.parameters(), ahead, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_local_rules_continue_from_its_state(name):
    learner = Learner(dense(), "local_ce", optimizer=PATH + name, lr=0.01, example=X)
    for x, y in batches(3):
        learner.step(x, y)
        learner(x)  # goes back and ahead again
    other = Learner(dense(), "local_ce", optimizer=PATH + name, lr=0.01, example=X)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for x, y in batches(2):
        assert learner.step(x, y).read() == other.step(x, y).read()


def test_no_step_ahead_is_the_plain_optimizer_and_other_weights_stay():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = XGradAdamW(parameters[:1], lr=0.1, ahead=0.0), torch.optim.AdamW(parameters[1:], lr=0.1)
    for number in range(3):
        for p, optimizer in zip(parameters, optimizers, strict=True):
            p.grad = torch.full((3,), 1.0 + number)
            optimizer.step()
    assert torch.equal(*parameters)
    p = nn.Parameter(torch.ones(1))
    optimizer = XGradSGD([p], lr=0.5, momentum=0.0)
    p.grad = torch.ones(1)
    optimizer.step()
    with torch.no_grad():
        p.fill_(7.0)  # such as a clipped weight: not undone by the next step
    optimizer.step()
    assert p.item() == 6.5
    with pytest.raises(LayerwiseError, match="ahead is -1"):
        Learner(dense(), optimizer=XGradAdamW, optimizer_options={"ahead": -1.0}, example=X)
