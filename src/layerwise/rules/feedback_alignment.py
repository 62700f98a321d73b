"""Feedback alignment: the error goes back through matrices that are not the transposed weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.pullback import output_error
from layerwise.core.ranges import PositiveFloat, ProperFraction
from layerwise.core.rule import ANY_TASK, BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Classification, Task
from layerwise.rules.feedback import (
    Derivative,
    LayerFeedback,
    alignment,
    fed_layers,
    feedback_by_layer,
    glorot,
    has_standard_order,
    matrix_shape,
    projected,
    run_with_feedback,
)

CHAINED = ("fa", "usf", "brsf", "frsf", "kolen_pollack")
"""Modes in which the error goes back layer by layer."""
LEARNED = ("dkp", "ebd")
"""Modes whose direct matrices learn."""


class DirectFeedback(nn.Module):
    """A matrix from the K outputs to a block's output: fixed, a parameter, or a running correlation."""

    def __init__(self, matrix: Tensor, mode: str):
        super().__init__()
        if mode == "dkp":
            self.matrix = nn.Parameter(matrix)
        else:
            self.register_buffer("running_matrix" if mode == "ebd" else "matrix", matrix)

    def current(self) -> Tensor:
        """The matrix as it is now `(K, ...)`."""
        found = self.running_matrix if "running_matrix" in self._buffers else self.matrix
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class FeedbackAlignment(Rule):
    r"""Feedback alignment: matrices other than the transposed weights send the error to the layers.

    Direct modes send the error at the outputs $e = \partial L / \partial z_L$ straight to every block; inside a block
    gradients are its own:

    $$\frac{\partial L}{\partial h_i} \leftarrow B_i^\top e \;(\mathrm{dfa}), \quad B_i^\top \mathrm{sign}(e)
      \;(\mathrm{sdfa}), \quad -B_i^\top y \;(\mathrm{drtp})$$

    Chained modes go back layer by layer with a kernel B instead of the layer's own:

    $$\delta_{l} = (B_{l+1}^\top \delta_{l+1}) \odot f'(a_l), \qquad
      \nabla_{W_l} = \delta_l h_{l-1}^\top$$

    B is random and fixed (`fa`), has the signs of W with equal sizes (`usf`) or with random sizes that are fixed
    (`frsf`) or drawn for every batch (`brsf`), or learns with the gradient of W (`kolen_pollack`), so that $B - W$
    decays as $(1 - \eta\lambda)^t$ with weight decay $\lambda$. Two direct modes learn their matrices: `dkp` from
    $\nabla_{B_i} = e h_i^\top$, the gradient of a layer that led from the block straight to the outputs; `ebd` moves
    $B_i$ from a random start to the running correlation of e and $h_i$, so that the blocks reduce that correlation.

    The output layer always has its true gradient. `drtp` needs only the label, so it is local.

    >>> FeedbackAlignment().locality, FeedbackAlignment(mode="drtp").locality, FeedbackAlignment(mode="fa").locality
    ('broadcast', 'local', 'global')
    """

    mode: Literal["fa", "dfa", "sdfa", "drtp", "usf", "brsf", "frsf", "kolen_pollack", "dkp", "ebd"] = "dfa"
    """Which matrices: dfa | sdfa | drtp | dkp | ebd (direct), fa | usf | brsf | frsf | kolen_pollack (chained)."""
    scale: PositiveFloat = 1.0
    """Factor of the error that the direct modes send."""
    derivative: Derivative = "own"
    """Function used as the derivative of activations: own | one | step | tanh | cos (augmented DFA)."""
    memory: ProperFraction = 0.9999
    """Share of the matrix that `ebd` keeps in each step; blocks fall silent if it forgets its initial value early."""

    name: ClassVar[str] = "feedback_alignment"
    locality: ClassVar[Locality] = "broadcast"
    boundary: ClassVar[str] = "detached activation; the error at the outputs (K numbers per sample), sent to all"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    only: ClassVar[str] = "its mode drtp projects classes"
    unlabelled: ClassVar[bool] = True
    runs_once: ClassVar[bool] = False
    source: ClassVar[str] = (
        "Lillicrap et al. (2016): fa; Nøkland, arXiv 1609.01596 (2016): dfa; Frenkel et al., arXiv 1909.01311 (2019): "
        "sdfa, drtp; Liao et al., arXiv 1510.05067 (2015): sign symmetry; Akrout et al., arXiv 1904.05391 (2019): "
        "kolen_pollack; Nakajima et al., Nat. Commun. (2022): derivative; Erdogan et al., arXiv 2504.11558 (2025): "
        "ebd; dkp as a layer to the outputs: our reading"
    )
    restrictions: ClassVar[str] = (
        "Direct modes run a second forward pass (drtp none), and need outputs per sample, or the same positions "
        "everywhere. Chained modes keep all activations; feedback replaces nn.Linear and convolutions that are called "
        "as modules, with no padding other than zeros. Convolutions and layers narrower than K align badly."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode in CHAINED:
            self._declare(
                locality="global",
                flat_memory=False,
                runs_once=True,
                boundary="activations forward; errors backward through feedback matrices",
            )
        elif self.mode == "drtp":
            self._declare(
                locality="local",
                tasks=("classification", "language_model"),
                boundary="detached activation",
                runs_once=True,
                begins_with_batch=True,
            )
        elif self.mode == "ebd":
            self._declare(whole_batch="keeps one correlation per batch")

    def _declare(self, **facts: Any) -> None:
        """Set the facts of a mode that differ from those of the class."""
        for fact, value in facts.items():
            object.__setattr__(self, fact, value)

    def groups(self, blocks: int) -> list[range]:
        """One group if the error goes back layer by layer, otherwise a group per block."""
        return [range(blocks + 1)] if self.mode in CHAINED else super().groups(blocks)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """Feedback of the layers, or the matrix from the outputs to the block's output."""
        if self.mode in CHAINED:
            return nn.ModuleList(self._feedback(layer.weight) for layer in fed_layers(site))
        if site.is_head:
            return None
        shape = matrix_shape(site, h, task, task.positions != "sample")
        matrix = self.scale * torch.randn(shape, dtype=h.dtype) / h[0].numel() ** 0.5
        return DirectFeedback(matrix, self.mode)

    def _feedback(self, weight: Any) -> LayerFeedback:
        drawn = self.mode in ("fa", "frsf", "kolen_pollack")
        matrix = glorot(weight) * torch.randn(weight.shape, dtype=weight.dtype) if drawn else None
        return LayerFeedback(matrix, learns=self.mode == "kolen_pollack")

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message is the error at the outputs of a first pass, or the layers' feedback."""
        if self.mode in CHAINED:
            return ctx.x, feedback_by_layer(ctx.network, ctx.auxiliary)
        if self.mode == "drtp":
            return ctx.x, None
        error = output_error(ctx.task, ctx.forward(ctx.x), ctx.y)
        # The error of one prediction: each part of the batch divides by its own number of predictions.
        return ctx.x, error * ctx.task.counted(ctx.y, True)

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block; in chained modes its layers have feedback."""
        feedback: Mapping[nn.Module, nn.Module] = message if self.mode in CHAINED and message is not None else {}
        return run_with_feedback(block, h, feedback, self.mode, self.derivative)

    def signal(self, ctx: BlockContext) -> Signal:
        """The projected error; the head has its true gradient."""
        if self.mode in CHAINED:
            signal = loss_at_head(ctx) if ctx.site.is_head else Signal(message=ctx.message)
            signal.metrics |= alignment(ctx.message, ctx.auxiliary, self.mode)
            return signal
        if ctx.site.is_head:
            return loss_at_head(ctx)
        if self.mode == "drtp":
            assert isinstance(ctx.task, Classification)
            error = -ctx.task.target_shares(ctx.y)
        else:
            error = ctx.message / ctx.task.counted(ctx.y, True)
        assert isinstance(ctx.auxiliary, DirectFeedback)
        signal = Signal(message=ctx.message)
        if self.mode in LEARNED and ctx.learns:
            self._learn(ctx, error, signal)
        sent = error.sign() / ctx.task.counted(ctx.y, True) if self.mode == "sdfa" else error
        signal.cotangent = projected(sent, ctx.auxiliary.current().detach(), ctx.h, ctx.site, ctx.task)
        return signal

    @torch.no_grad()
    def _learn(self, ctx: BlockContext, error: Tensor, signal: Signal) -> None:
        """Update the block's matrix in a step."""
        feedback, h = ctx.auxiliary, ctx.h.detach()
        h = ctx.site.standard(h) if has_standard_order(ctx.site) else h
        assert isinstance(feedback, DirectFeedback)
        matrix = feedback.current()
        if ctx.task.positions == "pixel":
            h = F.interpolate(h.float(), error.shape[2:]).movedim(1, -1)
        rows = ctx.task.outputs_last(error).reshape(-1, ctx.task.outputs)
        found = (rows.T @ h.to(rows.dtype).reshape(len(rows), -1)).reshape(matrix.shape).to(matrix.dtype)
        if self.mode == "dkp":
            signal.gradients = {matrix: found}
        else:
            matrix.lerp_(found, 1 - self.memory)
