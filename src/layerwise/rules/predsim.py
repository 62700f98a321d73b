"""PredSim: a local classifier, and similarities between samples that should match those of their labels."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.functional import similarity, wide
from layerwise.core.ranges import Fraction, PositiveInt
from layerwise.core.rule import BlockContext, Locality, Signal, Site, loss_at_head, loss_of
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.ahead import LooksAhead
from layerwise.rules.readout import HasReadout, check_several, convolution, grouped, outputs_of, pool_vectors


class PredSimHeads(nn.Module):
    """The two local networks of a block: a linear classifier that starts at zero, and a map before the similarities.

    Args:
        h: a sample of the block's output, in the standard order.
        rule: says which of the two there are, and whose matrix classifies.
        site: of the block.
        task: knows the number of classes K.
    """

    def __init__(self, h: Tensor, rule: "PredSim", site: Site, task: Task):
        super().__init__()
        self.classifier = self.map = None
        if rule.loss != "sim":
            self.classifier = rule.own_readout(pool_vectors(h, "grid", False).shape[-1], site, task, h)
            if isinstance(self.classifier, nn.Linear):
                nn.init.zeros_(self.classifier.weight)
                nn.init.zeros_(self.classifier.bias)
        if rule.loss != "pred":
            image = h.dim() >= 4
            width = h.shape[1 if image else -1]
            self.map = (
                convolution(h)(width, width, 3, padding=1, bias=False) if image else nn.Linear(width, width, bias=False)
            )
        self.to(h.dtype)

    def rows(self, h: Tensor) -> Tensor:
        """A vector per sample, `(B, D)`: of an image, the standard deviation of each map over the places."""
        assert self.map is not None
        z = self.map(h)
        spread = z.dim() >= 4 and z[0, 0].numel() > 1
        return wide(z).flatten(2).std(2) if spread else z.flatten(1)


@dataclass(frozen=True)
class PredSim(LooksAhead, HasReadout):
    r"""PredSim: local cross-entropy, and similarity matching within the batch.

    $$L_i = (1 - \beta)\, \mathrm{CE}\big(W_i\, \mathrm{pool}(h_i), y\big)
          + \beta\, \mathrm{mean}\big(S(C_i h_i) - S(e_y)\big)^2, \qquad
      h_i = f_i(\mathrm{stopgrad}(h_{i-1}))$$

    S is the B x B matrix of the cosine similarities of mean-centred rows, $e_y$ the one-hot labels. $C_i$ is a learned
    3x3 convolution, whose maps' standard deviations over space are the row, or a learned matrix; $W_i$ is linear on at
    most 4096 pooled numbers and starts at zero. The head learns from the cross-entropy on the detached last activation.
    With $\beta = 0.99$ the similarity has the weight 0.99. `loss="pred"` and `loss="sim"` use one of its two terms.

    All of this is the paper's, except for these: the loss sees the block's output after its dropout; the head's loss
    has the weight 1 (the paper: $1 - \beta$; the same under Adam); the mapped tokens of a sample are one row.

    >>> PredSim(loss="sim").groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    loss: Literal["predsim", "pred", "sim"] = "predsim"
    """Both terms, only the classifier, or only the similarities."""
    beta: Fraction = 0.99
    """Weight of the similarities; the classifier has 1 - beta."""
    group: PositiveInt = 1
    """Neighbouring blocks that share one loss, one graph and one backward pass."""

    name: ClassVar[str] = "predsim"
    locality: ClassVar[Locality] = "local"
    whole_batch: ClassVar[str] = "compares the samples of a batch"
    boundary: ClassVar[str] = "detached activation"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels", "multilabel")
    only: ClassVar[str] = "similarities are those of labels with several entries, such as classes"
    source: ClassVar[str] = "Nøkland & Eidnes, arXiv 1901.06656 (2019); tokens: our reading"
    restrictions: ClassVar[str] = (
        "One label per sample. The similarities depend on the other samples of the batch: use 64 or more; one "
        "is refused."
    )

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each; the head on its own."""
        return grouped(blocks, self.group, join_head=False)

    def has_head(self, site: Site) -> bool:
        """Whether a group of blocks ends at the site."""
        ends = (site.index + 1) % self.group == 0 or site.index == site.blocks - 1
        return ends and not site.is_head

    def head(self, site: Site, h: Tensor, task: Task) -> nn.Module:
        """The classifier and the map."""
        return PredSimHeads(site.standard(h), self, site, task)

    def signal(self, ctx: BlockContext) -> Signal:
        """Cross-entropy of the local classifier and distance of the similarities from those of the labels."""
        if ctx.task.per_position(ctx.y):
            raise LayerwiseError("predsim compares samples, which have one label each, not one per position.")
        if ctx.site.is_head:
            return loss_at_head(ctx)
        ctx = self.looking(ctx)
        heads = ctx.auxiliary
        if heads is None:
            return Signal()
        assert isinstance(heads, PredSimHeads)
        h = ctx.site.standard(ctx.h)
        share = {"pred": 0.0, "sim": 1.0}.get(self.loss, self.beta)
        loss, metrics, statistics = torch.zeros((), device=ctx.h.device), {}, {}
        if heads.classifier is not None:
            logits = outputs_of(heads.classifier, pool_vectors(h, "grid", False), ctx.site).whole()
            predicted = loss_of(ctx.task, logits, ctx.y)
            assert predicted.loss is not None
            metrics |= predicted.metrics
            statistics, loss = predicted.statistics, loss + (1 - share) * predicted.loss
        if heads.map is not None:
            check_several(self.name, ctx)
            rows = ctx.y if ctx.y.dim() > 1 else F.one_hot(ctx.y, ctx.task.classes)
            wanted = similarity(rows)
            # Not F.mse_loss, whose scalar keeps a storage of B x B numbers alive with the metrics.
            metrics["similarity"] = (similarity(heads.rows(h)) - wanted).square().mean()
            loss = loss + share * metrics["similarity"]
        return Signal(loss=loss, metrics=metrics, statistics=statistics)
