"""Devices that this machine does not have, simulated."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from layerwise import LayerwiseError, Learner, models
from layerwise.core import devices
from layerwise.core.randomness import preserved_generators, seed_generators


def pretend(monkeypatch, kind, count):
    """A machine with `count` accelerators of a kind."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device(kind) if count else None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_auto_is_the_accelerator_of_the_machine(monkeypatch, kind):
    pretend(monkeypatch, kind, 1)
    assert devices.pick_device("auto") == devices.pick_device(kind) == torch.device(kind, 0)
    assert devices.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(LayerwiseError, match=rf"there is no device '{kind}:1' here \(1 of kind {kind}\)"):
        devices.pick_device(f"{kind}:1")
    other = "xpu" if kind != "xpu" else "mps"
    with pytest.raises(LayerwiseError, match=f"there is no device '{other}' here"):
        devices.pick_device(other)
    pretend(monkeypatch, kind, 0)
    assert devices.pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_draws_on_an_accelerator_leave_no_trace(monkeypatch, kind):
    """Its module has a generator per device, or a single one (mps), whose functions take no device."""
    states = {0: 11, 1: 12}
    where = (lambda device=None: 0) if kind == "mps" else (lambda device: torch.device(device).index)
    module = SimpleNamespace(
        get_rng_state=lambda *d: states[where(*d)],
        set_rng_state=lambda state, *d: states.update({where(*d): state}),
        manual_seed=lambda seed: states.update({0: seed}),
    )
    monkeypatch.setattr(torch, kind, module)
    with preserved_generators(torch.device(kind, 0)):
        seed_generators(5, torch.device(kind, 0))
        assert states == {0: 5, 1: 12}
    assert states == {0: 11, 1: 12}


@pytest.mark.parametrize(
    ("precision", "allowed"), [("fp16", {"cpu", "cuda", "xpu"}), ("bf16", {"cpu", "cuda", "xpu", "mps"})]
)
def test_what_a_device_lacks_is_said(precision, allowed):
    for kind in ("cpu", "cuda", "xpu", "mps"):
        if kind in allowed:
            devices.check_precision(precision, torch.device(kind))
        else:
            with pytest.raises(LayerwiseError, match="fp16 needs a gradient scaler, which torch has not for mps"):
                devices.check_precision(precision, torch.device(kind))


def test_memory_is_counted_by_the_meter_where_the_allocator_tells_no_peak():
    assert devices.allocator(torch.device("cpu")) is devices.allocator(torch.device("mps")) is None
    assert devices.allocator(torch.device("cuda")) is torch.cuda
    assert devices.allocator(torch.device("xpu")) is torch.xpu


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "device", "refused"),
    [
        (4, 1, 2, "cpu", True),
        (7, 1, (1, 2), "cpu", True),
        (8, 1, 2, "cpu", False),
        (4, 1, 1, "cpu", False),
        (4, 3, 2, "cpu", False),
        (4, 1, 2, "cuda", False),
    ],
)
def test_a_convolution_that_would_write_outside_its_memory_is_refused(channels, kernel, stride, device, refused):
    model = nn.Sequential(nn.Conv2d(channels, 8, kernel, stride), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(LayerwiseError, match="writes outside its memory") if refused else nullcontext():
        devices.check_channels_last(model, torch.device(device))


def test_a_learner_refuses_it_only_in_that_order():
    def make(**options):
        return Learner(models.create("resnet", (3, 8, 8), 4, depth=4, width=4), "backprop", **options)

    make()
    with pytest.raises(LayerwiseError, match="channels-last order on the CPU"):
        make(channels_last=True)
