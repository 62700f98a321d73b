"""Multi-layer perceptron."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from layerwise.models.base import BlockSequential, ModelOptions, assemble, check_sizes, named

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class MLP(ModelOptions):
    """Fully connected network: block i is a linear layer, norm, activation and dropout.

    The defaults are the 3 x 1000 network of the SLL paper. The first block flattens the image.
    Weights start as `nn.Linear` draws them.

    Example:
        >>> model = MLP(depth=3, width=1000).build((1, 28, 28), 10)
        >>> sum(p.numel() for p in model.parameters())  # 785*1000 + 2 * 1001*1000 + 1001*10
        2797010
    """

    depth: int = 3
    """Number of hidden layers; each is a block."""
    width: int = 1000
    """Units per hidden layer."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "tanh"] = "relu"
    """Nonlinearity of the hidden layers."""
    norm: Literal["none", "layer", "batch"] = "none"
    """Normalisation between the linear layer and the activation."""
    dropout: float = 0.0
    """Probability of zeroing a hidden unit, after the activation."""

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1.
        """
        check_sizes(shape, classes)
        sizes = [math.prod(shape)] + [self.width] * self.depth
        blocks = [self._block(first=i == 0, inputs=sizes[i]) for i in range(self.depth)]
        return assemble(blocks, nn.Linear(self.width, classes))

    def _block(self, first: bool, inputs: int) -> nn.Sequential:
        children: dict[str, nn.Module] = {"flatten": nn.Flatten()} if first else {}
        children["linear"] = nn.Linear(inputs, self.width)
        if self.norm == "layer":
            children["norm"] = nn.LayerNorm(self.width)
        elif self.norm == "batch":
            children["norm"] = nn.BatchNorm1d(self.width)
        children["activation"] = ACTIVATIONS[self.activation]()
        if self.dropout:
            children["dropout"] = nn.Dropout(self.dropout)
        return named(**children)
