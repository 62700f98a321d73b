"""Layers of another class that keep the sizes and the parameters of a linear layer or a convolution."""

from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Linear | nn.Conv2d)


def alike(cls: type[M], layer: Any, **options: Any) -> M:
    """A layer of this class with the sizes, the parameters and the mode of another.

    Args:
        cls: takes the arguments of `nn.Linear` or `nn.Conv2d`, and these options.
        layer: an `nn.Linear` or `nn.Conv2d`; its parameters are shared, not copied.
        options: further arguments of the class.

    >>> layer = nn.Linear(4, 2)
    >>> alike(nn.Linear, layer).weight is layer.weight
    True
    """
    if isinstance(layer, nn.Linear):
        sizes: tuple[Any, ...] = (layer.in_features, layer.out_features, layer.bias is not None, "meta")
    else:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        sizes += (layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, "meta")
    made = cls(*sizes, **options)
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


def padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The input of a convolution that pads with zeros alone, and what it pads: others are padded beforehand."""
    if conv.padding_mode == "zeros" and isinstance(conv.padding, tuple):
        return x, conv.padding  # pyright: ignore[reportReturnType]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, conv._reversed_padding_repeated_twice, mode), (0, 0)
