"""Makes the parts of a learner from its arguments, before the shapes are known."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.calls import CallPartition
from layerwise.core.devices import check_channels_last, check_precision, usable_device
from layerwise.core.execution import Execution
from layerwise.core.late import LateWeights, NotLate
from layerwise.core.optim import Factory, Schedule, optimizer_factory
from layerwise.core.randomness import OtherGenerators, derive_seed
from layerwise.core.rule import Rule
from layerwise.core.tasks import Task
from layerwise.learner.arguments import check_can, check_multipliers, usable_task
from layerwise.learner.network import check_serves, cut
from layerwise.learner.weights import late_weights
from layerwise.memory.offload import NotOffloaded, Offload
from layerwise.parallel.alone import OneProcess, WholeNetwork
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage

ONE_PROCESS = OneProcess()
"""For learners without replicas."""
WHOLE_NETWORK = WholeNetwork()
"""For learners without stages."""
DONE_ONCE = ("example", "weights", "cuts", "blocks", "output", "read", "tied")
"""Arguments that a copy of the learner does not need: example, weights and cuts are used only once."""


@dataclass
class Setup:
    """The parts of a learner, before the shapes are known."""

    network: Partition
    rule: Rule
    factory: Factory
    lr_multipliers: Mapping[str, float]
    execution: Execution
    stage: Stage | WholeNetwork
    replicas: Replicas | OneProcess
    make_offload: Callable[[Sequence[Sequence[Block]], int], Offload | NotOffloaded]
    """Makes an offloader from the blocks of every group here and the number of the first block."""
    offload_folder: Path
    """Folder for files of offloaded blocks or activations."""
    late: LateWeights | NotLate
    """Makes the weights of a model on the meta device."""
    seed: int
    task: Task
    """The task, without the number of outputs."""
    compile: bool | str
    facts: Mapping[str, Any]
    """Facts that must agree on all replicas, by name."""
    others: Mapping[bool, OtherGenerators] = field(
        default_factory=lambda: {m: OtherGenerators() for m in (True, False)}
    )
    """Whether steps in training mode, and in evaluation mode, draw from generators that are not torch's."""

    @property
    def blocks(self) -> list[Block]:
        """All blocks, the head last."""
        return self.network.sites

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self.execution.device


def make_setup(
    model: nn.Module,
    rule: Rule,
    given: Mapping[str, Any],
    make_offload: Callable[[Sequence[Sequence[Block]], int], Offload | NotOffloaded],
) -> Setup:
    """Cut the model, move it to the device, and collect the parts for its training.

    Args:
        model: a module, or a partition of one.
        rule: the rule.
        given: the other arguments of `Learner` by name, checked by `check_arguments`.
        make_offload: see `Setup`.

    Raises:
        LayerwiseError: arguments that do not fit the model or each other.
    """
    replicas = given["replicas"] or ONE_PROCESS
    replicas.check(precision=given["precision"], compile=given["compile"], channels_last=given["channels_last"])
    late = late_weights(model, given["weights"], given["seed"], given["device"])
    cutting = {name: given[name] for name in ("cuts", "blocks", "output", "read", "tied", "example", "layout")}
    network = cut(model, **cutting)
    if isinstance(network, CallPartition):
        check_serves(network, rule)
    check_multipliers(given["lr_multipliers"] or {}, [block.name for block in network.sites])
    device = next(model.parameters()).device if given["device"] is None else usable_device(given["device"])
    check_precision(given["precision"], device)
    if given["device"] is not None and given["offload"] == "none":
        network.to(device)
    if given["channels_last"]:
        check_channels_last(model, device)
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    task = usable_task(given["task"], given["label_smoothing"])
    check_can(rule, task)
    rates = {"lr": given["lr"], "weight_decay": given["weight_decay"], "options": given["optimizer_options"]}
    return Setup(
        network,
        rule,
        optimizer_factory(given["optimizer"], **rates),
        dict(given["lr_multipliers"] or {}),
        Execution(
            device=device,
            schedule=given["schedule"] or Schedule(),
            autocast={"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[given["precision"]],
            clip=given["clip"],
            accumulate=given["accumulate"],
            micro=given["micro"],
            nonfinite=given["nonfinite"],
            # The first replica draws as one process would; the others must not drop the same units.
            seed=derive_seed(given["seed"], "replica", replicas.rank) if replicas.rank else given["seed"],
            replicas=replicas,
        ),
        given["stage"] or WHOLE_NETWORK,
        replicas,
        make_offload,
        Path(given["offload_folder"] or tempfile.gettempdir()),
        late,
        given["seed"],
        task,
        given["compile"],
        _facts(network, rule, given),
    )


def _facts(network: Partition, rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that must agree on all replicas."""
    own = ("stage", "replicas", "device", "offload", "offload_folder", "compile", *DONE_ONCE)
    options = {name: value for name, value in given.items() if name not in own}
    parts = {f"the rule's {name}": value for name, value in vars(rule).items()}
    return {"the rule": rule.name, **options, "cuts": network.cuts, **parts}
