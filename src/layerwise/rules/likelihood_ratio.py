"""Likelihood ratio: noise on the outputs of layers, times the resulting loss."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.core.blocks import Block
from layerwise.core.perturbed_layers import Perturbed, Seen, estimated, losses_of_samples, scaled
from layerwise.core.ranges import PositiveFloat, PositiveInt
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, loss_at_head


class Streams:
    """The message to all blocks: noisy passes, each with the next block's input and the samples' weights."""

    def __init__(self, noises: list[Perturbed], h: Tensor):
        self.noises = noises
        self.inputs = [h] * len(noises)
        self.slopes: list[Tensor] = []


@dataclass(frozen=True)
class LikelihoodRatio(Rule):
    r"""Unified likelihood ratio: layers move along the noise on their outputs as far as the loss fell.

    With $v_l = \varphi_l(h_{l-1}; \theta_l) + \sigma z_l$ and $z_l \sim N(0, I)$ for each sample the loss is smoothed,
    and

    $$\nabla_{\theta_l} E[L] = \frac1\sigma\, E\Big[(L - b) \, \Big(\frac{\partial \varphi_l}{\partial
      \theta_l}\Big)^\top z_l\Big]$$

    for any b that does not depend on the noise: here the loss without noise. A linear layer's gradient is
    $E[(L - b)\, z x^\top] / \sigma$ with its noisy input x, and only each layer on its own is differentiated. K
    pairs of passes, with z and -z, estimate it. Parameters of modules whose gradient has no closed form, such as a
    position embedding, get noise themselves.

    >>> LikelihoodRatio(pairs=8).locality
    'perturbation'
    """

    pairs: PositiveInt = 8
    """Pairs K of noisy passes per step."""
    sigma: PositiveFloat = 0.1
    """Deviation of the noise."""

    name: ClassVar[str] = "likelihood_ratio"
    locality: ClassVar[Locality] = "perturbation"
    boundary: ClassVar[str] = "activations forward, of every noisy pass; the loss of each sample, sent to all"
    flat_memory: ClassVar[bool] = True
    builds_graph: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    whole_batch: ClassVar[str] = "takes losses of passes of the whole batch"
    tasks: ClassVar[tuple[str, ...]] = ("classification", "language_model", "soft_labels")
    only: ClassVar[str] = "it needs the loss of each sample, which it knows for classes alone"
    unlabelled: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Jiang et al., One Forward is Enough, arXiv 2305.08960 (2023); one noise for all layers at once, the sizes of "
        "noise and number of passes: our reading"
    )
    restrictions: ClassVar[str] = (
        "The variance grows with the number of units: small networks, or many pairs. Batch norm couples samples, whose "
        "losses are taken one by one, so its gradient is biased. 4 K + 2 forward passes per step."
    )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message holds the noisy passes with their losses."""
        first = int(torch.randint(2**62, (), device="cpu"))
        signs = [(first + k, sign) for k in range(self.pairs) for sign in (1, -1)]
        sent = Streams([Perturbed(seed, scaled(sign * self.sigma)) for seed, sign in signs], ctx.x)
        losses, scale = [], 2 * self.pairs * self.sigma
        for noise in sent.noises:
            h = ctx.x
            for index in range(len(ctx.network.blocks) + 1):
                h = ctx.run(index, h, noise)
            losses.append(losses_of_samples(ctx.task, h, ctx.y))
        quiet = losses_of_samples(ctx.task, ctx.forward(ctx.x), ctx.y)
        for up, down in zip(losses[::2], losses[1::2], strict=True):
            sent.slopes += [(up - quiet) / scale, (quiet - down) / scale]
        return ctx.x, sent

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block, with noise in the noisy passes."""
        return message.run(block, h, block) if isinstance(message, Perturbed) else block(h)

    def signal(self, ctx: BlockContext) -> Signal:
        """Each noisy pass goes through the block, and its noise is weighted by the loss."""
        signal = loss_at_head(ctx) if ctx.site.is_head else Signal(message=ctx.message)
        if ctx.training:  # the passes go through a frozen block, too
            sent = ctx.message
            run_again = ctx.run
            assert run_again is not None
            block = ctx.site.block
            for place, (noise, slopes) in enumerate(zip(sent.noises, sent.slopes, strict=True)):
                seen = Seen()
                sent.inputs[place] = noise.run(block, sent.inputs[place], lambda h: run_again(h, None), seen)
                if ctx.learns:
                    estimated(seen, slopes, signal.gradients)
        return signal
