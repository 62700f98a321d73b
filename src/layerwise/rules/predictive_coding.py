"""Predictive coding: states settle between what predicts them and what they explain, then blocks learn."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerwise.core.blocks import Block
from layerwise.core.phases import run_by_phase
from layerwise.core.pieces import RepeatsBatch
from layerwise.core.ranges import PositiveFloat, PositiveInt
from layerwise.core.rule import ANY_TASK, BatchContext, BlockContext, Locality, Rule, Signal, loss_at_head
from layerwise.errors import LayerwiseError
from layerwise.rules.settling import (
    WHOLE_BATCH,
    in_phases,
    loss_of_phases,
    outputs_of_blocks,
    phases_message,
    phases_of,
    signs,
    through_head,
)


@dataclass(frozen=True)
class PredictiveCoding(RepeatsBatch, Rule):
    r"""Predictive coding: inference of the states first, then one local step of every block towards them.

    With states $h_1, \dots, h_L$ of the blocks, $h_0 = x$, errors $\epsilon_l = h_l - f_l(h_{l-1})$ and the loss
    $\ell$ of the head, a sample's energy is

    $$F = \tfrac12 \sum_l \lVert \epsilon_l \rVert^2 + \beta\, \ell(h_L, y)$$

    States start from a forward pass. T times, all of them move at once:

    $$h_l \leftarrow h_l - \gamma\, \frac{\partial F}{\partial h_l}, \qquad
      \frac{\partial F}{\partial h_l} = \epsilon_l - J_{l+1}^\top \epsilon_{l+1}, \qquad
      \frac{\partial F}{\partial h_L} = \epsilon_L + \beta \frac{\partial \ell}{\partial h_L}$$

    Then block l follows $\partial F / \partial \theta_l / \beta = -\epsilon_l^\top \partial f_l(h_{l-1}) / \partial
    \theta_l / \beta$, at its settled input.

    - `strict`: as above.
    - `fixed_prediction`: predictions and Jacobians stay those of the forward pass. With $\gamma = 1$ and T = L it is
      backprop.
    - `incremental`: blocks learn after every step of inference, T times per batch.
    - `centred=True`: states settle twice, with $\beta$ and $-\beta$, and blocks follow half the difference of the two
      gradients, whose error is of second order in $\beta$.

    Energy, inference and variants are the papers'. Ours: the head is read as a loss with its own gradient, so that any
    task can be done; a block is a layer of any kind; weights follow F divided by $\beta$, so that the rate does not
    depend on it.

    >>> PredictiveCoding(variant="fixed_prediction", steps=3, rate=1.0).groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    variant: Literal["strict", "fixed_prediction", "incremental"] = "strict"
    """strict | fixed_prediction (predictions are those of the forward pass) | incremental (an update per step)."""
    steps: PositiveInt = 8
    """Steps of inference T."""
    rate: PositiveFloat = 0.2
    """Step size of inference, gamma."""
    beta: PositiveFloat = 1.0
    """Weight of the loss in the energy."""
    centred: bool = False
    """Whether states settle with beta and with -beta, and blocks learn from the difference."""

    name: ClassVar[str] = "predictive_coding"
    locality: ClassVar[Locality] = "equilibrium"
    boundary: ClassVar[str] = "settled state, and in every step of inference the error of the block after it, both ways"
    flat_memory: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    whole_batch: ClassVar[str] = WHOLE_BATCH
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = (
        "Whittington & Bogacz, Neural Comput. 29 (2017); fixed predictions: Millidge et al., arXiv 2006.04182 (2020); "
        "incremental: Salvatori et al., arXiv 2212.00720 (2022); centred: Pinchetti et al., arXiv 2407.01163 (2024); "
        "any block, any loss, division by beta: our reading"
    )
    restrictions: ClassVar[str] = (
        "A step costs T forward and T backward passes. In deep networks little of the energy reaches the first blocks "
        "in few steps. Batch norm inside the blocks couples the samples' states."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centred and self.variant == "fixed_prediction":
            raise LayerwiseError(
                "predictive_coding with fixed predictions is linear in beta, so centred=True changes nothing; leave it "
                "out, or choose variant='strict'."
            )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch, repeated for each phase; the message is the states that the blocks are to reach."""
        if not ctx.training:
            return ctx.x, None
        predicted = outputs_of_blocks(ctx)
        if self.variant == "fixed_prediction":
            return ctx.x, {"errors": self._errors_at(ctx, predicted)}
        steps = 1 if self.variant == "incremental" else self.steps
        phases = [self._settled(ctx, predicted, predicted[0], steps, beta) for beta in self._betas()]
        outputs = ctx.run(len(predicted), predicted[-1], None)
        message = phases_message(phases, outputs)
        return in_phases(message, ctx.x), message

    def rounds(self) -> int:
        """Updates with one batch: one per step of inference if it is incremental."""
        return self.steps if self.variant == "incremental" else 1

    def again(self, ctx: BatchContext, message: Any) -> tuple[Tensor, Any]:
        """One more step of inference, with the weights as they are now."""
        bottom, betas = ctx.run(0, ctx.x, None), self._betas()
        of_phases = zip(*(state.chunk(len(betas)) for state in message["states"]), strict=True)
        phases = [
            self._settled(ctx, list(states), bottom, 1, beta) for states, beta in zip(of_phases, betas, strict=True)
        ]
        message = phases_message(phases, message["outputs"])
        return in_phases(message, ctx.x), message

    def _betas(self) -> tuple[float, ...]:
        """The weight of the loss in every phase."""
        return (self.beta, -self.beta) if self.centred else (self.beta,)

    def _errors_at(self, ctx: BatchContext, predicted: list[Tensor]) -> list[Tensor]:
        """The cotangents of the blocks' outputs with fixed predictions."""
        _, pull = through_head(ctx, predicted[-1])
        backs = [ctx.linearize(index, h, None)[1] for index, h in enumerate(predicted[:-1], 1)]
        errors = [torch.zeros_like(h) for h in predicted]
        for _ in range(self.steps):
            targets = [*(back(error) for back, error in zip(backs, errors[1:], strict=True)), pull]
            errors = [error + self.rate * (target - error) for error, target in zip(errors, targets, strict=True)]
        return errors

    def _settled(
        self, ctx: BatchContext, states: list[Tensor], bottom: Tensor, steps: int, beta: float
    ) -> list[Tensor]:
        """The states after some steps of inference; `bottom` is the first block's output, whose input is fixed."""
        for _ in range(steps):
            _, pull = through_head(ctx, states[-1])
            slope = len(ctx.x) * beta * pull  # of a sample's energy
            moved = []
            for index in range(len(states) - 1, 0, -1):  # the graph of one block at a time, from the last one down
                prediction, back = ctx.linearize(index, states[index - 1], None)
                error = states[index] - prediction
                moved.append(states[index] - self.rate * (error + slope))
                slope = -back(error)
            moved.append(states[0] - self.rate * (states[0] - bottom + slope))
            states = moved[::-1]
        return states

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block on every phase by itself."""
        return run_by_phase(block, h, 1 if message is None or "errors" in message else phases_of(message, len(h)))

    def signal(self, ctx: BlockContext) -> Signal:
        """The error of the block's prediction at its settled input; passes on the settled state."""
        if ctx.message is None or "errors" in ctx.message:
            if ctx.site.is_head:
                return loss_at_head(ctx)
            cotangent = None if ctx.message is None else ctx.message["errors"][ctx.site.index].to(ctx.h.dtype)
            return Signal(cotangent=cotangent, message=ctx.message)
        if ctx.site.is_head:
            return loss_of_phases(ctx)
        state = ctx.message["states"][ctx.site.index]
        error = ctx.h.detach() - state.to(ctx.h.dtype)
        return Signal(cotangent=signs(ctx) / self.beta * error, output=state, message=ctx.message)
