"""Inference learning: predictive coding whose weights take a proximal step, with a rate of 1 (IL-prox)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from layerwise.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, loss_at_head, metrics_of
from layerwise.core.tasks import Classification
from layerwise.errors import LayerwiseError
from layerwise.rules.settling import WHOLE_BATCH, outputs_of_blocks


@dataclass(frozen=True)
class InferenceLearning(Rule):
    r"""Inference learning: states settle towards a target near the prediction, and weights move all the way to them.

    The states $h_l$ start from a forward pass, whose logits are $p$. With $n = \mathrm{mean} \lVert h_L
    \rVert^2 + 1 + \varepsilon$ the output's target is a mixture of prediction and label,

    $$t = \frac{\mathrm{softmax}(p) + n \alpha\, y}{1 + n \alpha}, \qquad
      \epsilon_{out} = t - \mathrm{softmax}(p(h_L)), \qquad \epsilon_l = h_l - f_l(h_{l-1})$$

    which is an implicit (proximal) gradient step of size $\alpha$ on the cross-entropy. T times, all states at once,

    $$h_l \leftarrow h_l - \gamma_{top}\, \epsilon_l + \gamma_{bottom}\, J_{l+1}^\top \epsilon_{l+1}$$

    Then every block takes the step that brings a linear layer to its state, up to $\varepsilon$: with learning rate 1

    $$\Delta W_l = \mathrm{mean}(\epsilon_l\, h_{l-1}^\top) \;/\;
      \big(\mathrm{mean} \lVert h_{l-1} \rVert^2 + 1 + \varepsilon\big)$$

    Use it with plain gradient descent and a rate of 1; $\alpha$ says how far the output goes.

    Target, inference and weights are those of the paper's code. Ours: a block with its activation is a layer; the mean,
    not the sum, over the batch in all norms; convolutions are normalised by the norm of their whole input.

    >>> InferenceLearning(alpha=10.0).groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    alpha: PositiveFloat = 5.0
    """Size of the implicit step at the output; 100 on images in colour."""
    steps: PositiveInt = 12
    """Steps of inference T."""
    bottom: PositiveFloat = 0.02
    """Rate of the error from above in a step of inference."""
    top: NonNegativeFloat = 0.015
    """Rate of the state's own error."""
    eps: PositiveFloat = 0.25
    """Damping of the weights' step."""

    name: ClassVar[str] = "inference_learning"
    locality: ClassVar[Locality] = "equilibrium"
    boundary: ClassVar[str] = "settled state, and in every step of inference the error of the block after it, both ways"
    flat_memory: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    whole_batch: ClassVar[str] = WHOLE_BATCH
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels")
    only: ClassVar[str] = "the output's target is a mixture of class probabilities, one for every sample"
    source: ClassVar[str] = (
        "Alonso et al., arXiv 2206.00164 (2022), and its code; blocks of any kind, convolutions: our reading"
    )
    restrictions: ClassVar[str] = (
        "Meant for plain gradient descent with a rate of 1 and fully connected layers; a step costs T forward and T "
        "backward passes."
    )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message is the states that the blocks are to reach, and the output's target."""
        if not ctx.training:
            return ctx.x, None
        if isinstance(ctx.task, Classification) and ctx.task.weights is not None:
            raise LayerwiseError(
                "inference_learning mixes probabilities into targets, where weights of classes have no place; leave "
                "weights out of the task, or choose a rule such as predictive_coding."
            )
        last = len(ctx.network.blocks)
        states = outputs_of_blocks(ctx)
        bottom, outputs = states[0], ctx.run(last, states[-1], None)
        weight = self._norm(states[-1]) * self.alpha
        target = (outputs.softmax(-1) + weight * ctx.task.distribution(ctx.y).to(outputs)) / (1 + weight)
        for _ in range(self.steps):
            logits, back = ctx.linearize(last, states[-1], None)
            pull = back(target - logits.softmax(-1))
            moved = []
            for index in range(last - 1, 0, -1):
                prediction, back = ctx.linearize(index, states[index - 1], None)
                error = states[index] - prediction
                moved.append(states[index] - self.top * error + self.bottom * pull)
                pull = back(error)
            moved.append(states[0] - self.top * (states[0] - bottom) + self.bottom * pull)
            states = moved[::-1]
        return ctx.x, {"states": states, "target": target, "outputs": outputs}

    def _norm(self, h: Tensor) -> Tensor:
        """The mean squared norm of a sample's activation, and of the one that a bias sees."""
        return h.float().flatten(1).square().sum(1).mean() + 1 + self.eps

    def signal(self, ctx: BlockContext) -> Signal:
        """The error at the settled states over the norm of the block's input; passes on the settled state."""
        if ctx.message is None:
            return loss_at_head(ctx) if ctx.site.is_head else Signal()
        scale = len(ctx.h) * self._norm(ctx.h_in)
        if not ctx.site.is_head:
            state = ctx.message["states"][ctx.site.index]
            return Signal(cotangent=(ctx.h.detach() - state) / scale, output=state, message=ctx.message)
        outputs = ctx.message["outputs"]
        loss = ctx.task.loss(outputs, ctx.y)
        metrics, statistics = metrics_of(ctx.task, outputs, ctx.y, loss)
        cotangent = (ctx.h.detach().softmax(-1) - ctx.message["target"]) / scale
        return Signal(cotangent=cotangent.to(ctx.h.dtype), metrics={"loss": loss, **metrics}, statistics=statistics)
