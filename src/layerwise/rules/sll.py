"""SLL: Stochastic Layer-wise Learning."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core import functional
from layerwise.core.chunked import Aligned, LinearOutputs
from layerwise.core.functional import wide, without_autocast
from layerwise.core.pieces import ReadsOut, ReadsOutputMatrix
from layerwise.core.posteriors import divergence
from layerwise.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ProperFraction
from layerwise.core.rule import (
    ANY_TASK,
    BlockContext,
    Locality,
    Rule,
    Signal,
    Site,
    by_depth,
    loss_at_head,
)
from layerwise.core.tasks import LanguageModel, Task
from layerwise.errors import LayerwiseError
from layerwise.rules.patches import ReadsPatches
from layerwise.rules.readout import (
    Pooling,
    Readout,
    features_of,
    fixed_matrix,
    grouped,
    labels_at,
    output_matrix,
    pool_vectors,
    readout_width,
    resized,
    says_shared,
)
from layerwise.rules.windows import says_interlocking


class Projection(nn.Module):
    r"""Fixed random readout of a block: $v = s\, R\, (m \odot \mathrm{norm}(\mathrm{pool}(h)))$.

    Args:
        width: number of features D after pooling.
        dim: rows d0 of R.
        classes: number of classes K, or of the task's outputs.
        dtype: of R; float32 unless activations are wider.
        options: the rule, for scale, normalisation, dropout, distribution of R, kind of target.
        readout: replaces R if the matrix is not the block's own.

    Shapes: `(..., D)` to `(..., d0)`; `class_logits` maps `(..., d0)` to `(..., K)`.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        classes: int,
        options: "SLL",
        dtype: torch.dtype = torch.float32,
        readout: Readout | None = None,
    ):
        super().__init__()
        self.readout = readout
        matrix = torch.randn(dim, width) / width**0.5 if readout is None else torch.ones(0)
        if options.projection == "orthonormal" and readout is None:
            # Rows have the same mean square length as those of the Gaussian matrix: 1.
            wide = torch.linalg.qr(torch.randn(max(dim, width), min(dim, width)))[0]
            matrix = wide.T if dim <= width else wide * (dim / width) ** 0.5
        self.register_buffer("matrix", (matrix * options.scale).to(dtype))
        code = torch.randn(classes, dim) / dim**0.5 if options.targets == "codebook" else None
        self.register_buffer("code", None if code is None else code.to(dtype))
        self.classes, self.norm, self.dropout, self.scale = classes, options.norm, options.dropout, options.scale

    matrix: Tensor
    code: Tensor | None

    def forward(self, features: Tensor, site: Site | None = None) -> Tensor:
        """Logits of the auxiliary posterior, in float32 or wider, at the site `site`."""
        if self.readout is not None and site is not None:
            outputs = self.outputs(features, site)
            with without_autocast(features):
                return outputs.whole()
        features = self.normalised(features)
        with without_autocast(features):
            return F.linear(features, self.matrix)

    def outputs(self, features: Tensor, site: Site) -> LinearOutputs:
        """The logits, not computed yet, for a matrix that is not the block's own."""
        assert self.readout is not None
        with without_autocast(features):
            found = self.readout.outputs(self.normalised(features), site)
        return LinearOutputs(self.scale * found.features, found.weight.to(found.features.dtype))

    def normalised(self, features: Tensor) -> Tensor:
        """The projection's input: normalised features, with dropout in training."""
        features = functional.normalise(features.to(self.matrix.dtype), self.norm)
        return F.dropout(features, self.dropout, self.training) if self.dropout else features

    def class_logits(self, v: Tensor) -> Tensor:
        """Outputs of the task: the first K entries, or the products with the codebook."""
        if self.code is None and v.shape[-1] == self.classes:
            return v
        return v[..., : self.classes] if self.code is None else F.linear(v, self.code)


