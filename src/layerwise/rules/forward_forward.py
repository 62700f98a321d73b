"""Forward-Forward: every block is active on true samples and quiet on false ones."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.functional import goodness, unit_length, wide
from layerwise.core.pieces import PredictionContext, PredictsBySite, UsesPrediction
from layerwise.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.label_input import hybrid_images, label_map, overlay, wrong_labels
from layerwise.rules.readout import pool_vectors


class Layer(nn.Module):
    """The rule's module at a block.

    Args:
        site: the block.
        h: a sample of the block's output.
        classes: number of classes K.
        reads: whether the softmax predictor reads this block.
        peers: whether the mean activity of its units is tracked.
    """

    def __init__(self, site: Site, h: Tensor, classes: int, reads: bool, peers: bool):
        super().__init__()
        self.classes, self.input_layout = classes, site.input_layout
        # If the first block keeps space and the input is an image, the label is a wave that every filter sees.
        self.spatial = h.dim() > 2 and len(site.inputs) == 3
        width = pool_vectors(h, "auto", False, site).shape[-1] if reads else 0
        self.readout = nn.Linear(width, classes) if reads else None
        self.register_buffer("running_mean", torch.zeros(h.shape[1:]) if peers else None)

    running_mean: Tensor | None

    def peer_loss(self, h: Tensor, training: bool) -> Tensor:
        """Variance over the units of their running mean activity, `h` `(B, ...)` included."""
        assert self.running_mean is not None
        mean = 0.9 * self.running_mean + 0.1 * h.float().mean(0)
        if training:
            self.running_mean.copy_(mean.detach())
        return (mean - mean.mean()).square().mean()


@dataclass(frozen=True)
class ForwardForward(UsesPrediction, PredictsBySite, Rule):
    r"""Forward-Forward: a local contrast between samples with the true and with a false label.

    The label is written into the input. With $g_i = \sum_j h_{ij}^2$ (or the mean), taken before normalisation:

    $$h_i = f_i\big(\mathrm{stopgrad}(h_{i-1} / \mathrm{rms}(h_{i-1}))\big), \qquad
      L_i = \log(1 + e^{\theta - g_i^{+}}) + \log(1 + e^{g_i^{-} - \theta})$$

    or, with `loss="symba"`, $L_i = \log(1 + e^{-\alpha (g_i^{+} - g_i^{-})})$. Only the direction of a block's activity
    is passed on, so that the next block cannot read the goodness off its length.

    Two predictors. `"goodness"` runs the network once with every label, all in one batch, and takes the one with the
    largest sum of goodness over the blocks after the first; the network's head is not used. `"softmax"` runs it once
    with a neutral label and adds up linear readouts of those blocks, the network's head being the last of them.

    Negatives are the same sample with a wrong label, uniform (`"random"`) or drawn with the predictor's probabilities
    (`"hard"`: the whole network's prediction is then broadcast), or, without any label, images composed of two
    (`"hybrid"`, for the softmax predictor).

    The paper's: the objective, the normalisation, the overlay, the three kinds of negatives, both predictors, peer
    normalisation. Ours: readouts that are fitted one after the other, each to what those before it leave (the paper
    fits one to all blocks' activities at once, which would have to be kept); the label map, as waves over the image in
    the manner of Scodellaro et al. (arXiv 2312.14924); peer normalisation's momentum of 0.9; theta as a multiple.

    >>> ForwardForward(loss="symba").groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    goodness: Literal["sum", "mean"] = "sum"
    """Sum or mean of the squared activities."""
    threshold: NonNegativeFloat | None = None
    """Threshold theta: of the mean square, default 2; of the sum of squares per unit, default 1."""
    loss: Literal["logistic", "symba"] = "logistic"
    """Contrast of each sample with the threshold, or of positive with negative."""
    alpha: PositiveFloat = 4.0
    """Steepness of the loss `symba`."""
    negatives: Literal["random", "hard", "hybrid"] = "random"
    """A wrong label at random, a probable one, or (without labels) an image composed of two."""
    label: Literal["auto", "overlay", "map"] = "auto"
    """Label in the first pixels, or as a wave over the image; auto: a wave if the first block keeps space."""
    label_scale: PositiveFloat = 1.0
    """Size of the label: factor of the bright pixel's distance from the dark ones, or of the wave."""
    predictor: Literal["goodness", "softmax"] = "goodness"
    """Goodness with every label, or linear readouts with a neutral one."""
    skip: NonNegativeInt = 1
    """Blocks at the input that no predictor reads (the last block always counts)."""
    peer: NonNegativeFloat = 0.0
    """Weight of peer normalisation: keeps the units' mean activities alike (0.03 in a public implementation)."""

    name: ClassVar[str] = "forward_forward"
    locality: ClassVar[Locality] = "local"
    whole_batch: ClassVar[str] = "makes negative samples out of the batch"
    boundary: ClassVar[str] = "detached activation of unit length, for a positive and a negative sample"
    flat_memory: ClassVar[bool] = True
    begins_with_batch: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    only: ClassVar[str] = "its negative samples carry a wrong class"
    source: ClassVar[str] = (
        "Hinton, arXiv 2212.13345 (2022); SymBa: Lee & Song, arXiv 2303.08418 (2023); readouts, label map: our reading"
    )
    restrictions: ClassVar[str] = (
        "One label per sample. Prediction by goodness runs the network once per class, and the plain network's output "
        "means nothing then. Batch norm sees positive and negative samples together."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives == "hybrid" and self.predictor != "softmax":
            raise LayerwiseError("hybrid images carry no label to compare; use predictor='softmax' with them.")
        if self.negatives == "hard":  # what the class declares holds for the other kinds
            object.__setattr__(self, "locality", "broadcast")
            object.__setattr__(
                self, "boundary", f"{self.boundary}; the network's predictions choose the negative label"
            )

    def trains(self, site: Site) -> bool:
        """All blocks; the head as the last readout of the softmax predictor."""
        return not site.is_head or self.predictor == "softmax"

    def _counts(self, site: Site) -> bool:
        return site.index >= min(self.skip, site.blocks - 1)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """A readout for the softmax predictor, running means for peer normalisation, and how labels are written."""
        if site.is_head:
            return None
        site.layout()  # samples are read from the first dimension
        reads = self.predictor == "softmax" and self._counts(site) and site.index < site.blocks - 1
        return Layer(site, h, task.classes, reads, self.peer > 0)

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """Positive samples, then negative ones, then (for the softmax predictor) neutral ones."""
        if ctx.y.dim() > 1:
            raise LayerwiseError(f"{self.name} writes one label per sample into the input, not one per position.")
        first = ctx.auxiliary[0]
        assert isinstance(first, Layer)
        if self.negatives == "hybrid":
            alone = not ctx.training and len(ctx.x) < 2  # the rest of a test set, whose prediction needs no negatives
            parts = [ctx.x, ctx.x if alone else hybrid_images(ctx.x, layout=first.input_layout)]
        else:
            assert isinstance(ctx, PredictionContext)
            opinion = ctx.predict(ctx.x) if self.negatives == "hard" else None
            wrong = wrong_labels(ctx.y, first.classes, opinion)
            parts = [self.labelled(ctx.x, F.one_hot(y, first.classes), first) for y in (ctx.y, wrong)]
            if self.predictor == "softmax":
                parts.append(self._neutral(ctx.x, first))
        zeros = ctx.x.new_zeros(len(ctx.x), dtype=torch.float32)
        return unit_length(torch.cat(parts)), {"votes": torch.cat([zeros, zeros]), "logits": zeros[:, None]}

    def labelled(self, x: Tensor, p: Tensor, first: Layer) -> Tensor:
        """Samples `(B, ...)` with class probabilities `(B, K)` written into them."""
        wide = first.spatial if self.label == "auto" else self.label == "map"
        p = self.label_scale * p.to(x.dtype)
        return label_map(x, p, first.input_layout) if wide else overlay(x, p)

    def _neutral(self, x: Tensor, first: Layer) -> Tensor:
        return self.labelled(x, x.new_full((len(x), first.classes), 1 / first.classes), first)

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run neutral samples without a graph: nothing learns from them. Blocks with buffers see all samples at once.

        Buffers are, for example, batch norm's running statistics.
        """
        taught = len(h) if message is None else len(message["votes"])
        if len(h) <= taught or not torch.is_grad_enabled() or any(True for _ in block.named_buffers()):
            return block(h)
        out = block(h[:taught])
        with torch.no_grad():
            neutral = block(h[taught:])
        return torch.cat([out, neutral])

    def signal(self, ctx: BlockContext) -> Signal:
        """The contrast of the block's goodness; its vote; its direction as the next block's input."""
        if ctx.site.is_head:
            return self._head(ctx)
        assert isinstance(ctx.auxiliary, Layer)
        samples, message = len(ctx.y), dict(ctx.message)
        g = goodness(ctx.h[: 2 * samples], self.goodness)
        own, others = g.chunk(2), self.others(ctx, g).chunk(2)
        loss = self.contrast(own[0] + others[0], own[1] + others[1], self.theta(ctx))
        metrics = {"loss": loss, "accuracy": (own[0] > own[1]).float().mean()}
        if self.peer > 0:
            loss = loss + self.peer * ctx.auxiliary.peer_loss(ctx.h[:samples], ctx.training)
        direction = unit_length(ctx.h)
        reading = direction[:samples] if self.negatives == "hybrid" else direction[2 * samples :]
        if self._counts(ctx.site):
            message["votes"] = message["votes"] + g
        if ctx.auxiliary.readout is not None:
            message["logits"] = message["logits"] + self._read(ctx.auxiliary, reading.detach(), ctx.site)
            loss = loss + ctx.task.loss(message["logits"], ctx.y)
        last = ctx.site.index == ctx.site.blocks - 1
        return Signal(loss, message=message, output=reading if last and len(reading) else direction, metrics=metrics)

    def _read(self, layer: Layer, direction: Tensor, site: Site) -> Tensor:
        """The layer's readout of a direction: `(B, K)`, in float32."""
        assert layer.readout is not None
        vectors = pool_vectors(direction, "auto", False, site)
        return wide(layer.readout(vectors.to(layer.readout.weight.dtype)))

    def theta(self, ctx: BlockContext) -> float:
        """Threshold of the block's goodness."""
        default, units = (1.0, ctx.h[0].numel()) if self.goodness == "sum" else (2.0, 1)
        return (default if self.threshold is None else self.threshold) * units

    def contrast(self, positive: Tensor, negative: Tensor, theta: float) -> Tensor:
        """Mean loss of the goodness `(B,)` of positive and negative samples."""
        if self.loss == "symba":
            return F.softplus(-self.alpha * (positive - negative)).mean()
        return (F.softplus(theta - positive) + F.softplus(negative - theta)).mean()

    def others(self, ctx: BlockContext, g: Tensor) -> Tensor:
        """Added to the goodness `(2 B,)` in the loss: nothing here, other blocks' goodness in collaboration."""
        return torch.zeros_like(g)

    def _head(self, ctx: BlockContext) -> Signal:
        """The last readout; or, if goodness predicts, how often the true label beats the false one."""
        if self.predictor == "softmax":
            logits = ctx.message["logits"] + wide(ctx.h)
            loss = ctx.task.loss(logits, ctx.y)
            return Signal(loss, metrics={"loss": loss, "accuracy": ctx.task.correct(logits, ctx.y) / ctx.y.numel()})
        true, false = ctx.message["votes"].chunk(2)
        return Signal(metrics={"loss": F.softplus(false - true).mean(), "accuracy": (true > false).float().mean()})

    def ask(self, x: Tensor, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """The samples with every label, or with the neutral one."""
        assert isinstance(auxiliary, Layer)
        if self.predictor == "goodness":
            labels = torch.eye(auxiliary.classes, dtype=x.dtype, device=x.device).repeat(len(x), 1)
            x = self.labelled(x.repeat_interleave(auxiliary.classes, 0), labels, auxiliary)
        elif self.negatives != "hybrid":
            x = self._neutral(x, auxiliary)
        return unit_length(x), x.new_zeros(())

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Add up goodness, or readouts, of which the network's head is the last: `(B, K)`."""
        if site.is_head:
            return message.view(-1, h.shape[-1]) if self.predictor == "goodness" else message + wide(h), None
        assert isinstance(auxiliary, Layer)
        direction = unit_length(h)
        if self.predictor == "goodness":
            vote = goodness(h, self.goodness) if self._counts(site) else None
        else:
            vote = None if auxiliary.readout is None else self._read(auxiliary, direction, site)
        return direction, message if vote is None else message + vote
