"""Mean and standard deviation by which samples are normalised."""

import numpy as np
import torch
from torch import Tensor

from layerwise.data.sources import InMemorySource, Source
from layerwise.data.tables import TableSource
from layerwise.errors import LayerwiseError

STATISTICS_SAMPLE = 2048  # number of images from which mean and std of a streamed source are estimated


def mean_and_std(source: Source) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean and std per channel on the scale [0, 1], and the number of images they come from; of a table unscaled."""
    if isinstance(source, TableSource):
        return *column_statistics(source.images), len(source)
    step = 1 if isinstance(source, InMemorySource) else max(1, len(source) // STATISTICS_SAMPLE)
    indices = torch.arange(0, len(source), step, device="cpu")
    # Summed as integers: exact, so the same bits whatever the chunks and the number of threads.
    total = squares = torch.zeros(source.shape[0], dtype=torch.int64, device="cpu")
    fine = torch.zeros(2, source.shape[0], dtype=torch.float64, device="cpu")
    for images, _ in source.batches(indices.split(256)):
        if images.dtype != torch.uint8:  # summed image by image, in one order whatever the chunks
            for image in images.double().numpy():
                fine += torch.from_numpy(np.stack([image.sum((1, 2)), np.square(image).sum((1, 2))]))
            continue
        pixels = images.to(torch.int32)
        total = total + pixels.sum((0, 2, 3))
        squares = squares + pixels.square().sum((0, 2, 3))
    total, squares = total + fine[0], squares + fine[1]
    count = len(indices) * source.shape[1] * source.shape[2]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, 255.0)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist()), len(indices)


def column_statistics(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per column of `(N, columns, 1, 1)`; the deviation is 1 for a constant column."""
    table = values.flatten(1).numpy()  # by numpy, whose sums do not depend on the number of threads
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = table.mean(0), np.where(np.ptp(table, 0) > 0, table.std(0), 1.0)
    if not np.isfinite([mean, std]).all():
        raise LayerwiseError("the numbers of the table are too large for a mean and a standard deviation; scale them.")
    return tuple(mean.tolist()), tuple(std.tolist())
