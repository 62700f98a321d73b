"""What the rules with a loss per block share: groups of blocks, a block's readout, and its labels."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.chunked import LinearOutputs
from layerwise.core.functional import pool_features
from layerwise.core.posteriors import Categorical, Posterior
from layerwise.core.rule import BlockContext, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError

Pool = Literal["auto", "mean", "moments", "grid", "cls", "flatten", "none"]


def grouped(blocks: int, size: int, join_head: bool, overlap: int = 0) -> list[range]:
    """Ranges of `size` neighbouring blocks, each with a view of the `overlap` blocks after it.

    The head joins the last block, or stands alone.

    >>> grouped(blocks=3, size=2, join_head=False)
    [range(0, 2), range(2, 3), range(3, 4)]
    >>> grouped(blocks=3, size=1, join_head=True, overlap=1)
    [range(0, 2), range(1, 4), range(2, 4)]
    """
    stops = [(start, min(start + size + overlap, blocks)) for start in range(0, blocks, size)]
    if join_head:
        return [range(start, blocks + 1 if stop == blocks else stop) for start, stop in stops]
    return [range(start, stop) for start, stop in stops] + [range(blocks, blocks + 1)]


def convolution(h: Tensor) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution that reads maps `(B, C, H, W)`, or volumes `(B, C, D, H, W)`."""
    return nn.Conv3d if h.dim() == 5 else nn.Conv2d


def pool_vectors(h: Tensor, pool: Pool, per_position: bool, site: Site | None = None) -> Tensor:
    """One vector per prediction out of a block's output.

    `"auto"` averages over space or tokens. Where labels are given per position, `"auto"` and `"grid"` keep them all.

    Args:
        h: the output of `site`; without one, in the standard order of `layerwise.core.layout`.
        pool: one of `Pool`.
        per_position: whether there is a label for every position.
        site: where the output comes from.

    Raises:
        LayerwiseError: the site does not know which dimension holds the channels.
    """
    # Everything in one vector needs no layout, but has the same order whatever the layout, where it is known.
    if site is not None and (pool != "flatten" or site.layouts[site.index : site.index + 1] != (None,)):
        h = site.standard(h)
    if per_position and pool == "grid":
        pool = "none"
    elif pool == "auto":
        pool = "none" if per_position else "mean"
    return pool_features(h, pool)


def readout_width(h: Tensor, pool: Pool, site: Site, task: Task) -> int:
    """Number of features that a block's readout reads."""
    return pool_vectors(h, pool, task.positions != "sample", site).shape[-1]


def features_of(ctx: BlockContext, pool: Pool, h: Tensor | None = None) -> Tensor:
    """One vector per prediction, `(B, D)` or `(B, ..., D)`, out of the block's output, or of `h` in its place."""
    return pool_vectors(ctx.h if h is None else h, pool, ctx.task.per_position(ctx.y), ctx.site)


def linear_outputs(readout: nn.Module, pool: Pool, site: Site, h: Tensor, task: Task) -> Tensor:
    """Outputs of a readout of pooled features, as the task has them, out of a block's output `h`."""
    return task.as_outputs(readout(pool_vectors(h, pool, task.positions != "sample", site)))


def labels_at(ctx: BlockContext, z: Tensor) -> Tensor:
    """The labels at the resolution of a readout's outputs `(B, ..., K)`.

    Raises:
        LayerwiseError: labels are given per pixel, and the block keeps none.
    """
    if ctx.task.positions != "pixel":
        return ctx.y
    places = tuple(z.shape[1:-1])
    if len(places) < 2:
        raise LayerwiseError(
            f"{ctx.task.kind} needs a label for every pixel of a block, and the readout of block {ctx.site.name!r} "
            f"gives one vector per {'token' if places else 'sample'}; cut where the output is a map (B, C, H, W), with "
            'pool="auto".'
        )
    return ctx.task.at(ctx.y, places)


def read_out(
    ctx: BlockContext, readout: nn.Module, pool: Pool, h: Tensor | None = None
) -> tuple[Tensor | LinearOutputs, Tensor]:
    """Outputs of a block's own readout, as the task has them, and the labels at their resolution.

    Those of a linear readout are not computed yet where the loss may make them in chunks.
    """
    features = features_of(ctx, pool, h)
    if ctx.task.positions == "token" and type(readout) is nn.Linear:
        return LinearOutputs(features, readout.weight, readout.bias), ctx.y
    z = readout(features)
    return ctx.task.as_outputs(z), labels_at(ctx, z)


def resized(posterior: Posterior, task: Task, places: tuple[int, ...]) -> Posterior:
    """A posterior per pixel at another resolution: the mean over each cell, of probabilities where it has classes."""
    if task.positions != "pixel":
        return posterior
    z: Any = posterior.features
    if tuple(z.shape[1:-1]) == places:
        return posterior
    z = F.interpolate(z.movedim(-1, 1), places, mode="area").movedim(1, -1)
    return Categorical(z.clamp_min(1e-30).log()) if isinstance(posterior, Categorical) else task.posterior(z)
