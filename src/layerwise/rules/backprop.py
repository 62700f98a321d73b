"""Backpropagation through the whole network: the yardstick, and its two ways to save memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layerwise.core.blocks import Block
from layerwise.core.rule import ANY_TASK, BlockContext, Locality, Rule, Signal, loss_at_head


@dataclass(frozen=True)
class Backprop(Rule):
    r"""Backpropagation: one cross-entropy at the head, one backward pass through all blocks.

    $\min_\theta \; \mathrm{CE}\big(W_{out} f_L(\dots f_1(x)), y\big)$. All blocks and the head form one group
    of the engine, so the code path is that of every other rule.

    >>> Backprop().groups(blocks=3)
    [range(0, 4)]
    """

    name: ClassVar[str] = "backprop"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "activations forward; gradients backward through every block"
    flat_memory: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = "Rumelhart, Hinton & Williams, Nature 323 (1986)"
    restrictions: ClassVar[str] = "Activations of all blocks are kept until the backward pass."

    def groups(self, blocks: int) -> list[range]:
        """One group: every block and the head."""
        return [range(blocks + 1)]

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss at the head; the blocks have no loss of their own."""
        return loss_at_head(ctx) if ctx.site.is_head else Signal()


@dataclass(frozen=True)
class BackpropCheckpoint(Backprop):
    """Backpropagation that keeps the blocks' inputs only and runs each block again in the backward pass.

    The gradients are those of `backprop`, bit for bit; the price is one more forward pass. What a forward pass moves in
    a block's buffers (the statistics of batch norm, the vectors of spectral norm) is put back before the block runs
    again, and is as it was afterwards.
    """

    name: ClassVar[str] = "backprop_checkpoint"
    runs_once: ClassVar[bool] = False
    boundary: ClassVar[str] = "as backprop; each block's input is kept, the rest recomputed"
    source: ClassVar[str] = "Chen et al., arXiv 1604.06174 (2016); torch.utils.checkpoint"
    restrictions: ClassVar[str] = (
        "Memory still grows with the number of blocks (one input and a copy of the buffers each). State that a forward "
        "pass keeps anywhere but in buffers and torch's random generators is moved twice per step."
    )

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block under `torch.utils.checkpoint` where a graph is recorded."""
        if not torch.is_grad_enabled():
            return block(h)
        buffers = [buffer for _, buffer in block.named_buffers()] if block.training else []
        before = [buffer.clone() for buffer in buffers]

        @contextmanager
        def as_before() -> Iterator[None]:
            after = [buffer.clone() for buffer in buffers]
            _set(buffers, before)
            try:
                yield
            finally:
                _set(buffers, after)

        out = checkpoint(block, h, use_reentrant=False, context_fn=lambda: (nullcontext(), as_before()))
        assert isinstance(out, Tensor)
        return out


def _set(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)  # unseen by autograd, which may have saved the buffer itself


@dataclass(frozen=True)
class BackpropOffload(Backprop):
    """Backpropagation that keeps the saved activations in host memory until the backward pass.

    The gradients are those of `backprop`, bit for bit. On an accelerator the device holds the activations
    of one block at a time; on the CPU host and device are the same, so nothing is saved there.
    """

    name: ClassVar[str] = "backprop_offload"
    boundary: ClassVar[str] = "as backprop; saved activations travel to the host and back"
    source: ClassVar[str] = "torch.autograd.graph.save_on_cpu"
    restrictions: ClassVar[str] = "Saves device memory only; on the CPU it is backprop."

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block; what autograd saves goes to host memory."""
        with torch.autograd.graph.save_on_cpu():
            return block(h)
