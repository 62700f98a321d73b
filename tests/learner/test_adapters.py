"""Adapters whose own training is more than the gradient of the task's loss are named."""

import warnings

import pytest
import torch
from torch import nn

from layerwise import Learner

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
