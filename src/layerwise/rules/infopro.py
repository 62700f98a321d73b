"""InfoPro: each block keeps information about the input, and classifies."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.functional import supervised_contrastive, wide
from layerwise.core.layout import to_standard
from layerwise.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from layerwise.core.rule import BlockContext, Locality, Signal, Site, by_depth, loss_at_head, loss_of
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.ahead import LooksAhead
from layerwise.rules.label_input import known_layout
from layerwise.rules.readout import check_several, convolution, grouped, pool_vectors

FEATURES = 128


class Decoder(nn.Module):
    """Reconstructs the input from a block's output, as logits of its values.

    From maps to an image: bilinear up-sampling, 3x3 convolution to 12 channels, batch norm, ReLU, 3x3 convolution. From
    tokens to an image: a linear map of each token to the pixels of its patch (a class token is left out). From a
    vector: one linear map.

    Args:
        given: shape of one sample of the output, in the standard order.
        wanted: shape of one sample of the input, likewise.
    """

    def __init__(self, given: tuple[int, ...], wanted: tuple[int, ...]):
        super().__init__()
        self.wanted, self.patch = wanted, 0
        if len(given) == len(wanted) >= 3:
            volume = len(given) == 4
            convolve, norm = (nn.Conv3d, nn.BatchNorm3d) if volume else (nn.Conv2d, nn.BatchNorm2d)
            self.layers: nn.Module = nn.Sequential(
                nn.Upsample(wanted[1:], mode="trilinear" if volume else "bilinear"),
                convolve(given[0], 12, 3, padding=1, bias=False),
                norm(12),
                nn.ReLU(),
                convolve(12, wanted[0], 3, padding=1),
            )
        elif len(given) == 1:
            self.layers = nn.Linear(given[0], math.prod(wanted))
        else:
            self.patch = _patch(given, wanted)
            self.layers = nn.Linear(given[-1], wanted[0] * self.patch**2)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, *wanted)` from `(B, *given)`."""
        if not self.patch:
            return self.layers(h).view(-1, *self.wanted)
        rows, columns = (side // self.patch for side in self.wanted[1:])
        pixels = self.layers(h[:, -rows * columns :]).mT.unflatten(-1, (rows, columns))
        return F.pixel_shuffle(pixels, self.patch)


def _patch(given: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    """Side of the square patches in which tokens `(T, D)`, or all but the first, cover an image."""
    if len(given) == 2 and len(wanted) == 3:
        for side in range(1, min(wanted[1:]) + 1):
            whole = wanted[1] % side == 0 and wanted[2] % side == 0
            if whole and given[0] - wanted[1] * wanted[2] // side**2 in (0, 1):
                return side
    raise LayerwiseError(
        f"infopro reconstructs the input, and cannot tell how an output of shape {given} covers an input of shape "
        f"{wanted}; set reconstruction=0 and classification=1, or choose a rule such as local_ce."
    )


def reader(h: Tensor, outputs: int) -> nn.Module:
    """The auxiliary network: 3x3 convolution with stride 2, batch norm, ReLU, mean (for maps); two linear layers."""
    width, maps = h.shape[1 if h.dim() >= 4 else -1], []
    if h.dim() >= 4:
        norm, pooled = (
            (nn.BatchNorm3d, nn.AdaptiveAvgPool3d) if h.dim() == 5 else (nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
        )
        maps = [
            convolution(h)(width, width, 3, stride=2, padding=1, bias=False),
            norm(width),
            nn.ReLU(),
            pooled(1),
            nn.Flatten(),
        ]
    return nn.Sequential(*maps, nn.Linear(width, FEATURES), nn.ReLU(), nn.Linear(FEATURES, outputs))


class InfoProHeads(nn.Module):
    """The heads of a block: a decoder and an auxiliary network, each if its loss has a weight."""

    def __init__(self, decoder: nn.Module | None, reader: nn.Module | None):
        super().__init__()
        self.decoder, self.reader = decoder, reader


def brightness(x: Tensor) -> Tensor:
    """Images `(B, C, H, W)`, however normalised, with each one's extremes at 0 and 1; a flat image becomes 0."""
    flat = wide(x).flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / (high - low).clamp_min(1e-6)).view_as(x)


@dataclass(frozen=True)
class InfoPro(LooksAhead):
    r"""InfoPro: local losses that keep information about the input, and drop what the task does not need.

    $$L_k = \lambda_k\, R(d_k(h_k), x) + \mu_k\, T(a_k(h_k), y), \qquad h_k = f_k(\mathrm{stopgrad}(h_{k-1}))$$

    R is the binary cross-entropy of the decoded image, a mean over pixels; T is the cross-entropy, or the supervised
    contrastive loss on 128 features (`task="contrast"`). $\lambda_k$ and $\mu_k$ are linear in depth, from the first to
    the last but one group; the last group minimises the cross-entropy of the network's head. The input travels along
    as the message. Prediction is a plain forward pass.

    The objective, both networks after convolutions and the weights (those of the paper's runs with four groups) are the
    paper's and its code's. Ours: the target is the image with its own extremes at 0 and 1, since the rule does not know
    the normalisation; inputs that are not images are compared by their squared distance; linear decoders after vectors
    and tokens.

    >>> InfoPro(task="contrast").groups(blocks=2)
    [range(0, 1), range(1, 3)]
    """

    task: Literal["ce", "contrast"] = "ce"
    """Cross-entropy of the auxiliary network, or the supervised contrastive loss of its features."""
    reconstruction: NonNegativeFloat | tuple[NonNegativeFloat, ...] = (1.0, 0.0)
    """Weight lambda of the reconstruction: a number, or its values along the depth of the groups but the last."""
    classification: NonNegativeFloat | tuple[NonNegativeFloat, ...] = (0.0, 1.0)
    """Weight mu of the task, likewise."""
    temperature: PositiveFloat = 0.07
    """Temperature of the contrastive loss."""
    group: PositiveInt = 1
    """Neighbouring blocks that share one loss, one graph and one backward pass."""

    name: ClassVar[str] = "infopro"
    locality: ClassVar[Locality] = "local"
    reads_input: ClassVar[bool] = True
    boundary: ClassVar[str] = "detached activation and the input"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels", "regression", "multilabel", "loss")
    only: ClassVar[str] = "its auxiliary networks read one label per sample"
    source: ClassVar[str] = (
        "Wang et al., arXiv 2101.10832 (2021) and its code; range of the target, other inputs than images, vectors and "
        "tokens: our reading"
    )
    restrictions: ClassVar[str] = (
        'One label per sample; batches of two or more with task="contrast". Good weights depend on the network and the '
        "number of groups. Reconstruction is for images and vectors of numbers."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "contrast":
            object.__setattr__(self, "whole_batch", "compares the samples of a batch")

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each; the head belongs to the last group."""
        return grouped(blocks, self.group, join_head=True)

    def weights(self, site: Site) -> tuple[float, float]:
        """The weights of reconstruction and task at a site; 0 except at the end of a group with its own loss."""
        last = len(self.groups(site.blocks)) - 1
        number = site.index // self.group
        if site.is_head or number == last or (site.index + 1) % self.group:
            return 0.0, 0.0
        place = Site(number, last, site.name)
        return by_depth(self.reconstruction, place), by_depth(self.classification, place)

    def has_head(self, site: Site) -> bool:
        """Whether a group other than the last ends at the site, and one of its losses has a weight."""
        return any(self.weights(site))

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """Decoder and auxiliary network of every group but the last, as far as they have a weight."""
        if self.task == "contrast" and task.kind != "classification":
            raise LayerwiseError(
                f'infopro with task="contrast" compares samples of one class, and {task.kind} has none; use task="ce".'
            )
        return super().auxiliary(site, h, task)

    def head(self, site: Site, h: Tensor, task: Task) -> nn.Module:
        """Decoder and auxiliary network, as far as they have a weight."""
        keep, tell = self.weights(site)
        h = site.standard(h)
        wanted = tuple(self._input(h.new_empty(1, *site.inputs), h, site).shape[1:])
        decoder = Decoder(tuple(h.shape[1:]), wanted) if keep else None
        outputs = FEATURES if self.task == "contrast" else task.outputs
        return InfoProHeads(decoder, reader(h, outputs) if tell else None).to(h.dtype)

    def _input(self, x: Tensor, h: Tensor, site: Site) -> Tensor:
        """The target of reconstruction, in the standard order; for a vector the order does not matter."""
        layout = site.input_layout
        if site.layouts and h.dim() > 2 and x.dim() > 3:
            layout = known_layout(layout)
        return x if layout is None else to_standard(x, layout)

    def signal(self, ctx: BlockContext) -> Signal:
        """Reconstruction and task of the group, or the cross-entropy of the network's head."""
        if ctx.task.per_position(ctx.y):
            raise LayerwiseError("infopro's auxiliary networks read one label per sample, not one per position.")
        if self.task == "contrast":
            check_several(self.name, ctx)
        if ctx.site.is_head:
            return loss_at_head(ctx)
        x = ctx.h_in if ctx.site.index == 0 else ctx.message
        if ctx.auxiliary is None:
            return Signal(message=x)
        ctx = self.looking(ctx)
        assert isinstance(ctx.auxiliary, InfoProHeads)
        keep, tell = self.weights(ctx.site)
        h = ctx.site.standard(ctx.h)
        loss, metrics, statistics = torch.zeros((), device=ctx.h.device), {}, {}
        if ctx.auxiliary.decoder is not None:
            decoded, wanted = wide(ctx.auxiliary.decoder(h)), self._input(x, h, ctx.site)
            if wanted.dim() >= 4:
                metrics["reconstruction"] = F.binary_cross_entropy_with_logits(decoded, brightness(wanted))
            else:
                metrics["reconstruction"] = F.mse_loss(decoded, wanted.to(decoded.dtype))
            loss = loss + keep * metrics["reconstruction"]
        if ctx.auxiliary.reader is not None:
            found = ctx.auxiliary.reader(h if h.dim() >= 4 else pool_vectors(h, "mean", per_position=False))
            if self.task == "contrast":
                metrics["contrast"] = supervised_contrastive(found, ctx.y, self.temperature)
                loss = loss + tell * metrics["contrast"]
            else:
                classified = loss_of(ctx.task, found, ctx.y)
                assert classified.loss is not None
                metrics |= classified.metrics
                statistics, loss = classified.statistics, loss + tell * classified.loss
        return Signal(loss=loss, message=x, metrics=metrics, statistics=statistics)
