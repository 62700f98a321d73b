"""Shared by rules with a loss per block: groups of blocks, a block's readout, and its labels."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.chunked import LinearOutputs
from layerwise.core.functional import pool_features
from layerwise.core.output_layer import output_weight
from layerwise.core.pieces import ReadsOutputMatrix
from layerwise.core.posteriors import Categorical, Posterior
from layerwise.core.ranges import PositiveInt
from layerwise.core.rule import BlockContext, Rule, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError

Pooling = Literal["auto", "mean", "moments", "grid", "cls", "flatten", "none"]


def grouped(blocks: int, size: int, join_head: bool, overlap: int = 0) -> list[range]:
    """Ranges of `size` neighbouring blocks, each with a view of the `overlap` blocks after it.

    The head joins the last block, or is a range of its own.

    >>> grouped(blocks=3, size=2, join_head=False)
    [range(0, 2), range(2, 3), range(3, 4)]
    >>> grouped(blocks=3, size=1, join_head=True, overlap=1)
    [range(0, 2), range(1, 4), range(2, 4)]
    """
    stops = [(start, min(start + size + overlap, blocks)) for start in range(0, blocks, size)]
    if join_head:
        return [range(start, blocks + 1 if stop == blocks else stop) for start, stop in stops]
    return [range(start, stop) for start, stop in stops] + [range(blocks, blocks + 1)]


def in_modules(blocks: int, modules: int) -> list[range]:
    """Ranges of neighbouring blocks, as many as there are modules, the first ones longer; the head joins the last.

    >>> in_modules(blocks=5, modules=2), in_modules(blocks=1, modules=2)
    ([range(0, 3), range(3, 6)], [range(0, 2)])
    """
    modules = min(modules, blocks)
    ends = [-(-blocks * i // modules) for i in range(modules + 1)]
    return [range(a, b + (b == blocks)) for a, b in pairwise(ends)]


def check_several(name: str, ctx: BlockContext) -> None:
    """Raise LayerwiseError if a rule that compares samples would learn from a batch of one, which tells it nothing."""
    if ctx.training and len(ctx.y) < 2:
        raise LayerwiseError(
            f"rule {name!r} compares the samples of a batch, and this one has {len(ctx.y)}; give batches of two or "
            "more, such as by DataLoader(..., drop_last=True)."
        )


def convolution(h: Tensor) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution that reads maps `(B, C, H, W)`, or volumes `(B, C, D, H, W)`."""
    return nn.Conv3d if h.dim() == 5 else nn.Conv2d


def pool_vectors(h: Tensor, pool: Pooling, per_position: bool, site: Site | None = None) -> Tensor:
    """One vector per prediction from a block's output.

    `"auto"` averages over space or tokens. If labels are given per position, `"auto"` and `"grid"` keep them all.

    Args:
        h: the output of `site`; without one, in the standard order of `layerwise.core.layout`.
        pool: one of `Pooling`.
        per_position: whether there is a label for every position.
        site: where the output comes from.

    Raises:
        LayerwiseError: the site does not know which dimension holds the channels.
    """
    # Flattening needs no layout; if it is known, it is used, so that the order of the numbers does not depend on it.
    if site is not None and (pool != "flatten" or site.layouts[site.index : site.index + 1] != (None,)):
        h = site.standard(h)
    if per_position and pool == "grid":
        pool = "none"
    elif pool == "auto":
        pool = "none" if per_position else "mean"
    return pool_features(h, pool)


def readout_width(h: Tensor, pool: Pooling, site: Site, task: Task) -> int:
    """Number of features that a block's readout reads."""
    return pool_vectors(h, pool, task.positions != "sample", site).shape[-1]


def features_of(ctx: BlockContext, pool: Pooling, h: Tensor | None = None) -> Tensor:
    """One vector per prediction, `(B, D)` or `(B, ..., D)`, from the block's output, or from `h` instead."""
    return pool_vectors(ctx.h if h is None else h, pool, ctx.task.per_position(ctx.y), ctx.site)


def linear_outputs(readout: nn.Module, pool: Pooling, site: Site, h: Tensor, task: Task) -> Tensor:
    """Outputs of a readout on the pooled features of a block's output `h`, in the task's order of dimensions."""
    features = pool_vectors(h, pool, task.positions != "sample", site)
    return task.as_outputs(_whole(readout, features, site))


def labels_at(ctx: BlockContext, z: Tensor) -> Tensor:
    """The labels at the resolution of a readout's outputs `(B, ..., K)`.

    Raises:
        LayerwiseError: labels are given per pixel, and the block's output has no pixels.
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


ReadoutKind = Literal["private", "shared", "random", "low_rank"]
MATRIX_SEED = 0x6D61_7472_6978
_DRAWN: WeakKeyDictionary[Partition, dict[Any, Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True)
class HasReadout(ReadsOutputMatrix, Rule):
    """A rule whose blocks compute the task's outputs from their features with a matrix, their own or another one."""

    readout: ReadoutKind = "private"
    """Whose matrix reads a block's outputs: its own | the network's output layer's, read as it was at the start of
    the step | one fixed random one for all blocks | its own, of a low rank."""
    rank: PositiveInt = 64
    """Rank of a `low_rank` matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        says_shared(self)

    def own_readout(self, width: int, site: Site, task: Task, like: Tensor, bias: bool = True) -> nn.Module:
        """A readout of `width` features such as `like`; `bias` is that of a private one."""
        if self.readout == "private":
            return nn.Linear(width, task.outputs, bias=bias, dtype=like.dtype)
        return Readout(width, self.readout, site, task, like, self.rank)


def says_shared(rule: ReadsOutputMatrix) -> None:
    """Declare that every block of an otherwise local rule reads the network's output matrix."""
    assert isinstance(rule, Rule)
    if rule.readout == "shared" and rule.locality == "local":  # what the class declares holds for the other readouts
        object.__setattr__(rule, "locality", "broadcast")
        object.__setattr__(rule, "boundary", f"{rule.boundary}; the output matrix, read by every block")


