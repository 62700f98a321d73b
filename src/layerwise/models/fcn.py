"""Small fully convolutional network: a map of outputs for every image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from layerwise.models.base import BlockSequential, ModelOptions, assemble, check_sizes, named


@dataclass(frozen=True)
class FCN(ModelOptions):
    """Fully convolutional net for `--task segmentation`: block i is a 3x3 convolution, batch norm, ReLU and dropout.

    All blocks have `width` channels. Blocks 2 to `halvings` + 1 have stride 2, as long as four pixels a side are left.
    The head is a 1x1 convolution onto the outputs, whose map is scaled up bilinearly to the size of the image: it gives
    (B, outputs, height, width). There are no skip connections, which would cross the cuts between the blocks.

    Source: after Long, Shelhamer and Darrell 2015, https://arxiv.org/abs/1411.4038 (fully convolutional, logits scaled
    up); this small form is ours.

    Example:
        >>> import torch
        >>> FCN(depth=3, width=8).build((1, 20, 20), 11)(torch.zeros(2, 1, 20, 20)).shape
        torch.Size([2, 11, 20, 20])
    """

    depth: int = 4
    """Number of convolutions; each is a block."""
    width: int = 32
    """Channels of every convolution."""
    halvings: int = 1
    """How many of the first blocks halve the resolution; 0 for none."""
    dropout: float = 0.0
    """Probability of zeroing an activation, at the end of each block."""

    least: ClassVar[Mapping[str, int]] = {"halvings": 0}

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` outputs per pixel.

        Raises:
            LayerwiseError: a size is less than 1.
        """
        check_sizes(shape, classes)
        inputs, height, width = shape
        side, blocks = min(height, width), []
        for i in range(self.depth):
            halves = 1 <= i <= self.halvings and side // 2 >= 4
            side = side // 2 if halves else side
            children: dict[str, nn.Module] = {
                "conv": nn.Conv2d(inputs, self.width, 3, padding=1, stride=2 if halves else 1, bias=False),
                "norm": nn.BatchNorm2d(self.width),
                "activation": nn.ReLU(),
            }
            if self.dropout:
                children["dropout"] = nn.Dropout(self.dropout)
            blocks.append(named(**children))
            inputs = self.width
        scaled = nn.Upsample((height, width), mode="bilinear", align_corners=False)
        return assemble(blocks, named(conv=nn.Conv2d(inputs, classes, 1), scaled=scaled))
