"""An optimizer's step without its overhead has the bits of torch's own, and skips no hook or profiler."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from layerwise import Learner
from layerwise.core.stepping import take_step

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.3, betas=(0.7, 0.8), fused=True),
    "adam, decoupled": lambda groups: torch.optim.Adam(
        groups, weight_decay=0.3, decoupled_weight_decay=True, maximize=True, fused=True
    ),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True, fused=True),
    "not fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=False),
    "a rate in a tensor": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.1), fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_has_the_bits_of_torchs_own(name):
    """Weights and state alike, also of groups of two kinds of numbers, and where a gradient is missing for a while."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).double())
    nets = [net, copy.deepcopy(net)]
    made = []
    for each in nets:
        first, second = each
        groups = [
            {"params": [first.weight, second.weight]},
            {"params": [first.bias], "weight_decay": 0.0},
            {"params": [second.bias]},
        ]
        made.append(OPTIMIZERS[name](groups))
    for step in range(4):
        for each in zip(*(net.parameters() for net in nets), strict=True):
            gradient = None if step == 2 and each[0].dim() == 1 else torch.randn_like(each[0])
            for parameter in each:
                parameter.grad = None if gradient is None else gradient.clone()
        take_step(made[0])
        made[1].step()
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(mine, theirs)
        states = made[0].state[mine], made[1].state[theirs]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] if states[0][key] is not None)


def test_whoever_watches_a_step_is_told():
    """Hooks of the optimizer and of all optimizers, a step that was put over the class's, profilers."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(2)
    take_step(optimizer)
    seen = []
    handles = [
        optimizer.register_step_post_hook(lambda *_: seen.append("own")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("all")),
    ]
    take_step(optimizer)
    assert seen == ["all", "own"]
    for handle in handles:
        handle.remove()
    vars(optimizer)["step"] = lambda: seen.append("put over")
    take_step(optimizer)
    assert seen[2:] == ["put over"]
    del vars(optimizer)["step"]
    with torch.profiler.profile() as profile:
        take_step(optimizer)
    assert any("AdamW.step" in event.name for event in profile.events() or ())


def test_a_learner_still_calls_the_hooks_of_its_optimizers():
    """A hook that its owner has registered at a group's optimizer runs once per update."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    learner = Learner(net, "local_ce", example=x)
    seen = []
    learner.groups[0].optimizers[0].register_step_pre_hook(lambda *_: seen.append(1))
    for _ in range(3):
        learner.step(x, y)
    assert len(seen) == 3
