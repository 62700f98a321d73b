"""Your own learning rule in one file: direct feedback alignment.

The error at the output is sent to every block through a fixed random matrix (Noekland, arXiv 1609.01596, 2016): for
logits z, labels y and block output h_i, the block gets the cotangent B_i (softmax(z) - y) instead of its gradient.
A second forward pass gives the error, so that no activation has to be kept for it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise import BatchContext, BlockContext, Classification, Learner, Rule, Signal, Site
from layerwise.core.rule import Locality, cross_entropy_at_head
from layerwise.models import create


class Feedback(nn.Module):
    """A fixed random matrix from K errors to the shape of a block's output."""

    matrix: Tensor

    def __init__(self, classes: int, shape: torch.Size):
        super().__init__()
        self.register_buffer("matrix", torch.randn(classes, *shape) / classes**0.5)

    def forward(self, error: Tensor) -> Tensor:
        """Errors `(B, K)` to cotangents `(B, ...)`."""
        return torch.tensordot(error, self.matrix, dims=1)


@dataclass(frozen=True)
class DirectFeedback(Rule):
    """Direct feedback alignment: every block gets the output error through a fixed random matrix."""

    scale: float = 1.0
    """Factor of the feedback."""

    name: ClassVar[str] = "direct_feedback"
    locality: ClassVar[Locality] = "broadcast"
    boundary: ClassVar[str] = "detached activation; the output error (K numbers per sample) goes to every block"
    flat_memory: ClassVar[bool] = True
    source: ClassVar[str] = "Noekland, arXiv 1609.01596 (2016); error from a second forward pass: our reading"
    restrictions: ClassVar[str] = "One label per sample. Two forward passes per step."

    def auxiliary(self, site: Site, h: Tensor, task: Classification) -> nn.Module | None:
        """The fixed feedback matrix of a block."""
        return None if site.is_head else Feedback(task.classes, h.shape[1:])

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The error at the output, as the first message."""
        error = ctx.forward(ctx.x).float().softmax(-1) - ctx.task.distribution(ctx.y)
        return ctx.x, error / len(ctx.y)  # the gradient of the mean cross-entropy on the logits

    def signal(self, ctx: BlockContext) -> Signal:
        """The error through the block's matrix; the head has its true gradient."""
        if ctx.auxiliary is None:
            return cross_entropy_at_head(ctx)
        return Signal(cotangent=(self.scale * ctx.auxiliary(ctx.message)).to(ctx.h.dtype), message=ctx.message)


def main(steps: int = 60) -> list[float]:
    """Train a small network on one batch; the head's loss per step."""
    torch.manual_seed(0)
    model = create("mlp", (1, 8, 8), 10, depth=3, width=64, activation="tanh")
    learner = Learner(model, DirectFeedback(), lr=3e-3)
    x, y = torch.randn(128, 1, 8, 8), torch.randint(10, (128,))
    losses = [learner.step(x, y).loss.item() for _ in range(steps)]
    print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after {steps} steps on one batch")
    return losses


if __name__ == "__main__":
    main()
