"""Adapters whose own training is more than the gradient of the task's loss are named, and what freezing leaves."""

import warnings

import pytest
import torch
from torch import nn

from layerwise import LayerwiseError, Learner

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def network(home, **config):
    """A chain with an adapter from a module of peft, as far as names show."""
    adapter = type("Layer", (nn.Linear,), {"__module__": home})(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(adapter), nn.Linear(4, 3))
    model.peft_config = {"default": type("Config", (), config)()}
    return model


@pytest.mark.parametrize(
    ("home", "config", "name"),
    [
        ("peft.tuners.adalora.layer", {}, "AdaLoRA also needs an orthogonal regularisation"),
        ("peft.tuners.lora.monteclora", {}, "MonteCLoRA also needs its variational loss"),
        ("peft.tuners.adamss.layer", {"use_asa": True}, "AdaMSS with ASA also needs the gradients of all layers"),
    ],
)
def test_what_a_learner_leaves_out_is_said(home, config, name):
    with pytest.warns(UserWarning, match=name):
        Learner(network(home, **config), "local_ce", example=X)


@pytest.mark.parametrize(
    ("home", "config"),
    [("peft.tuners.lora.layer", {}), ("peft.tuners.adamss.layer", {"use_asa": False}), ("peft.tuners.adaloras", {})],
)
def test_others_are_silent(home, config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Learner(network(home, **config), "local_ce", example=X).step(X, Y)


def test_the_homes_are_those_of_peft():
    """The names are only as good as the package."""
    pytest.importorskip("peft")
    from peft.tuners.adalora.layer import SVDLinear
    from peft.tuners.adamss.layer import AdamssLayer
    from peft.tuners.lora.monteclora import MontecloraSampler

    from layerwise.learner.adapters import NEEDS

    homes = [home for home, _ in NEEDS.values()]
    for kind, home in zip((SVDLinear, MontecloraSampler, AdamssLayer), homes, strict=True):
        assert kind.__module__ == home or kind.__module__.startswith(home + ".")


class Prompted(nn.Module):
    """Blocks that are frozen, behind a layer that learns; the head learns, too, if `head` says so."""

    def __init__(self, head=False):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)
        self.requires_grad_(False)
        self.head.requires_grad_(head)
        self.prompt = nn.Linear(4, 4)

    def forward(self, x):
        x = self.prompt(x)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("head", [True, False])
def test_a_prompt_in_front_of_frozen_blocks_is_named_where_no_gradient_comes_back(head):
    model = Prompted(head)
    learner = Learner(model, "local_ce")
    with pytest.warns(UserWarning, match=r"of layers.1, layers.2 learns .* \(prompt.weight, ...\) does so from"):
        learner.step(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.step(X, Y)  # once
        Learner(Prompted(head), "backprop").step(X, Y)
        model.layers[2].requires_grad_(True)
        Learner(model, "local_ce").step(X, Y)  # what is frozen in the middle is the usual fine-tuning


def test_a_network_of_which_nothing_learns_is_refused_until_something_does():
    model = Prompted().requires_grad_(False)
    learner = Learner(model, "backprop", example=X)
    with pytest.raises(LayerwiseError, match="nothing learns: all parameters of Prompted"):
        learner.step(X, Y)
    model.requires_grad_(True)
    learner.step(X, Y)
    with pytest.warns(UserWarning, match="only the rule's own modules learn"):
        Learner(Prompted().requires_grad_(False), "local_ce").step(X, Y)
