"""What stands in place of an offloaded tensor: one number, shown in its shape. Nobody may write there."""

from collections.abc import Iterable

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError


class Blanks:
    """A number for each type, shared by all tensors that are away: NaN, or zero where there is none.

    Args:
        device: where it lies.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._numbers: dict[torch.dtype, Tensor] = {}

    def put(self, tensor: Tensor, size: torch.Size) -> None:
        """Let a tensor of this size show the number."""
        if tensor.dtype not in self._numbers:
            self._numbers[tensor.dtype] = torch.empty((), dtype=tensor.dtype, device=self.device).fill_(_value(tensor))
        tensor.data = self._numbers[tensor.dtype].expand(size)

    def check(self, away: Iterable[tuple[Tensor, torch.Size]]) -> None:
        """Refuse what somebody has written to a tensor that is away, or put in its place; then the number stands again.

        What was written over the number on an accelerator is not noticed: to look there would wait for the device.

        Args:
            away: the tensors, and their sizes.

        Raises:
            LayerwiseError: it would be lost.
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