def output_matrix(site: Site) -> Tensor:
    """The matrix of the network's output layer `(K, D)`, as blocks read it in this step, without history.

    Raises:
        LayerwiseError: the head does not end with a linear layer.
    """
    layer = None if site.network is None else site.network.output_layer
    if layer is None or site.network is None:
        raise LayerwiseError(
            'readout="shared" reads the matrix of the linear layer with which the head ends, and trains, and this '
            'network has none; choose readout="private".'
        )
    return output_weight(site.network) if site.network.output_copy is None else site.network.output_copy


def fixed_matrix(network: Partition | None, outputs: int, width: int, like: Tensor) -> Tensor:
    """The random matrix `(K, D)` of all blocks of a network, with entries $N(0, 1/D)$; the same in every process."""
    made = {} if network is None else _DRAWN.setdefault(network, {})
    key = (outputs, width, like.dtype, like.device)
    if key not in made:
        draw = torch.Generator().manual_seed(MATRIX_SEED)
        made[key] = (torch.randn(outputs, width, generator=draw, device="cpu") / width**0.5).to(like.device, like.dtype)
    return made[key]


class Readout(nn.Module):
    r"""Outputs $z = M\,\mathrm{norm}(A v)$ of features v, where the matrix M is not the block's own, or has low rank.

    A is an adapter, learned and without bias, if the widths of v and M differ; norm is RMSNorm with learned gains.
    A private matrix is a plain `nn.Linear` and needs none of this.

    Args:
        width: number of features.
        kind: `shared`, `random` or `low_rank`.
        site: whose output is read.
        task: knows the number of outputs K.
        like: a sample of the features, of their type and on their device.
        rank: of a low-rank matrix.
        norm: whether features are normalised here.
        learns: whether gains and adapter learn; the adapter is random and fixed otherwise.
    """

    def __init__(
        self,
        width: int,
        kind: ReadoutKind,
        site: Site,
        task: Task,
        like: Tensor,
        rank: int = 64,
        norm: bool = True,
        learns: bool = True,
    ):
        super().__init__()
        layer = None if site.network is None else site.network.output_layer
        inner = layer.in_features if layer is not None else width
        if kind == "shared":
            output_matrix(site)  # raises if there is none
        inner = rank if kind == "low_rank" else inner
        # A low-rank matrix is an adapter and what comes after it, so its features are normalised first.
        self.norm = nn.RMSNorm(width if kind == "low_rank" else inner, eps=1e-6) if norm else nn.Identity()
        adapted = kind == "low_rank" or inner != width
        self.adapter = nn.Linear(width, inner, bias=False) if adapted else nn.Identity()
        if not learns:
            self.requires_grad_(False)
        self.up = nn.Linear(rank, task.outputs, bias=False) if kind == "low_rank" else None
        self.to(like.device, like.dtype)  # before the matrix, which is one for all blocks
        fixed = fixed_matrix(site.network, task.outputs, inner, like) if kind == "random" else None
        self.register_buffer("matrix", fixed, persistent=False)

    matrix: Tensor | None

    def outputs(self, features: Tensor, site: Site) -> LinearOutputs:
        """The outputs `(..., K)` of features `(..., D)`, not computed yet."""
        if self.up is not None:
            return LinearOutputs(self.adapter(self.norm(features)), self.up.weight)
        matrix = output_matrix(site) if self.matrix is None else self.matrix
        return LinearOutputs(self.norm(self.adapter(features)), matrix)


def outputs_of(readout: nn.Module, features: Tensor, site: Site) -> LinearOutputs:
    """Outputs of a private readout or of another one, not computed yet."""
    if isinstance(readout, Readout):
        return readout.outputs(features, site)
    assert isinstance(readout, nn.Linear)
    return LinearOutputs(features, readout.weight, readout.bias)


def _is_linear(readout: nn.Module) -> bool:
    return type(readout) is nn.Linear or isinstance(readout, Readout)


def _whole(readout: nn.Module, features: Tensor, site: Site) -> Tensor:
    return outputs_of(readout, features, site).whole() if _is_linear(readout) else readout(features)


def read_out(
    ctx: BlockContext, readout: nn.Module, pool: Pooling, h: Tensor | None = None
) -> tuple[Tensor | LinearOutputs, Tensor]:
    """Outputs of a block's own readout, as the task has them, and the labels at their resolution.

    If there is a label per token, the outputs are not computed yet, because the loss may compute them in chunks.
    """
    features = features_of(ctx, pool, h)
    if ctx.task.positions == "token" and _is_linear(readout):
        return outputs_of(readout, features, ctx.site), ctx.y
    z = _whole(readout, features, ctx.site)
    return ctx.task.as_outputs(z), labels_at(ctx, z)


def resized(posterior: Posterior, task: Task, places: tuple[int, ...]) -> Posterior:
    """A posterior per pixel at another resolution: the mean over each cell, of probabilities if it has classes."""
    if task.positions != "pixel":
        return posterior
    z: Any = posterior.features
    if tuple(z.shape[1:-1]) == places:
        return posterior
    z = F.interpolate(z.movedim(-1, 1), places, mode="area").movedim(1, -1)
    return Categorical(z.clamp_min(1e-30).log()) if isinstance(posterior, Categorical) else task.posterior(z)
