"""A batch that passes a block in two phases, such as two views of the same samples."""

import torch
from torch import Tensor

from layerwise.core.blocks import Block
from layerwise.core.modes import scratch_buffers
from layerwise.core.randomness import preserved_generators


def run_by_phase(block: Block, h: Tensor, phases: int) -> Tensor:
    """Run a block on each phase by itself: the same draws, statistics of its own; buffers move in the first alone.

    Args:
        block: what to run.
        h: the phases one after the other, `(phases * B, ...)`.
        phases: how many there are.
    """
    first, *others = h.chunk(phases)
    if not others:
        return block(h)
    with preserved_generators(h.device):
        outputs = [block(first)]
    for part in others:
        with scratch_buffers(block.places()), preserved_generators(h.device):
            outputs.append(block(part))
    return torch.cat(outputs)
