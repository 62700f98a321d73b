"""Warns of adapters of peft whose own training is more than the gradient of the task's loss."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

NEEDS = {
    "AdaLoRA": (
        "peft.tuners.adalora",
        "an orthogonal regularisation in the model's own loss and, in every step, the gradients of all layers at once "
        "(`update_and_allocate`); neither is there, so its ranks stay as they begin",
    ),
    "MonteCLoRA": (
        "peft.tuners.lora.monteclora",
        "its variational loss (`_get_monteclora_loss`), which is no part of the task's",
    ),
    "AdaMSS with ASA": (
        "peft.tuners.adamss",
        "the gradients of all layers at once after every step, which are freed block by block, so it chooses nothing",
    ),
}
"""By the name of a method, where its modules are defined, and what its training needs."""


def warn_of_adapters(model: nn.Module) -> None:
    """Warn if the model holds adapters that a learner trains without a part of their own training."""
    homes = {type(module).__module__ for module in model.modules()}
    for name, (home, needs) in NEEDS.items():
        if not any(found == home or found.startswith(home + ".") for found in homes):
            continue
        if name == "AdaMSS with ASA" and not any(getattr(config, "use_asa", False) for config in _configs(model)):
            continue
        warnings.warn(
            f"{name} also needs {needs}: a learner trains it by the task's loss alone; take LoRA, or another adapter "
            "that does not need it.",
            stacklevel=2,
        )


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configurations of the model's adapters, wherever they were put in."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        yield from configs.values() if isinstance(configs, dict) else ()
