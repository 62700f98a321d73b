"""The network of NoProp: blocks that each look at the image and make a noisy label embedding clearer."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.functional import denoising_step
from layerwise.models.base import BlockSequential, ModelOptions, check_sizes, named, require


class Start(nn.Module):
    """Images `(B, C, H, W)` to the state `[z | x]` with z = 0, `(B, K + CHW)`; a state passes as it is."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, h: Tensor) -> Tensor:
        """The state, in float32 or wider."""
        return h if h.dim() == 2 else state(h.new_zeros(len(h), self.classes), h)


def state(z: Tensor, x: Tensor) -> Tensor:
    """The tensor that crosses the cuts: `[z | x]`, `(B, K + ...)`, in float32 or wider."""
    x = x.flatten(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([z.to(wide), x.to(wide)], dim=1)


class Denoise(nn.Module):
    """Step t: state `[z | x]` to `[A u + B z | x]`, where u is a softmax over the classes, made of z and the image."""

    def __init__(self, t: int, shape: tuple[int, int, int], classes: int, options: "NoProp"):
        super().__init__()
        self.shape, self.classes = shape, classes
        self.a, self.b, _ = denoising_step(t, options.depth)
        width, features = options.width, 8 * options.width
        if options.embedding == "conv":
            layers = [*_convolution(shape[0], width), *_convolution(width, 2 * width), nn.Flatten()]
            inputs = 2 * width * (shape[1] // 4) * (shape[2] // 4)
        else:
            layers, inputs = [nn.Flatten()], math.prod(shape)
        self.image = nn.Sequential(*layers, nn.Linear(inputs, features), nn.BatchNorm1d(features), nn.ReLU())
        self.label = nn.Linear(classes, features)
        self.skip = nn.Linear(features, features)
        dropout = [nn.Dropout(options.dropout)] if options.dropout else []
        self.joined = nn.Sequential(
            nn.Linear(2 * features, features),
            nn.BatchNorm1d(features),
            nn.ReLU(),
            *dropout,
            nn.Linear(features, classes),
        )

    def forward(self, h: Tensor) -> Tensor:
        """The next state."""
        z, x = h[:, : self.classes], h[:, self.classes :]
        label = F.relu(self.label(z))
        label = label + F.relu(self.skip(label))
        image = self.image(x.view(-1, *self.shape))
        u = self.joined(torch.cat([image, label], dim=1)).to(h.dtype).softmax(1)
        return torch.cat([self.a * u + self.b * z, x], dim=1)


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()]


class ReadLabel(nn.Module):
    """The head: logits of the classes, linear in the z of the state."""

    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(classes, classes)

    def forward(self, h: Tensor) -> Tensor:
        """Logits `(B, K)`."""
        return self.linear(h[:, : self.linear.in_features])


@dataclass(frozen=True)
class NoProp(ModelOptions):
    """Network of NoProp: block t sees the image and a noisy one-hot label, and predicts the clear one.

    One tensor crosses every cut, the state [z | x]. Block t embeds the image anew (two 3x3 convolutions with batch
    norm, ReLU and max-pool, and a linear layer; or a linear layer alone), puts z through two linear layers with a skip
    connection, and joins both to a softmax u over the classes; then z becomes A u + B z, the mean of the step of a
    reversed diffusion with a cosine schedule. The head is linear in the last z. As a plain network it starts from
    z = 0 and adds no noise.

    Source: Li, Teh and Pascanu 2025, https://arxiv.org/abs/2503.24322; sizes are ours.

    Example:
        >>> NoProp(depth=3, width=8).build((1, 28, 28), 10).block_names
        ('block1', 'block2', 'block3')
    """

    depth: int = 10
    """Number of denoising steps T; each is a block."""
    width: int = 16
    """Channels of the first convolution; the second has twice, the hidden layers eight times as many."""
    embedding: Literal["conv", "mlp"] = "conv"
    """How a block embeds the image: two convolutions and a linear layer, or the linear layer alone."""
    dropout: float = 0.0
    """Probability of zeroing a unit of the last hidden layer."""

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1, or images of less than 4 pixels that are to be pooled twice.
        """
        check_sizes(shape, classes)
        small = self.embedding == "conv" and min(shape[1:]) < 4
        require(not small, f"noprop pools twice, so images need 4x4 pixels, not {shape[1]}x{shape[2]}.")
        blocks: list[nn.Module] = [Denoise(t, shape, classes, self) for t in range(1, self.depth + 1)]
        blocks[0] = named(start=Start(classes), denoise=blocks[0])
        children = [(f"block{t}", block) for t, block in enumerate(blocks, 1)]
        return BlockSequential(OrderedDict([*children, ("head", ReadLabel(classes))]))
