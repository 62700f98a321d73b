"""Plain convolutional network in the style of VGG."""

from dataclasses import dataclass

from torch import nn

from layerwise.models.base import BlockSequential, ModelOptions, assemble, check_sizes, named


@dataclass(frozen=True)
class VGG(ModelOptions):
    """Plain conv net: block i is a 3x3 convolution, batch norm, max-pool, ReLU and dropout.

    Block i (from 1) has `width * min(2 ** (i - 1), 4)` channels. Blocks 1, 2 and 3 end in a 2x2
    max-pool, unless it would leave an image smaller than 2x2: 8x8 digits are pooled twice. All
    blocks from the fifth on are equal, so depth adds blocks of one size. The head is global average
    pooling and a linear layer. The convolutions have no bias, since batch norm follows. Weights
    start as torch draws them.

    Source: Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556 (3x3 convolutions,
    doubling).

    Example:
        >>> model = VGG(depth=4, width=64).build((3, 32, 32), 10)
        >>> [getattr(model, name).conv.out_channels for name in model.block_names]
        [64, 128, 256, 256]
    """

    depth: int = 4
    """Number of convolutions; each is a block."""
    width: int = 64
    """Channels of the first convolution; the later ones have up to four times as many."""
    dropout: float = 0.0
    """Probability of zeroing an activation, at the end of each block."""

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1.
        """
        check_sizes(shape, classes)
        inputs, *image = shape
        side = min(image)
        blocks = []
        for i in range(self.depth):
            channels = self.width * min(2**i, 4)
            pool = i < 3 and side // 2 >= 2
            blocks.append(self._block(inputs, channels, pool))
            inputs = channels
            side = side // 2 if pool else side
        head = named(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(inputs, classes))
        return assemble(blocks, head)

    def _block(self, inputs: int, channels: int, pool: bool) -> nn.Sequential:
        children: dict[str, nn.Module] = {
            "conv": nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
            "norm": nn.BatchNorm2d(channels),
        }
        # ReLU after the max-pool: the same function, since ReLU is monotone, on a quarter of the pixels.
        if pool:
            children["pool"] = nn.MaxPool2d(2)
        # Not in place: with a cut after the norm it would overwrite the message it is given.
        children["activation"] = nn.ReLU()
        if self.dropout:
            children["dropout"] = nn.Dropout(self.dropout)
        return named(**children)
