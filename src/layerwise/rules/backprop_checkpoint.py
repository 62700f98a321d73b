"""Backpropagation that keeps little between the passes and recomputes the rest."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from layerwise.core.blocks import Block
from layerwise.core.randomness import others_at, states_of_others
from layerwise.core.rule import Locality
from layerwise.rules.backprop import Backprop

Policy = Literal["all", "matmul", "attention"]

ATTENTION = ("attention", "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
MATMUL = ("mm", "addmm", "bmm", "baddbmm", "convolution")


@dataclass(frozen=True)
class BackpropCheckpoint(Backprop):
    """Backpropagation that keeps each block's input, and runs the block again in the backward pass.

    Three policies say what is kept of a block besides its input:

    - `all`: nothing; the whole block is run again.
    - `matmul`: the outputs of matrix products, convolutions and attention, which are the expensive operations; the
      cheap ones between them are run again.
    - `attention`: only the outputs of attention, whose operations grow with the square of the sequence.

    The gradients are those of `backprop`, bit for bit; `all` costs one more forward pass. What a forward pass changes
    in a block's buffers (the statistics of batch norm, the vectors of spectral norm) is undone before the block runs
    again, and restored afterwards.

    >>> BackpropCheckpoint(policy="matmul").groups(blocks=3)
    [range(0, 4)]
    """

    policy: Policy = "all"
    """What is recomputed: all | matmul (all but matrix products, convolutions, attention) | attention (all but it)."""

    name: ClassVar[str] = "backprop_checkpoint"
    locality: ClassVar[Locality] = "global"
    runs_once: ClassVar[bool] = False
    boundary: ClassVar[str] = "as backprop; each block's input is kept, the rest recomputed"
    source: ClassVar[str] = (
        "Chen et al., arXiv 1604.06174 (2016); policies: Korthikanti et al., arXiv 2205.05198 (2022), in the form of "
        "torch.utils.checkpoint"
    )
    restrictions: ClassVar[str] = (
        "Memory still grows with the number of blocks (one input and a copy of the buffers each). Other state that a "
        "forward pass changes, outside buffers and random generators, changes twice per step."
    )

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block under `torch.utils.checkpoint` if a graph is recorded."""
        if not torch.is_grad_enabled():
            return block(h)
        buffers = [buffer for _, buffer in block.named_buffers()] if block.training else []
        out = checkpoint(block, h, use_reentrant=False, context_fn=lambda: self._contexts(buffers))
        assert isinstance(out, Tensor)
        return out

    def _contexts(self, buffers: list[Tensor]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts for the first run of a block and for the second one."""
        first, again = nullcontext(), nullcontext()
        if self.policy != "all":
            kept = _kept(self.policy)

            def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
                return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

            first, again = create_selective_checkpoint_contexts(decide)
        return first, _as_before(buffers, [buffer.clone() for buffer in buffers], states_of_others(), again)


def _kept(policy: Policy) -> frozenset[Any]:
    """The operations whose outputs are kept; torch has several names for attention."""
    names = [f"_scaled_dot_product_{kind}" for kind in ATTENTION] + list(MATMUL if policy == "matmul" else ())
    return frozenset(getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name))


@contextmanager
def _as_before(
    buffers: list[Tensor], before: list[Tensor], generators: Any, inside: AbstractContextManager[Any]
) -> Iterator[None]:
    """A context in which buffers, and generators that are not torch's, are as they were before the first run."""
    after = [buffer.clone() for buffer in buffers]
    _set(buffers, before)
    try:
        with others_at(generators), inside:
            yield
    finally:
        _set(buffers, after)


def _set(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)  # unseen by autograd, which may have saved the buffer itself
