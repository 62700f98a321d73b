"""Placeholders of offloaded tensors: one number, expanded to the tensor's shape, which must not be written to."""

from collections.abc import Iterable

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError


class Blanks:
    """A number for each type, shared by all offloaded tensors: NaN, or zero for a type without NaN.

    Args:
        device: of the numbers.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._numbers: dict[torch.dtype, Tensor] = {}

    def put(self, tensor: Tensor, size: torch.Size) -> None:
        """Make a tensor a view of the number, expanded to this size."""
        if tensor.dtype not in self._numbers:
            self._numbers[tensor.dtype] = torch.empty((), dtype=tensor.dtype, device=self.device).fill_(_value(tensor))
        tensor.data = self._numbers[tensor.dtype].expand(size)

    def check(self, away: Iterable[tuple[Tensor, torch.Size]]) -> None:
        """Raise an error if an offloaded tensor was written to or replaced; the placeholder is restored first.

        A write to the placeholder on an accelerator is not noticed: reading it would wait for the device.

        Args:
            away: the offloaded tensors, and their sizes.

        Raises:
            LayerwiseError: a tensor was written to, and the values would be lost.
        """
        over = False
        for number in self._numbers.values() if self.device.type == "cpu" else ():
            if not (number.isnan() if number.dtype.is_floating_point or number.dtype.is_complex else number == 0):
                number.fill_(_value(number))
                over = True
        for tensor, size in away:
            if tensor.data_ptr() != self._numbers[tensor.dtype].data_ptr():
                self.put(tensor, size)
                over = True
        if over:
            raise LayerwiseError(
                "a parameter or buffer was written to while its block was offloaded, which would be lost; call "
                "onload() of the learner before you change the model, or change it before you make the Learner."
            )


def _value(tensor: Tensor) -> float:
    return torch.nan if tensor.dtype.is_floating_point or tensor.dtype.is_complex else 0
