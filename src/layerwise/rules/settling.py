"""What the rules share that settle the states of all blocks before the update: passes, cotangents, two phases."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.core.blocks import Block
from layerwise.core.randomness import preserved_generators
from layerwise.core.rule import BatchContext, BlockContext, Signal, metrics_of
from layerwise.core.tasks import Task

WHOLE_BATCH = "settles the states of the whole batch before its update"


def outputs_of_blocks(ctx: BatchContext) -> list[Tensor]:
    """What the blocks put out in a forward pass, without history; the head's is not among them."""
    outputs, h = [], ctx.x
    for index in range(len(ctx.network.blocks)):
        h = ctx.run(index, h, None)
        outputs.append(h)
    return outputs


def loss_cotangent(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """The gradient of the task's loss, a mean over the batch, on outputs `(B, ..., K)`."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        (found,) = torch.autograd.grad(task.loss(leaf, y), leaf)
    return found


def through_head(ctx: BatchContext, h: Tensor) -> tuple[Tensor, Tensor]:
    """The network's outputs `(B, ..., K)` for an input of the head, and the gradient of the task's loss on it."""
    outputs, back = ctx.linearize(len(ctx.network.blocks), h, None)
    return outputs, back(loss_cotangent(ctx.task, outputs, ctx.y))


def phases_message(phases: Sequence[Sequence[Tensor]], outputs: Tensor) -> dict[str, Any]:
    """The message of a rule whose blocks learn from one phase, or from the difference of two.

    Args:
        phases: for each, the states of all blocks, `(B, ...)`.
        outputs: the network's before anything was nudged, for the metrics.
    """
    return {"states": [torch.cat(states) for states in zip(*phases, strict=True)], "outputs": outputs}


def in_phases(message: Any, x: Tensor) -> Tensor:
    """The batch, as often as there are phases in the message."""
    return torch.cat([x] * (len(message["states"][0]) // len(x)))


def run_by_phase(block: Block, h: Tensor, message: Any) -> Tensor:
    """Run a block on each phase of the batch by itself, with the same draws and batch statistics of its own."""
    if message is None or len(h) == len(message["outputs"]):
        return block(h)
    first, second = h.chunk(2)
    with preserved_generators(h.device):
        out = block(first)
    return torch.cat([out, block(second)])


def signs(ctx: BlockContext) -> Tensor:
    r"""The weight of every sample in $(F_+ - F_-) / (B \cdot \text{phases})$, to be multiplied with `(2B, ...)`, or 1/B."""
    samples, rows = len(ctx.message["outputs"]), len(ctx.h)
    sign = torch.ones(rows, dtype=ctx.h.dtype, device=ctx.h.device)
    sign[samples:] = -1
    return (sign / rows).view(-1, *(1,) * (ctx.h.dim() - 1))


def loss_of_phases(ctx: BlockContext) -> Signal:
    """The signal of a head outside the energy: the task's loss, a mean over the phases; metrics are of the outputs
    before anything was nudged.
    """
    before = ctx.message["outputs"]
    parts = [ctx.task.loss(part, ctx.y) for part in ctx.h.chunk(len(ctx.h) // len(before))]
    plain = ctx.task.loss(before, ctx.y)
    metrics, statistics = metrics_of(ctx.task, before, ctx.y, plain)
    metrics = {"loss": plain, **metrics}
    return Signal(loss=torch.stack(parts).mean(), message=ctx.message, metrics=metrics, statistics=statistics)
