"""Equilibrium propagation: states come to rest freely and nudged, and blocks learn from the difference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.phases import run_by_phase
from layerwise.core.pullback import Pullback, linearized
from layerwise.core.ranges import PositiveFloat, PositiveFraction, PositiveInt
from layerwise.core.rule import ANY_TASK, BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.settling import (
    WHOLE_BATCH,
    in_phases,
    loss_of_phases,
    phases_message,
    phases_of,
    signs,
    through_head,
)

Linearize = Callable[[int, Tensor], tuple[Tensor, Pullback]]
"""Output and pullback of a block at an input."""


@dataclass(frozen=True)
class EquilibriumPropagation(Rule):
    r"""Equilibrium propagation: the gradient is the difference of two states at rest, over the strength of a nudge.

    States $s_1, \dots, s_L$ of the blocks, $s_0 = x$, have the primitive function and the dynamics

    $$\Phi = \sum_l \langle s_l, f_l(s_{l-1}) \rangle, \qquad
      s_l \leftarrow (1 - r)\, s_l + r \min\!\big(1, \max\!\big(0, \tfrac{\partial \Phi}{\partial s_l}\big)\big), \qquad
      \frac{\partial \Phi}{\partial s_l} = f_l(s_{l-1}) + J_{l+1}(s_l)^\top s_{l+1}$$

    They begin at zero and come to rest freely, in `free` steps; from there $\Phi - \beta\, \ell(s_L, y)$, with the
    loss $\ell$ of the head, brings them to rest again, in `nudged` steps. Block l follows

    $$-\frac{1}{2\beta} \Big(\frac{\partial \Phi}{\partial \theta_l}(s^{\beta}) -
      \frac{\partial \Phi}{\partial \theta_l}(s^{-\beta})\Big)$$

    or, one-sided, $-\frac1\beta$ times the difference from the free state. Both tend to the gradient of
    $\ell(s_L^0, y)$ as $\beta$ goes to 0, the first with an error of order $\beta^2$. The head, which is outside of
    $\Phi$, follows its loss. Prediction lets the states come to rest, and reads the head.

    The primitive function, the two phases and the readout outside it are the papers'. Ours: $f_l$ is a block of any
    kind, its activation included; r; division by the mean over the batch.

    >>> EquilibriumPropagation(beta=0.1).groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    free: PositiveInt = 20
    """Steps of the free phase, and of prediction."""
    nudged: PositiveInt = 10
    """Steps of each nudged phase."""
    beta: PositiveFloat = 0.5
    """Strength of the nudge."""
    nudging: Literal["centred", "one_sided"] = "centred"
    """Two nudged states, with beta and with -beta: centred; one, against the free state: one_sided."""
    rate: PositiveFraction = 0.7
    """How far a state goes in one step, r; less damps oscillations."""

    name: ClassVar[str] = "equilibrium_propagation"
    locality: ClassVar[Locality] = "equilibrium"
    boundary: ClassVar[str] = "state at rest; in every step of a phase the states of both neighbours"
    flat_memory: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    models: ClassVar[tuple[str, ...]] = ("mlp",)
    whole_batch: ClassVar[str] = WHOLE_BATCH
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = (
        "Scellier & Bengio, Front. Comput. Neurosci. 11 (2017); centred, and loss outside the energy: Laborieux et "
        "al., Front. Neurosci. 15 (2021); blocks of any kind, damping: our reading"
    )
    restrictions: ClassVar[str] = (
        "A step costs free + 2 nudged forward and backward passes, and prediction free of them. States lie between 0 "
        "and 1; with skip connections they do not settle inside these bounds. Batch norm is refused. The blocks of "
        "your own networks must be layers."
    )

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """No module; checks the network.

        Raises:
            LayerwiseError: the network holds batch norm.
        """
        held = [] if site.network is None else site.network.model.named_modules()
        for name, module in held:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise LayerwiseError(
                    f"equilibrium_propagation lets the states of every sample come to rest, and {name!r} is batch "
                    "norm, which couples them; choose a network without it, such as --model mlp."
                )
        return None

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch in two phases; the message is the states at rest."""
        if not ctx.training:
            return ctx.x, None

        def linearize(index: int, h: Tensor) -> tuple[Tensor, Pullback]:
            return ctx.linearize(index, h, None)

        last = len(ctx.network.blocks)
        bottom = ctx.run(0, ctx.x, None)
        begin = _zeros(ctx.network, lambda index, h: ctx.run(index, h, None), bottom)
        free = self._at_rest(linearize, bottom, begin, self.free)
        outputs = ctx.run(last, free[-1], None)

        def nudged(beta: float) -> list[Tensor]:
            return self._at_rest(
                linearize, bottom, free, self.nudged, lambda top: -beta * len(top) * through_head(ctx, top)[1]
            )

        second = nudged(-self.beta) if self.nudging == "centred" else free
        message = phases_message([nudged(self.beta), second], outputs)
        return in_phases(message, ctx.x), message

    def _at_rest(
        self,
        linearize: Linearize,
        bottom: Tensor,
        states: Sequence[Tensor],
        steps: int,
        nudge: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """The states after some steps of the dynamics; each step moves all of them at once.

        Args:
            linearize: runs a block.
            bottom: output of the first block, whose input does not change.
            states: their values at the start.
            steps: number of steps.
            nudge: what is added to the slope at the last state.
        """
        states = list(states)
        for _ in range(steps):
            slopes = [bottom]
            for index in range(1, len(states)):
                out, back = linearize(index, states[index - 1])
                slopes[-1] = slopes[-1] + back(states[index])
                slopes.append(out)
            if nudge is not None:
                slopes[-1] = slopes[-1] + nudge(states[-1])
            states = [
                state + self.rate * (slope.clamp(0, 1) - state) for state, slope in zip(states, slopes, strict=True)
            ]
        return states

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block on each phase by itself."""
        return run_by_phase(block, h, phases_of(message, len(h)))

    def signal(self, ctx: BlockContext) -> Signal:
        """The slope of the primitive function in the two phases; passes on the states at rest."""
        if ctx.message is None:
            return loss_at_head(ctx) if ctx.site.is_head else Signal()
        if ctx.site.is_head:
            return loss_of_phases(ctx)
        state = ctx.message["states"][ctx.site.index]
        sides = 1 if self.nudging == "centred" else 2
        return Signal(cotangent=-sides / self.beta * signs(ctx) * state, output=state, message=ctx.message)

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Outputs `(B, ..., K)` of the head at the free states."""
        bottom = network.blocks[0](x)
        begin = _zeros(network, lambda index, h: network.blocks[index](h), bottom)
        states = self._at_rest(lambda index, h: linearized(network.blocks[index], h), bottom, begin, self.free)
        return network.head(states[-1])


def _zeros(network: Partition, run: Callable[[int, Tensor], Tensor], bottom: Tensor) -> list[Tensor]:
    """A state of zeros for every block, of the shape of its output."""
    shapes = [bottom]
    for index in range(1, len(network.blocks)):
        shapes.append(run(index, shapes[-1]))
    return [shape.new_zeros(shape.shape) for shape in shapes]
