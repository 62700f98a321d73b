"""Product feedback alignment: the error goes back through two matrices, of which one learns."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.ranges import PositiveInt
from layerwise.core.rule import ANY_TASK, BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.feedback import (
    LayerFeedback,
    alignment,
    fed_layers,
    feedback_by_layer,
    glorot,
    run_with_feedback,
)


@dataclass(frozen=True)
class ProductFeedbackAlignment(Rule):
    r"""PFA: the error of a layer goes back through a fixed matrix B and a learned one R, whose product aligns with W.

    For a layer $a = W h$ with n outputs, B is $n \times m$ and R is $m \times$ inputs, m = `expand` n:

    $$\delta_h = R^\top B^\top \delta_a, \qquad \nabla_W = \delta_a h^\top, \qquad
      \nabla_R = B^\top \delta_a h^\top = B^\top \nabla_W$$

    W and R learn with one rate $\eta$ and weight decay $\lambda$, so that under plain gradient descent
    $R_t - B^\top W_t = (1 - \eta\lambda)^t (R_0 - B^\top W_0)$: the feedback $B R$ becomes $B B^\top W$, which is W
    where $B B^\top = I$. No matrix is the transpose of another. A convolution's B mixes channels; its R is a kernel.

    >>> ProductFeedbackAlignment().groups(blocks=3)
    [range(0, 4)]
    """

    expand: PositiveInt = 2
    """Rows of R per output of a layer; more of them align a random B better."""
    basis: Literal["orthogonal", "normal"] = "orthogonal"
    """B with orthonormal rows, or of independent normal numbers with variance 1 / m."""

    name: ClassVar[str] = "product_feedback_alignment"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "activations forward; errors backward through two matrices per layer"
    flat_memory: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = "Li & Benna, arXiv 2405.20594 (2024); convolutions: our reading"
    restrictions: ClassVar[str] = (
        "Needs weight decay, and the same optimizer for W and R: plain gradient descent or momentum, because Adam "
        "scales the two differently. The learned feedback has expand times the weights of each layer. No grouped "
        "convolutions, and no padding other than zeros; weights of other layers have their true gradient."
    )

    def groups(self, blocks: int) -> list[range]:
        """One group: every block and the head."""
        return [range(blocks + 1)]

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """B and R of every layer."""
        return nn.ModuleList(self._feedback(site, layer) for layer in fed_layers(site))

    def _feedback(self, site: Site, layer: nn.Module) -> LayerFeedback:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if getattr(layer, "groups", 1) != 1:
            raise LayerwiseError(
                f"product_feedback_alignment mixes all channels of a layer, and block {site.name!r} holds a grouped "
                "convolution; choose feedback_alignment with mode='kolen_pollack'."
            )
        outputs, middle = weight.shape[0], self.expand * weight.shape[0]
        basis = torch.randn(outputs, middle, dtype=torch.float64)
        basis = torch.linalg.qr(basis.T)[0].T if self.basis == "orthogonal" else basis / middle**0.5
        drawn = glorot(weight) * torch.randn(middle, *weight.shape[1:], dtype=weight.dtype)
        return LayerFeedback(drawn, learns=True, mixing=basis.to(weight.dtype).contiguous())

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message is the layers' feedback."""
        return ctx.x, feedback_by_layer(ctx.network, ctx.auxiliary)

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block whose layers have feedback."""
        return run_with_feedback(block, h, message or {}, "pfa", "own")

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss at the head."""
        signal = loss_at_head(ctx) if ctx.site.is_head else Signal(message=ctx.message)
        signal.metrics |= alignment(ctx.message, ctx.auxiliary, "pfa")
        return signal
