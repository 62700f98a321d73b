"""Residual convolutional network for small images."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.models.base import BlockSequential, ModelOptions, assemble, check_sizes, named


@dataclass(frozen=True)
class ResNet(ModelOptions):
    """Residual network of He et al. for small images: block i is one basic residual block.

    Block i (from 0) is in stage `3 * i // depth`; stage s has `width * 2 ** s` channels, and the
    first block of stages 1 and 2 halves the image. The stem, a 3x3 convolution with batch norm and
    ReLU, is part of the first block, or a block of its own before it. A network of depth n has
    2 n + 2 layers: depth 9 and width 16 is ResNet-20. Weights start as torch draws them; the last
    norm of a block starts at one, not at zero.

    Source: He, Zhang, Ren and Sun 2016, https://arxiv.org/abs/1512.03385, section 4.2, with
    projection shortcuts where the size changes (option B).

    Example:
        >>> model = ResNet(depth=9, width=16).build((3, 32, 32), 10)
        >>> len(model.block_names), sum(p.numel() for p in model.parameters())
        (9, 272474)
    """

    depth: int = 9
    """Number of residual blocks of two convolutions each; each is a block."""
    width: int = 16
    """Channels of the first of the three stages; they double from stage to stage."""
    stem: Literal["joined", "own"] = "joined"
    """Whether the stem is part of the first block, or a block of its own, before the `depth` residual ones.

    The first block is the largest where it holds the stem, and sets the peak of local rules.
    """

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1.
        """
        check_sizes(shape, classes)
        stages = [3 * i // self.depth for i in range(self.depth)]
        # The stem puts out what the first stage takes in; a shallow net may skip a stage.
        sizes = [self.width] + [self.width * 2**stage for stage in stages]
        blocks: list[nn.Module] = [
            BasicBlock(sizes[i], sizes[i + 1], stride=1 if sizes[i] == sizes[i + 1] else 2) for i in range(self.depth)
        ]
        stem = named(
            conv=nn.Conv2d(shape[0], self.width, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(self.width),
            activation=nn.ReLU(),
        )
        if self.stem == "own":
            blocks.insert(0, stem)
        else:
            blocks[0] = named(stem=stem, unit=blocks[0])
        head = named(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(sizes[-1], classes))
        return assemble(blocks, head)


class BasicBlock(nn.Module):
    """Residual block: `relu(F(x) + shortcut(x))` with two 3x3 convolutions in F.

    Maps (B, inputs, H, W) to (B, channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if inputs != channels:
            self.shortcut = named(
                conv=nn.Conv2d(inputs, channels, 1, stride, bias=False),
                norm=nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on (B, inputs, H, W)."""
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))
