"""SOLO: isolated modules of a language model, read through blocks of their own and the network's output matrix."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from layerwise.core.chunked import LinearOutputs
from layerwise.core.ranges import NonNegativeInt, PositiveInt
from layerwise.core.rule import BlockContext, Locality, Signal, Site, loss_at_head, loss_of
from layerwise.core.tasks import Task
from layerwise.rules.auglocal import Copies
from layerwise.rules.local_ce import GreedyLinear
from layerwise.rules.readout import Pooling, Readout, ReadoutKind, grouped, outputs_of, pool_vectors


class SoloHead(nn.Module):
    """Blocks of the network's own kind, a norm, and a matrix that is read with a learned scale.

    Args:
        rule: its options.
        site: whose output is read.
        h: a sample of the output.
        task: knows the number of outputs K.
    """

    def __init__(self, rule: "SOLO", site: Site, h: Tensor, task: Task):
        super().__init__()
        copied = [min(site.index + 1 + i, site.blocks - 1) for i in range(rule.depth)]
        self.copies = Copies(site, copied, h) if copied else None
        out = site.standard(h) if self.copies is None else h.new_empty(2, *self.copies.shape)
        self.pool: Pooling = rule.pool
        width = pool_vectors(out, rule.pool, task.positions != "sample").shape[-1]
        self.readout = rule.own_readout(width, site, task, h, bias=False)
        # The other readouts have a norm of their own.
        self.norm = nn.Identity() if isinstance(self.readout, Readout) else nn.RMSNorm(width, eps=1e-6)
        self.scale = nn.Parameter(torch.ones(1)) if rule.scale == "learned" else None
        self.to(h.device, h.dtype)

    def outputs(self, h: Tensor, site: Site, per_position: bool) -> LinearOutputs:
        """Outputs `(..., K)` for the output `h` of a site, not computed yet."""
        out = site.standard(h) if self.copies is None else self.copies.run(h)
        features = self.norm(pool_vectors(out, self.pool, per_position))
        found = outputs_of(self.readout, features, site)
        return found if self.scale is None else replace(found, features=self.scale * found.features)


@dataclass(frozen=True)
class SOLO(GreedyLinear):
    r"""SOLO: every module is read through a few blocks of the network's own kind and the network's output matrix.

    For module k of K, with the output matrix W as the previous step has left it:

    $$u_k = \mathrm{RMSNorm}_k(\mathrm{Blocks}_k(h_k)), \qquad z_k = \tau_k\, \mathrm{sg}(W)\, u_k, \qquad
      L_k = \mathrm{CE}(z_k, y), \qquad h_k = f_k(\mathrm{stopgrad}(h_{k-1}))$$

    $\mathrm{Blocks}_k$ are `depth` copies of the blocks that follow, with weights of their own, thrown away after the
    training; $\tau_k$ is one learned number that starts at 1. The last module learns through the network's head, and
    only its loss moves W. All losses have the weight 1. Prediction is the plain network. With `head="separate"`, which
    is ours, the last module is read as the others are and W learns by itself, so that the activations of a module are
    never in memory together with the gradient of W.

    A module is `group` neighbouring blocks: K = 2 of 24 blocks is `group=12`. With `depth=0` and `readout="private"`
    the rule is `local_ce`, bit for bit.

    The objective, the heads, the scale and the refresh are the paper's. Ours: no bias, the start of the scale, what a
    copy starts from (`reset_parameters`), pooled features if there is one label per sample, and copies of the last
    block where too few follow.

    >>> SOLO(group=3).groups(blocks=6)
    [range(0, 3), range(3, 7)]
    """

    depth: NonNegativeInt = 2
    """Blocks H in the head of a module; 0 for none."""
    readout: ReadoutKind = "shared"
    """Whose matrix reads the head: the network's output layer's | its own (private) | one fixed random one for all
    modules | its own, of a low rank."""
    refresh: PositiveInt = 1
    """Steps between two refreshes of the output matrix; with more than 1 a copy of it is kept. In a pipeline the matrix
    is sent this often."""
    scale: Literal["learned", "1"] = "learned"
    """The factor of the logits: learned, starting at 1, or 1."""
    head: Literal["joint", "separate"] = "joint"
    """What trains the last module: the network's head (joint), or a head like the others' (separate)."""

    name: ClassVar[str] = "solo"
    locality: ClassVar[Locality] = "broadcast"
    boundary: ClassVar[str] = "detached activation; the output matrix, read by every module"
    reads_logits: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = (
        *("classification", "soft_labels", "language_model", "regression", "multilabel", "loss"),
    )
    only: ClassVar[str] = "the copies of later blocks give one vector per sample or token, not one per pixel"
    source: ClassVar[str] = (
        "Yin, Wang, Pan & Li, arXiv 2609.35440 (2026), as others report it; start of the scale, no bias, copies near "
        "the end: our reading"
    )
    restrictions: ClassVar[str] = (
        "Blocks must be chains of modules that can draw new weights (reset_parameters), and the head must end with a "
        "linear layer. The heads cost up to `depth` blocks for each module. If the vocabulary is smaller than the "
        "width, a shared matrix is not expected to beat a private one."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readout != "shared":
            object.__setattr__(self, "locality", "local")
            object.__setattr__(self, "boundary", "detached activation")
        if self.depth == 0:
            object.__setattr__(self, "runs_once", True)

    def groups(self, blocks: int) -> list[range]:
        """The modules; the network's head joins the last one, or is its own group."""
        return grouped(blocks, self.group, join_head=self.head != "separate")

    def _has_head(self, site: Site) -> bool:
        """Whether a module ends here, except at the network's head."""
        return any(module.stop == site.index + 1 for module in self.groups(site.blocks)) and not site.is_head

    def matrix_refresh(self) -> int | None:
        """`refresh`, if the heads read the network's matrix."""
        return self.refresh if self.readout == "shared" else None

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The head of every module that does not learn through the network's."""
        if not self._has_head(site):
            return None
        plain = self.depth == 0 and self.readout == "private"
        return super().auxiliary(site, h, task) if plain else SoloHead(self, site, h, task)

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The outputs of the module's head."""
        if not isinstance(auxiliary, SoloHead):
            return super().outputs_at(site, h, auxiliary, task)
        return task.as_outputs(auxiliary.outputs(h, site, task.positions != "sample").whole())

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss after the module's head, or of the network's at the end."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        if not isinstance(ctx.auxiliary, SoloHead):
            return super().signal(ctx)
        outputs = ctx.auxiliary.outputs(ctx.h, ctx.site, ctx.task.per_position(ctx.y))
        left = outputs if ctx.task.positions == "token" else ctx.task.as_outputs(outputs.whole())
        return loss_of(ctx.task, left, ctx.y)
