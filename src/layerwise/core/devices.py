"""What the devices of torch have and lack: which there is, waiting for it, its random draws, precision, memory figures.

`torch.accelerator` and the module of a device's kind (`torch.cuda`, `torch.xpu`, `torch.mps`) are asked here alone.
AMD's GPUs (ROCm) are `cuda` for torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerwise.errors import LayerwiseError, short

LEAST_CHANNELS = 8
"""Of a strided 1x1 convolution in channels-last order on the CPU."""
SCALED = ("cpu", "cuda", "xpu")
"""Kinds of device for which torch has the operations of a gradient scaler (fp16)."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; `"auto"` is this machine's accelerator where there is one.

    Raises:
        LayerwiseError: no such device on this machine.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        name = "cpu" if here is None else here.type
    try:
        device = torch.device(name)
    except RuntimeError as reason:
        raise LayerwiseError(f"unknown device {name!r}; choose cpu, cuda, cuda:N, mps, xpu or auto.") from reason
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    if (device.index or 0) >= count:
        found = "no accelerator" if here is None else f"{torch.accelerator.device_count()} of kind {here.type}"
        raise LayerwiseError(f"there is no device {name!r} here ({found}); choose cpu or auto.")
    return torch.device(device.type, device.index or 0)


def usable_device(device: torch.device | str) -> torch.device:
    """A device that blocks can run on.

    Raises:
        LayerwiseError: this machine has none of that name, or it holds no numbers.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError, AttributeError) as reason:
        said = str(reason).splitlines()[0].rstrip(".")
        raise LayerwiseError(
            f"device {short(device)} cannot be used ({said}); choose one that this machine has."
        ) from reason
    if found.type == "meta":
        raise LayerwiseError("nothing can be trained on the device 'meta'; choose one that holds numbers.")
    return found


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize()


def device_names() -> list[str]:
    """Names of this machine's accelerators."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (
        []
        if here is None
        else [device_name(torch.device(here.type, i)) for i in range(torch.accelerator.device_count())]
    )


def device_name(device: torch.device) -> str:
    """The name of an accelerator, where its kind tells it; the kind otherwise."""
    named = getattr(_module(device), "get_device_name", None)
    return device.type if named is None else named(device)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise LayerwiseError for a precision that a device does not have.

    >>> check_precision("fp16", torch.device("mps"))
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: fp16 needs a gradient scaler, which torch has not for mps; choose bf16 or fp32.
    """
    if precision == "fp16" and device.type not in SCALED:
        raise LayerwiseError(
            f"fp16 needs a gradient scaler, which torch has not for {device.type}; choose bf16 or fp32."
        )
    if precision != "fp32" and not torch.amp.is_autocast_available(device.type):
        raise LayerwiseError(f"torch has no autocast for {device.type}; choose precision fp32.")


def check_channels_last(model: nn.Module, device: torch.device) -> None:
    """Raise LayerwiseError for a convolution whose backward pass writes outside its memory in this order.

    torch 2.13 does so on the CPU where a kernel of one pixel skips pixels and there are fewer than eight channels: the
    process aborts, or continues with a damaged heap.

    >>> check_channels_last(nn.Conv2d(4, 8, 1, stride=2), torch.device("cpu"))
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: channels-last order on the CPU: torch's backward pass of a 1x1 convolution with a \
stride and 4 channels writes outside its memory; leave channels_last out, or make it 8 channels or more.
    """
    for module in model.modules() if device.type == "cpu" else ():
        if not isinstance(module, nn.Conv2d) or module.in_channels >= LEAST_CHANNELS:
            continue
        if module.kernel_size == (1, 1) and max(module.stride) > 1:
            raise LayerwiseError(
                "channels-last order on the CPU: torch's backward pass of a 1x1 convolution with a stride and "
                f"{module.in_channels} channels writes outside its memory; leave channels_last out, or make it "
                f"{LEAST_CHANNELS} channels or more."
            )


def allocator(device: torch.device) -> Any:
    """The module that knows the peak of a device's memory, None where there is none, as on the CPU and on mps."""
    module = None if device.type == "cpu" else _module(device)
    wanted = ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
    return module if all(hasattr(module, name) for name in wanted) else None


def seed_device(seed: int, device: torch.device) -> None:
    """Start the generator of an accelerator at `seed`."""
    module = _module(device)
    if device.type == "cuda":  # without waiting for the device
        module.default_generators[device.index or 0].manual_seed(seed)
    elif module is not None:
        module.manual_seed(seed)


@contextmanager
def preserved_generator(device: torch.device) -> Iterator[None]:
    """A context after which the generator of an accelerator is where it was."""
    module = None if device.type == "cpu" else _module(device)
    if module is None:
        yield
        return
    where = () if device.type == "mps" else (device,)  # there is one
    state = module.get_rng_state(*where)
    try:
        yield
    finally:
        module.set_rng_state(state, *where)


def _module(device: torch.device) -> Any:
    """The module of a kind of device, None for kinds that have none, such as meta."""
    return getattr(torch, device.type, None) if device.type != "cpu" else None
