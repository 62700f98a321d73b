"""SVP: Stochastic Variational Propagation, the earlier form of SLL."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F

from layerwise.core.ranges import NonNegativeFloat
from layerwise.core.rule import BlockContext, Signal
from layerwise.rules.sll import SLL


@dataclass(frozen=True)
class SVP(SLL):
    r"""Stochastic Variational Propagation: KL between neighbours plus alignment of their projections.

    $$L_i = -\log q_i[y] + \lambda\, KL(\mathrm{stopgrad}(q_{i-1}) \,\|\, q_i)
            + \gamma\, \big(1 - \cos(v_i, \mathrm{stopgrad}(v_{i-1}))\big)$$

    with the projections and posteriors of `sll`, whose options it shares. The paper states that SVP exists and
    aligns features; the cosine form of the alignment is our reading.

    >>> SVP().surrogate
    'kl'
    """

    surrogate: Literal["neg_log_bc", "one_minus_bc", "hellinger", "kl", "none"] = "kl"
    """Divergence between the posteriors of neighbouring blocks."""
    feature_weight: NonNegativeFloat = 1.0
    """Weight gamma of the feature alignment."""

    name: ClassVar[str] = "svp"
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels", "language_model", "multilabel")
    only: ClassVar[str] = "the cosine of two projections needs several coordinates per prediction, at one resolution"
    boundary: ClassVar[str] = "detached activation and projection (d0 numbers per sample)"
    source: ClassVar[str] = (
        "Yin & Corradi, arXiv 2505.05181 v1-v3 (2025), named SVP there; cosine alignment: our reading"
    )

    def signal(self, ctx: BlockContext) -> Signal:
        """The signal of `sll` plus the cosine distance of neighbouring projections."""
        signal = super().signal(ctx)
        previous = ctx.message
        if signal.loss is not None and ctx.auxiliary is not None and previous:
            v, before = signal.message[-1], previous[-1].detach()
            distance = 1 - ctx.task.average(F.cosine_similarity(v, before, dim=-1), ctx.y)
            signal.loss = signal.loss + self.feature_weight * distance
            signal.metrics["feature_distance"] = distance
        return signal
