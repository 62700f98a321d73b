"""Scenes of several handwritten digits: which ones there are, or which one each pixel belongs to."""

import torch
from torch import Generator, Tensor

from layerwise.core.randomness import derive_seed
from layerwise.core.ranges import DataTask
from layerwise.data.machine import sklearn_digits
from layerwise.data.sources import InMemorySource
from layerwise.data.splitting import stratified_split

SIDE, DIGIT, MOST = 20, 8, 3
"""Side of a scene and of a digit in pixels, and largest number of digits in a scene."""
TRAIN, TEST = 4000, 1000
"""Scenes of the two splits."""
INK = 64
"""Brightness, out of 255, above which a pixel belongs to the digit."""
SEED = 20_242  # a constant: every run sees the same scenes


def digit_scenes(task: DataTask, test_fraction: float, test_seed: int) -> tuple[InMemorySource, InMemorySource]:
    """Scenes of 1 to 3 of scikit-learn's digits on a black background, without overlap, for training and for testing.

    No image of a digit occurs in both splits. Labels are float32 (N, 10), 1 for a digit that occurs, or uint8
    (N, 20, 20): 0 for the ground, 1 to 10 for the digits 0 to 9.
    """
    pixels, labels = sklearn_digits()
    parts = stratified_split(labels, test_fraction, test_seed)
    train, test = (
        _scenes(pixels[part], labels[part], count, task, name)
        for part, count, name in zip(parts, (TRAIN, TEST), ("train", "test"), strict=True)
    )
    return train, test


def _scenes(pixels: Tensor, labels: Tensor, count: int, task: DataTask, name: str) -> InMemorySource:
    draw = Generator().manual_seed(derive_seed(SEED, name))
    wanted = torch.randint(1, MOST + 1, (count,), generator=draw, device="cpu")
    which = torch.randint(len(labels), (MOST, count), generator=draw, device="cpu")
    corners = torch.randint(SIDE - DIGIT + 1, (MOST, count, 2), generator=draw, device="cpu")
    images = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8, device="cpu")
    masks, occurs, placed = torch.zeros_like(images), torch.zeros(count, 10, device="cpu"), []
    scene, steps = torch.arange(count, device="cpu")[:, None, None], torch.arange(DIGIT, device="cpu")
    for turn in range(MOST):  # a digit that would overlap another one is left out
        free = wanted > turn
        for other, there in placed:
            free = free & ~(there & ((corners[turn] - corners[other]).abs() < DIGIT).all(1))
        placed.append((turn, free))
        rows, columns = (corners[turn, :, i, None] + steps for i in (0, 1))
        at = scene[free], rows[free][:, :, None], columns[free][:, None, :]
        digit, kind = pixels[which[turn, free]], labels[which[turn, free]]
        images[at] = digit
        masks[at] = torch.where(digit >= INK, kind[:, None, None] + 1, 0).to(torch.uint8)
        occurs[free, kind] = 1
    return InMemorySource(images[:, None], masks if task == "segmentation" else occurs)
