"""Shared by rules that settle the states of all blocks before the update: passes, cotangents, two phases."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.core.pullback import output_error
from layerwise.core.rule import BatchContext, BlockContext, Signal, metrics_of

WHOLE_BATCH = "settles the states of the whole batch before its update"


def outputs_of_blocks(ctx: BatchContext) -> list[Tensor]:
    """The detached outputs of the blocks, without the head's, in a forward pass."""
    outputs, h = [], ctx.x
    for index in range(len(ctx.network.blocks)):
        h = ctx.run(index, h, None)
        outputs.append(h)
    return outputs


def through_head(ctx: BatchContext, h: Tensor) -> tuple[Tensor, Tensor]:
    """The network's outputs `(B, ..., K)` for an input of the head, and the gradient of the task's loss on it."""
    outputs, back = ctx.linearize(len(ctx.network.blocks), h, None)
    return outputs, back(output_error(ctx.task, outputs, ctx.y))


def phases_message(phases: Sequence[Sequence[Tensor]], outputs: Tensor) -> dict[str, Any]:
    """The message of a rule whose blocks learn from one phase, or from the difference of two.

    Args:
        phases: for each, the states of all blocks, `(B, ...)`.
        outputs: the network's before anything was nudged, for the metrics.
    """
    return {"states": [torch.cat(states) for states in zip(*phases, strict=True)], "outputs": outputs}


def in_phases(message: Any, x: Tensor) -> Tensor:
    """The batch, repeated for each phase in the message."""
    return torch.cat([x] * phases_of(message, len(message["states"][0])))


def phases_of(message: Any, rows: int) -> int:
    """Number of phases among the rows of a block's input; 1 if there is no message."""
    return 1 if message is None else rows // len(message["outputs"])


def signs(ctx: BlockContext) -> Tensor:
    """The weight of every row in the mean over one phase, or in half the difference of two: a factor of the rows."""
    samples, rows = len(ctx.message["outputs"]), len(ctx.h)
    sign = torch.ones(rows, dtype=ctx.h.dtype, device=ctx.h.device)
    sign[samples:] = -1
    return (sign / rows).view(-1, *(1,) * (ctx.h.dim() - 1))


def loss_of_phases(ctx: BlockContext) -> Signal:
    """The signal of a head outside the energy: the task's loss, a mean over the phases; metrics are of the outputs
    before anything was nudged.
    """
    before = ctx.message["outputs"]
    parts = [ctx.task.loss(part, ctx.y) for part in ctx.h.chunk(phases_of(ctx.message, len(ctx.h)))]
    plain = ctx.task.loss(before, ctx.y)
    metrics, statistics = metrics_of(ctx.task, before, ctx.y, plain)
    metrics = {"loss": plain, **metrics}
    return Signal(loss=torch.stack(parts).mean(), message=ctx.message, metrics=metrics, statistics=statistics)
