"""Any function of outputs and labels as the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from layerwise.core.failures import KNOWN, told_by
from layerwise.core.functional import wide
from layerwise.core.tasks.base import Positions, Task, nearest
from layerwise.errors import LayerwiseError


@dataclass(frozen=True)
class Loss(Task):
    """Any function as the loss: contrastive, ranking, focal, and so on.

    Every block's readout has `outputs` outputs, and the network's head has its own number; `fn` is the loss of both.
    The metric is the loss itself.

    >>> import torch
    >>> def hinge(outputs, y):  # y is -1 or 1
    ...     return (1 - outputs[:, 0] * y).clamp_min(0).mean()
    >>> Loss(hinge, outputs=1).loss(torch.tensor([[0.5], [2.0]]), torch.tensor([1.0, 1.0]))
    tensor(0.2500)
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    """From outputs `(B, K)` and labels `(B, ...)` to a scalar, the mean over the batch."""
    outputs: int = 0
    """Width of the readouts; that of the network's output if not given."""
    positions: Positions = "sample"
    """Where readouts give their outputs: once per sample, per token `(B, T, K)`, or per pixel `(B, K, H, W)`."""

    kind: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise LayerwiseError(
                f"the loss is of type {type(self.fn).__name__}; give a function of outputs and labels, such as "
                "Loss(torch.nn.functional.margin_ranking_loss)."
            )
        if self.outputs < 0:
            raise LayerwiseError(f"outputs is {self.outputs}; give the width of the readouts, 1 or more.")

    def fitted(self, outputs: Tensor) -> Self:
        """The task for a network with such outputs; a width that was given stays."""
        return self if self.outputs else super().fitted(outputs)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """What the function gives for outputs in float32 or wider.

        Raises:
            LayerwiseError: it fails, or gives no scalar.
        """
        try:
            loss = self.fn(wide(outputs) if outputs.is_floating_point() else outputs, y)
        except KNOWN as reason:
            given = f"outputs of shape {tuple(outputs.shape)} and labels of shape {tuple(y.shape)}"
            raise LayerwiseError(f"the loss function fails for {given} ({told_by(reason)}); correct it.") from reason
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LayerwiseError(f"the loss function gives {what}; let it return a scalar tensor, such as loss.mean().")
        return loss

    def at(self, y: Tensor, resolution: tuple[int, ...]) -> Tensor:
        """Labels at a block's resolution: the one in the middle of each of its cells."""
        if self.positions != "pixel" or y.dim() <= len(resolution):
            return y
        return nearest(y, resolution)
