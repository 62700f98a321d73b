"""Pixels made of numbers; shared by the tests of the data."""

import torch

from layerwise.data import InMemorySource


def noise(count, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def numbered(count, side=4):
    """A source whose sample i is full of the value i and has the label i."""
    values = torch.arange(count)
    return InMemorySource(values.to(torch.uint8)[:, None, None, None].repeat(1, 1, side, side), values)
