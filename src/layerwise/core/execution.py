"""How blocks are run and updated: device, precision, schedule, clipping, and who else trains the same blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn


class Alone:
    """One process that trains its blocks: nothing is averaged. `Replicas` does the same for several."""

    count = 1
    """Processes that train these blocks, each on its share of the batch."""
    every_batch = False
    """Whether gradients are averaged after every batch, not only where an update is due."""
    shares_parameters = False
    """Whether a parameter of the model is replaced by a share of it."""
    deferred = False
    """Whether a group steps while the next one runs forward, as its averages are on their way until then."""

    def full_of(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """The parameters that blocks run with, in place of what is kept of them here."""
        return parameters

    def shard_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What learns here of a parameter of the model: all of it."""
        return parameter

    def total(self, value: float | Tensor) -> float | Tensor:
        """Sum of the processes' numbers; on an accelerator a scalar there, so that nothing waits for it."""
        return value

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of the averaged gradients."""
        return nn.utils.get_total_norm(gradients_of(parameters) or [torch.zeros(1, device="cpu")])

    def sum(self, parameters: Sequence[nn.Parameter]) -> Tensor | complex:
        """Sum over all averaged gradients, which is finite where they all are and costs a fraction of the norm.

        A plain number on the host, where further operations on scalars would take longer than small gradients do.
        """
        grads = gradients_of(parameters)
        sums = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
        if all(g.device.type == "cpu" for g in grads):
            return sum(number.item() for number in sums)
        return torch.stack([number.to(grads[0].device) for number in sums]).sum()

    def reduce(
        self, parameters: Sequence[nn.Parameter], running: Sequence[Tensor], loss: Tensor
    ) -> Callable[[], Tensor]:
        """Start to average gradients and running statistics.

        Returns:
            A function that waits until the averages are in place, and gives a number that is finite where the loss is
            finite everywhere.
        """
        return lambda: loss


@dataclass(frozen=True)
class Execution:
    """How blocks are run and updated; the same for every rule."""

    device: torch.device
    schedule: Callable[[int], float]
    autocast: torch.dtype | None = None
    clip: float | None = None
    accumulate: int = 1
    micro: int = 1
    """Parts in which each group runs its batch."""
    nonfinite: Literal["raise", "skip"] = "raise"
    seed: int = 0
    replicas: Alone = field(default_factory=Alone)


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are; of sparse ones the values."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in grads]
