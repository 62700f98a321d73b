"""The weights of a network's first layer as small pictures."""

import base64
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerwise.report.reading import MOST_FILTERS


def first_filters(model: nn.Module, shape: Sequence[int]) -> dict[str, Any] | None:
    """The weights of the first layer that reads pixels, of the units with the largest norm.

    Args:
        model: a network.
        shape: of its inputs, (C, H, W).

    Returns:
        `shape` of a picture, (C, h, w), and `pixels`, a text in base64 for each: a byte per weight, 128 for zero, 1 and
        255 for the largest magnitude of its unit. None if the inputs are no pictures of one or three channels, or no
        layer reads them.

    >>> layer = nn.Linear(4, 2)
    >>> layer.weight.data = torch.tensor([[0.0, 0.0, 0.0, 1.0], [2.0, -2.0, 0.0, 1.0]])
    >>> found = first_filters(nn.Sequential(nn.Flatten(), layer), (1, 2, 2))
    >>> found["shape"], [list(base64.b64decode(text)) for text in found["pixels"]]
    ([1, 2, 2], [[255, 1, 128, 192], [128, 128, 128, 255]])
    """
    channels, height, width = shape
    if channels not in (1, 3) or height * width == 1:
        return None
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features == math.prod(shape):
            picture = [channels, height, width]
        elif isinstance(module, nn.Conv2d) and module.in_channels == channels and min(module.weight.shape[2:]) > 1:
            picture = list(module.weight.shape[1:])
        else:
            continue
        weights = module.weight.detach().to("cpu", torch.float64).flatten(1)
        chosen = weights[weights.norm(dim=1).argsort(descending=True, stable=True)[:MOST_FILTERS]]
        scale = chosen.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        rows = (128 + 127 * chosen / scale).round().to(torch.uint8)
        return {"shape": picture, "pixels": [base64.b64encode(row.numpy().tobytes()).decode() for row in rows]}
    return None
