"""Hedge backpropagation: a classifier on every block, weighted by how small its losses have been."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.core.chunked import LinearOutputs
from layerwise.core.functional import wide
from layerwise.core.pieces import PredictsBySite
from layerwise.core.ranges import Fraction, PositiveFraction
from layerwise.core.rule import BlockContext, Locality, Signal, Site, loss_of
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.local_ce import GreedyLinear
from layerwise.rules.readout import outputs_of, pool_vectors, read_out


class BlockClassifier(nn.Module):
    """The classifier of a block.

    Args:
        readout: maps the pooled output to the classes.
        per_position: whether it classifies every position.
    """

    def __init__(self, readout: nn.Module, per_position: bool):
        super().__init__()
        self.readout, self.per_position = readout, per_position


class HedgeWeights(nn.Module):
    """The weight of every classifier; the head, whose classifier is the network's own, holds them."""

    def __init__(self, classifiers: int):
        super().__init__()
        # A running statistic: it is averaged over replicas, and put back where an update is skipped.
        self.register_buffer("running_weights", torch.full((classifiers,), 1 / classifiers, dtype=torch.float32))

    running_weights: Tensor

    def mix(self, log_p: list[Tensor]) -> Tensor:
        """Logarithm of the weighted sum of probabilities, from the log-probabilities `(..., K)` of each classifier."""
        return (torch.stack(log_p, -1) + self.running_weights.log()).logsumexp(-1)

    def follow(self, losses: Tensor, discount: float, smoothing: float) -> None:
        """Discount the weights by the losses `(N,)`, raise those under the floor, and make their sum 1.

        >>> hedge = HedgeWeights(2)
        >>> hedge.follow(torch.tensor([0.0, 1.0]), discount=0.5, smoothing=0.2)
        >>> hedge.running_weights
        tensor([0.6667, 0.3333])
        """
        weights = (self.running_weights * discount**losses).clamp_min(smoothing / len(losses))
        self.running_weights.copy_(weights / weights.sum())


@dataclass(frozen=True)
class HedgeBackprop(PredictsBySite, GreedyLinear):
    r"""Hedge backpropagation: the losses of classifiers on all blocks, weighted; the prediction is their weighted sum.

    $$L = \sum_i \alpha_i\, \mathrm{CE}(f_i, y), \qquad f_i = W_i\,\mathrm{pool}(h_i) + b_i, \qquad
      p(y \mid x) = \sum_i \alpha_i\, \mathrm{softmax}(f_i)_y$$

    with gradients through all blocks; the network's head is the last classifier. After each batch the weights follow
    the losses of that batch, and are normalised to the sum 1:

    $$\alpha_i \leftarrow \max\Big(\alpha_i\, \beta^{\mathrm{CE}(f_i, y)}, \frac{s}{N}\Big)$$

    They start at 1/N. With one classifier this is backpropagation, bit for bit.

    >>> HedgeBackprop().groups(blocks=3)
    [range(0, 4)]
    """

    discount: PositiveFraction = 0.99
    """Factor beta by which a loss of 1 lowers the weight of a classifier; 1 for constant weights."""
    smoothing: Fraction = 0.2
    """Floor s of the weights: none is less than s / N before they are normalised."""

    name: ClassVar[str] = "hedge_backprop"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "activations forward; gradients backward through every block"
    flat_memory: ClassVar[bool] = False
    whole_batch: ClassVar[str] = "weights its classifiers by their losses on the whole batch"
    tasks: ClassVar[tuple[str, ...]] = ("classification", "language_model", "soft_labels")
    only: ClassVar[str] = "its prediction is a weighted sum of probabilities of classes"
    predicts_at_head: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Sahoo, Pham, Lu & Hoi, arXiv 1711.03705 (2017); batches, no classifier on the input, the network's head as "
        "the last one: our reading"
    )
    restrictions: ClassVar[str] = (
        "At least the memory of backprop. The plain network's output is that of the last classifier."
    )

    def groups(self, blocks: int) -> list[range]:
        """One group: every block and the head."""
        return [range(blocks + 1)]

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """A linear classifier for every block but the last; the weights at the head."""
        if site.is_head:
            return HedgeWeights(1 + sum(self._has_head(replace(site, index=i)) for i in range(site.blocks)))
        readout = super().auxiliary(site, h, task)
        return None if readout is None else BlockClassifier(readout, task.positions != "sample")

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The outputs of the block's own classifier."""
        assert isinstance(auxiliary, BlockClassifier)
        return super().outputs_at(site, h, auxiliary.readout, task)

    def signal(self, ctx: BlockContext) -> Signal:
        """The weighted losses, at the head; before it, the message has the loss and prediction of every classifier."""
        so_far = [] if ctx.message is None else ctx.message
        if ctx.site.is_head:
            return self._weighted(ctx, so_far)
        if not isinstance(ctx.auxiliary, BlockClassifier):
            return Signal(message=so_far)
        if ctx.task.per_position(ctx.y) != ctx.auxiliary.per_position:
            raise LayerwiseError("hedge_backprop learns labels per position as a language model; set that task.")
        z, y = read_out(ctx, ctx.auxiliary.readout, self.pool)
        z = z.whole() if isinstance(z, LinearOutputs) else z
        own = loss_of(ctx.task, z, y)
        assert own.loss is not None
        own.metrics["loss"] = own.loss.detach()
        message = [*so_far, (own.loss, _log_p(z))]
        return Signal(message=message, metrics=own.metrics, statistics=own.statistics)

    def _weighted(self, ctx: BlockContext, so_far: list[tuple[Tensor, Tensor]]) -> Signal:
        hedge = ctx.auxiliary
        assert isinstance(hedge, HedgeWeights)
        losses = torch.stack([*(loss for loss, _ in so_far), ctx.task.loss(ctx.h, ctx.y)])
        weights = hedge.running_weights.clone()  # the step below writes into the buffer
        prediction = loss_of(ctx.task, hedge.mix([*(log_p for _, log_p in so_far), _log_p(ctx.h)]), ctx.y)
        assert prediction.loss is not None
        if ctx.learns:
            hedge.follow(losses.detach(), self.discount, self.smoothing)
        place = torch.arange(1, len(losses) + 1, device=losses.device)
        metrics = {"loss": prediction.loss, **prediction.metrics, "depth": (weights * place).sum()}
        return Signal(loss=(weights * losses).sum(), metrics=metrics, statistics=prediction.statistics)

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Log-probabilities of each classifier; at the head those of their weighted sum."""
        so_far = [] if message is None else message
        if isinstance(auxiliary, HedgeWeights):
            return auxiliary.mix([*so_far, _log_p(h)]), None
        if isinstance(auxiliary, BlockClassifier):
            features = pool_vectors(h, self.pool, auxiliary.per_position, site)
            so_far = [*so_far, _log_p(outputs_of(auxiliary.readout, features, site).whole())]
        return h, so_far


def _log_p(z: Tensor) -> Tensor:
    return wide(z.detach()).log_softmax(-1)