@dataclass(frozen=True)
class SLL(ReadsPatches, ReadsOut, ReadsOutputMatrix, Rule):
    r"""Stochastic Layer-wise Learning: every block maximises its own ELBO-like objective.

    For block i with output $h_i = f_i(\mathrm{stopgrad}(h_{i-1}))$, pooled to a vector:

    $$v_i = s\,R_i\,(m_i \odot \mathrm{norm}(\mathrm{pool}(h_i))), \qquad q_i = \mathrm{softmax}(v_i)$$

    $$L_i = -w_i \log q_i[y] + \lambda_i\, D(\mathrm{stopgrad}(q_{i-1}), q_i), \qquad
      D(p, q) = -\log \sum_k \sqrt{p_k q_k}$$

    $R_i \in \mathbb{R}^{d_0 \times d_i}$ is random and never trained, its entries are $N(0, 1/d_i)$; $m_i$ is
    Bernoulli(1-p)/(1-p) in training. The first block has no second term. The head minimises the cross-entropy of
    its logits; the last block learns from that too (`head="joint"`: $q_L$ is the network's own output, aligned with
    $q_{L-1}$ where $d_0 = K$) or has a projection of its own (`head="separate"`).

    A single small convolution is stiff under a fixed projection. Three options give it room: `pool="moments"` reads
    the standard deviation over space as well as the mean, `group` lets neighbouring blocks share one objective, and
    `overlap=1` moves every readout one block further, and each trains all groups that see it: gradients cross one
    boundary, two blocks are alive at a time, and the rule is interlocking, no longer local.

    Other tasks are ours. The projection has one row per output of the task, and its posterior is: for `Regression`, D
    Gaussians $N(\mu, \sigma^2)$ around the first D coordinates, whose variance is read off the other D with
    `loss="gaussian"`, and is that of which the loss is the likelihood otherwise; for `MultiLabel`, K Bernoulli
    distributions; for `Segmentation`, a categorical per pixel of the block. The likelihood is the task's loss, D the
    divergence per target or label, averaged over them as the loss is,

    $$-\log BC = \frac{(\mu_1 - \mu_2)^2}{4 (\sigma_1^2 + \sigma_2^2)} + \frac12 \log \frac{\sigma_1^2 + \sigma_2^2}
      {2 \sigma_1 \sigma_2}, \qquad -\log BC = -\log\big(\sqrt{p q} + \sqrt{(1 - p)(1 - q)}\big)$$

    and a neighbour's posterior of another resolution is averaged over the pixels of each cell.

    What is the paper's and what is ours: the two terms, their equal weight, the fixed projection and the optional
    dropout on it are stated by the paper; scale and normalisation of the projection, the softmax, the pooling, the
    neighbour (the previous block), the treatment of the head, groups and overlap are our reading. The Bhattacharyya
    term makes the objective a surrogate, not a lower bound of the evidence; no claim about mutual information is made
    here.

    >>> SLL(surrogate="one_minus_bc", weight=0.5).groups(blocks=2)
    [range(0, 1), range(1, 3)]
    """

    surrogate: Literal["neg_log_bc", "one_minus_bc", "hellinger", "kl", "none"] = "neg_log_bc"
    """Divergence D between the posteriors of neighbouring blocks."""
    weight: NonNegativeFloat | tuple[NonNegativeFloat, ...] = 1.0
    """Weight lambda of the divergence; several numbers are a piecewise linear function of depth."""
    likelihood_weight: NonNegativeFloat | tuple[NonNegativeFloat, ...] = 1.0
    """Weight w of the likelihood term, likewise."""
    neighbour: Literal["previous", "before_previous"] = "previous"
    """Which block's posterior the divergence compares with."""
    dim: PositiveInt | None = None
    """Rows d0 of the projection (default: the number of classes)."""
    targets: Literal["index", "codebook"] = "index"
    """The classes are the first K coordinates, or a fixed random code with K rows."""
    projection: Literal["gaussian", "orthonormal"] = "gaussian"
    """Distribution of R; both have rows of mean square length 1."""
    scale: PositiveFloat = 1.0
    """Scale s of the projection (an inverse temperature)."""
    norm: Literal["layer", "rms", "none"] = "layer"
    """Normalisation before the projection, without parameters."""
    dropout: ProperFraction = 0.0
    """Probability p of the multiplicative dropout on the projection's input."""
    pool: Pooling = "auto"
    """How a block's output becomes a vector: auto | mean | moments (and standard deviation) | grid | cls | flatten
    | none."""
    group: PositiveInt = 1
    """Neighbouring blocks that share one objective, one graph and one backward pass."""
    overlap: NonNegativeInt = 0
    """Later blocks between a group and its readout; with 1, gradients cross one boundary (interlocking)."""
    own: bool = False
    """With an overlap: whether the first groups, at whose output no window ends, also have a readout there."""
    head: Literal["joint", "separate"] = "joint"
    """What trains the last block: the head's cross-entropy (joint), or its own objective (separate)."""

    readout: Literal["private", "shared", "random"] = "private"
    """The projection: a random one for each block | the matrix of the network's output layer, read as it was at
    the start of the step | one random one for all blocks. With one matrix, a language model's outputs are computed in
    chunks: features are passed on instead of a number per token of the vocabulary."""

    name: ClassVar[str] = "sll"
    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation and projection (d0 numbers per sample)"
    flat_memory: ClassVar[bool] = True
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = tuple(kind for kind in ANY_TASK if kind != "loss")
    only: ClassVar[str] = "its objective compares distributions of the label, and a function of one's own has none"
    source: ClassVar[str] = (
        "Yin & Corradi, arXiv 2505.05181 v4 (2025); scale, normalisation, neighbour and head: our reading"
    )
    restrictions: ClassVar[str] = (
        "Needs a task with a distribution of the label; a custom loss function has none. Single small "
        "convolutions lose accuracy under a fixed projection; see the options pool, group and overlap."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readout not in ("private", "shared", "random"):
            raise LayerwiseError(
                f"{self.name} has no readout={self.readout!r}, as its projections are never trained; choose private, "
                "shared or random."
            )
        if self.readout != "private" and (self.dim, self.targets, self.projection) != (None, "index", "gaussian"):
            raise LayerwiseError(
                f'dim, targets and projection are about the random projection of a block, and readout="{self.readout}" '
                'has another one; leave them out, or use readout="private".'
            )
        says_shared(self)
        says_interlocking(self, self.overlap, self.own)
        if self.readout != "private" and type(self).signal is SLL.signal:
            object.__setattr__(self, "reads_logits", False)

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each, with a view of `overlap` more; the head joins the last block or is its own group."""
        return grouped(blocks, self.group, join_head=self.head != "separate", overlap=self.overlap)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """A fixed projection at the end of a group's view; the head is its own readout."""
        views = self.groups(site.blocks)
        window_ends = any(view.stop == site.index + 1 for view in views)
        group_ends = any(view.start == site.index + 1 < site.blocks for view in views)
        if site.is_head or not (window_ends or (self.own and group_ends)):
            return None
        dim = task.outputs if self.dim is None else self.dim
        if self.targets == "index" and dim < task.outputs:
            raise LayerwiseError(
                f"dim is {dim}, smaller than the {task.outputs} classes; use dim >= {task.outputs} or "
                'targets="codebook".'
            )
        if task.kind in ("regression", "multilabel") and (dim > task.outputs or self.targets == "codebook"):
            raise LayerwiseError(
                f'dim and targets="codebook" apply to classes, and {task.kind} has none; leave both out, so that the '
                f"projection has the task's {task.outputs} outputs."
            )
        width = readout_width(self.patched(site, h), self.pool, site, task)
        dtype = torch.promote_types(h.dtype, torch.float32)
        readout = None
        if self.readout != "private":
            readout = Readout(width, self.readout, site, task, h.to(dtype), norm=False, learns=False)
        return Projection(width, dim, task.outputs, self, dtype, readout)

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """The outputs of the fixed projection."""
        assert isinstance(auxiliary, Projection)
        v = auxiliary(pool_vectors(self.patched(site, h), self.pool, task.positions != "sample", site), site)
        return task.as_outputs(auxiliary.class_logits(self.averaged(v, len(h))))

    def signal(self, ctx: BlockContext) -> Signal:
        """Likelihood and alignment of the posterior at this site."""
        if ctx.site.is_head:
            if self.head == "joint" and ctx.outputs is not None:
                return self._in_chunks(ctx, ctx.outputs, 1.0)
            signal = loss_at_head(ctx)
            if self.head == "joint":
                self._align(signal, ctx, ctx.task.outputs_last(wide(ctx.h)), ctx.y)
            return signal
        if ctx.auxiliary is None:
            return Signal(message=ctx.message)
        assert isinstance(ctx.auxiliary, Projection)
        cut = self.in_patches(ctx)
        features = features_of(cut, self.pool)
        if self._leaves_outputs(ctx):
            outputs = ctx.auxiliary.outputs(features, ctx.site)
            with without_autocast(features):
                signal = self._in_chunks(ctx, outputs, by_depth(self.likelihood_weight, ctx.site))
            return replace(signal, message=self._passed(ctx, outputs.features))
        v = ctx.auxiliary(features, ctx.site)
        y, read = labels_at(cut, v), ctx.auxiliary.class_logits(v)
        signal = self.loss_of_head(ctx, ctx.task.as_outputs(read), y)
        # With the index targets the softmax runs over all d0 coordinates; the label is one of the first K.
        wider = self.targets == "index" and read is not v
        likelihood = ctx.task.loss(ctx.task.as_outputs(v), y) if wider else signal.loss
        assert likelihood is not None
        signal.loss = _times(by_depth(self.likelihood_weight, ctx.site), likelihood)
        v = self.averaged(v, len(ctx.h))
        signal.message = self._passed(ctx, v)
        self._align(signal, ctx, v, y if self.patches == 1 else ctx.y)
        return signal

    def _leaves_outputs(self, ctx: BlockContext) -> bool:
        """Whether the loss computes the outputs of a vocabulary in chunks: all sites read with one matrix."""
        return not self.reads_logits and isinstance(ctx.task, LanguageModel) and not ctx.y.is_floating_point()

    @property
    def _back(self) -> int:
        """How many readouts before this one the neighbour's is."""
        return {"previous": 1, "before_previous": 2}[self.neighbour]

    def _passed(self, ctx: BlockContext, v: Tensor) -> tuple[Tensor, ...]:
        """The message to the next site: as many readouts as later ones compare with, the latest last."""
        return (*(ctx.message or ()), v)[-self._back :]

    def _sent(self, ctx: BlockContext) -> Tensor | None:
        """The message of the neighbour."""
        sent = ctx.message or ()
        return None if self.surrogate == "none" or len(sent) < self._back else sent[-self._back].detach()

    def _in_chunks(self, ctx: BlockContext, outputs: LinearOutputs, likelihood_weight: float) -> Signal:
        """The signal of outputs that are not computed yet; the neighbour has sent the features of its own."""
        task, neighbour = ctx.task, None
        assert isinstance(task, LanguageModel)
        before = self._sent(ctx)
        if before is not None and before.shape[:-1] == outputs.features.shape[:-1]:
            weight = by_depth(self.weight, ctx.site)
            neighbour = Aligned(LinearOutputs(before, self._matrix(ctx, before)), self.surrogate, weight)
        predictions = outputs.features.shape[:-1].numel()
        chunk = task.chunk(predictions) or predictions
        loss, likelihood, apart, statistics = task.objective_in_chunks(
            outputs, ctx.y, chunk, likelihood_weight, neighbour
        )
        metrics = task.measures(statistics) | ({} if neighbour is None else {"divergence": apart})
        if ctx.site.is_head:  # the task's loss, as everywhere
            metrics = {"loss": likelihood, **metrics}
        return Signal(loss, message=ctx.message, metrics=metrics, statistics=statistics)

    def _matrix(self, ctx: BlockContext, features: Tensor) -> Tensor:
        """The one matrix that all sites read with, `(K, D)` for features `(..., D)`."""
        if self.readout == "shared":
            return output_matrix(ctx.site).to(features.dtype)
        return fixed_matrix(ctx.site.network, ctx.task.outputs, features.shape[-1], features)

    def _align(self, signal: Signal, ctx: BlockContext, v: Tensor, y: Tensor) -> None:
        """Add the divergence from the neighbour's posterior, if there is one over the same categories."""
        before, task = self._sent(ctx), ctx.task
        if before is None or signal.loss is None:
            return
        if self._leaves_outputs(ctx):
            before = LinearOutputs(before, self._matrix(ctx, before)).whole()
        if (before.dim(), before.shape[-1]) != (v.dim(), v.shape[-1]):
            return
        if task.positions != "pixel" and before.shape != v.shape:
            return
        p = resized(task.posterior(before), task, tuple(v.shape[1:-1]))
        distance = task.average(divergence(self.surrogate, p, task.posterior(v)), y)
        signal.loss = signal.loss + _times(by_depth(self.weight, ctx.site), distance)
        signal.metrics["divergence"] = distance


def _times(factor: float, loss: Tensor) -> Tensor:
    """The product; a factor of 1 adds nothing to the graph."""
    return loss if factor == 1 else factor * loss
