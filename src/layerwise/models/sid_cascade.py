"""The cascade of Synergistic Information Distillation: one feature extractor, and modules that refine a belief."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.models.base import BlockSequential, ModelOptions, check_sizes, named, require


class UniformBelief(nn.Module):
    """Starts the state: features z `(B, D)` to `(B, K + D)`, the log of the uniform belief before z."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, z: Tensor) -> Tensor:
        """The state `[log p_0 | z]`, in float32 or wider."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return torch.cat([z.new_full((len(z), self.classes), -math.log(self.classes)), z], dim=-1)


class Refine(nn.Module):
    """A module of the cascade: state `[log p | z]` `(B, K + D)` to the state with its own belief instead of p.

    The belief is a softmax of Linear, ReLU, dropout, Linear on `concat(p, z)`. The state holds its logarithm, so that
    no logarithm of a probability is ever taken. The layers get their own type, which may be narrower than the state's.
    """

    def __init__(self, classes: int, features: int, hidden: int, dropout: float):
        super().__init__()
        self.hidden = nn.Linear(classes + features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, classes)

    def parts(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Belief `(B, K)` and features `(B, D)` of a state: one split, whose gradients are put together in one copy."""
        classes = self.out.out_features
        belief, z = state.split((classes, self.hidden.in_features - classes), dim=-1)
        return belief, z

    def logits(self, state: Tensor) -> Tensor:
        """Logits `(B, K)` of the new belief."""
        return self._logits(*self.parts(state))

    def _logits(self, belief: Tensor, z: Tensor) -> Tensor:
        inputs = torch.cat([belief.exp(), z], dim=-1).to(self.out.weight.dtype)
        return self.out(self.dropout(F.relu(self.hidden(inputs))))

    def forward(self, state: Tensor) -> Tensor:
        """The next state."""
        belief, z = self.parts(state)
        return torch.cat([self._logits(belief, z).to(state.dtype).log_softmax(-1), z], dim=-1)


class LastRefine(Refine):
    """The last module: state to the logits of the last belief."""

    def forward(self, state: Tensor) -> Tensor:
        """Logits `(B, K)`."""
        return self.logits(state)


class LinearReadout(nn.Module):
    """The head of a cascade without modules: a linear layer on the features of the state."""

    def __init__(self, classes: int, features: int):
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, state: Tensor) -> Tensor:
        """Logits `(B, K)`."""
        return self.linear(state[:, self.linear.out_features :].to(self.linear.weight.dtype))


@dataclass(frozen=True)
class SIDCascade(ModelOptions):
    """Cascade of SID: a convolutional extractor, then modules that refine a belief over the classes.

    With z the features of the extractor and p_0 uniform, module i computes p_i = softmax(MLP(concat(p_{i-1}, z))). One
    tensor crosses every cut, the state [log p_i | z]. Blocks `extractor1` and `extractor2` hold two 3x3 convolutions
    each, 32-64 and 128-128 channels at width 128, with ReLU and a 2x2 max-pool; the second one ends in average
    pooling, a linear layer and the uniform belief. Blocks `module1` .. `moduleL-1` and the head, which is module L,
    have `2 * width` hidden units. With depth 0 the head is a linear layer on z: the plain network on the same
    extractor. Weights start as torch draws them.

    Source: Ye and Tang 2025, https://arxiv.org/abs/2510.03273; sizes of the authors' published code.

    Example:
        >>> model = SIDCascade(depth=5).build((3, 32, 32), 10)
        >>> model.block_names
        ('extractor1', 'extractor2', 'module1', 'module2', 'module3', 'module4')
        >>> sum(p.numel() for p in model.head.parameters())  # 139 * 256 + 257 * 10
        38154
    """

    least: ClassVar[Mapping[str, int]] = {"depth": 0}

    depth: int = 10
    """Number of modules, the head included; 0 for a linear head on the extractor."""
    width: int = 128
    """Features of the extractor; the modules have twice as many hidden units."""
    dropout: float = 0.0
    """Probability of zeroing an activation, after the pools of the extractor and in the modules' hidden layer."""

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1, or images of less than 4 pixels.
        """
        check_sizes(shape, classes)
        require(min(shape[1:]) >= 4, f"sid_cascade pools twice, so images need 4x4 pixels, not {shape[1]}x{shape[2]}.")
        width, half, quarter = self.width, max(self.width // 2, 1), max(self.width // 4, 1)
        children: dict[str, nn.Module] = {
            "extractor1": named(**_stage(shape[0], quarter, half, self.dropout)),
            "extractor2": named(
                **_stage(half, width, width, self.dropout),
                average=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                linear=nn.Linear(width, width),
                belief=UniformBelief(classes),
            ),
        }
        for i in range(1, self.depth):
            children[f"module{i}"] = Refine(classes, width, 2 * width, self.dropout)
        if self.depth:
            children["head"] = LastRefine(classes, width, 2 * width, self.dropout)
        else:
            children["head"] = LinearReadout(classes, width)
        return BlockSequential(OrderedDict(children))


def _stage(inputs: int, first: int, second: int, dropout: float) -> dict[str, nn.Module]:
    """Two convolutions; the second one's ReLU comes after the max-pool: the same function on a quarter of pixels."""
    children: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(inputs, first, 3, padding=1),
        "activation1": nn.ReLU(),
        "conv2": nn.Conv2d(first, second, 3, padding=1),
        "pool": nn.MaxPool2d(2),
        "activation2": nn.ReLU(),
    }
    if dropout:
        children["dropout"] = nn.Dropout(dropout)
    return children
