"""The metrics of one step."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from layerwise.core.failures import NonFinite
from layerwise.core.progress import read
from layerwise.core.rule import Scalar
from layerwise.errors import LayerwiseError


@dataclass
class Metrics:
    """The metrics of one step: scalars that stay on the device until `read()`.

    Attributes:
        step: number of the step, from 0.
        samples: size of the batch in this process (of its share, if replicas share a batch).
        recorded: per block name (and `"head"`), the rule's scalars, such as `loss` and `accuracy`, or functions that
            compute them; `blocks` has all of them as scalars.
        statistics: per block name, sums from which the task computes its metrics, for tasks that need them.
        skipped: names of the groups whose update was skipped (`nonfinite="skip"`).
    """

    step: int
    samples: int
    recorded: dict[str, dict[str, Scalar]] = field(repr=False)
    skipped: tuple[str, ...]
    finite: dict[str, Tensor]
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def blocks(self) -> dict[str, dict[str, Tensor]]:
        """Per block name (and `"head"`), the rule's scalars; those that nobody has read yet are computed now."""
        for found in self.recorded.values():
            for name, value in found.items():
                found[name] = value if isinstance(value, Tensor) else read(name, value)
        return cast(dict[str, dict[str, Tensor]], self.recorded)

    @property
    def loss(self) -> Tensor:
        """Loss at the head: a scalar on the device, in nats if it is a log-likelihood."""
        return self.blocks["head"]["loss"]

    @property
    def accuracy(self) -> Tensor:
        """Share of the batch that the head gets right: a scalar on the device.

        Raises:
            LayerwiseError: the task has no classes; its metrics are in `blocks["head"]`.
        """
        head = self.blocks["head"]
        if "accuracy" not in head:
            raise LayerwiseError(f"the task has no accuracy; metrics.blocks['head'] has {', '.join(head)}.")
        return head["accuracy"]

    def read(self) -> dict[str, float]:
        """All scalars as floats, keyed `"head/loss"`; this waits for the device.

        Raises:
            LayerwiseError: a loss or gradient of the step was not finite (on an accelerator it is noticed
                here, because looking earlier would stall the device).
        """
        for name, finite in self.finite.items():
            if not bool(finite):
                raise NonFinite(name, self.step, input_is_finite=True)
        names = [(block, key) for block, found in self.blocks.items() for key in found]
        if not names:
            return {}
        values = torch.stack([self.blocks[block][key].float() for block, key in names]).tolist()
        return {f"{block}/{key}": value for (block, key), value in zip(names, values, strict=True)}
