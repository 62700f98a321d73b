"""SID: Synergistic Information Distillation, on any network and on the cascade of its paper."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.functional import kl_divergence
from layerwise.core.pieces import HasTrunk, PassesBeliefs
from layerwise.core.posteriors import Categorical, Posterior
from layerwise.core.ranges import NonNegativeInt, PositiveFraction, PositiveInt
from layerwise.core.rule import ANY_TASK, BlockContext, Locality, Rule, Signal, Site, by_depth, loss_of, metrics_of
from layerwise.core.tasks import Classification, Task
from layerwise.errors import LayerwiseError
from layerwise.rules.readout import HasReadout, Pooling, Readout, grouped, labels_at, pool_vectors, resized

Direction = Literal["forward", "reverse"]
OF_CLASSES = ("classification", "language_model", "segmentation")


def divergences(
    log_p: Tensor, log_before: Tensor, target: Tensor, direction: Direction, negentropy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The two divergences of SID's objective: of a belief and the target, of a belief and the one before.

    `forward`: $KL(y \| p)$ and $KL(p_{before} \| p)$. `reverse`: $KL(p \| y)$ and $KL(p \| p_{before})$; infinite
    where y is 0.

    Args:
        log_p: log-probabilities of the belief, `(..., K)`.
        log_before: of the belief before, `(..., K)`.
        target: probabilities, `(..., K)`.
        direction: of the divergences.
        negentropy: y log y of the target, `(..., K)`, if it is known.

    Returns:
        Two tensors `(...)`, in nats.

    >>> half, target = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0])
    >>> [round(float(d), 4) for d in divergences(half, half, target, "forward")]  # ln 2 and 0
    [0.6931, 0.0]
    """
    if direction == "forward":
        negentropy = torch.xlogy(target, target) if negentropy is None else negentropy
        return (negentropy - target * log_p).sum(-1), kl_divergence(log_before, log_p)
    return kl_divergence(log_p, target.log()), kl_divergence(log_p, log_before)


def uniform_belief(like: Tensor, classes: int) -> Tensor:
    """Log of the uniform belief, `(..., K)` for `like` `(..., D)`; float32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_full((*like.shape[:-1], classes), -math.log(classes), dtype=dtype)


def first_belief(like: Tensor, task: Task) -> Tensor:
    """The belief before any block, as it is passed on, `(..., K)` for `like` `(..., D)`; float32 or wider.

    Uniform over classes, one half for every label, or a Gaussian around zero for every target.
    """
    if task.kind in OF_CLASSES:
        return uniform_belief(like, task.outputs)
    return torch.zeros_like(uniform_belief(like, task.outputs))


def believed(task: Task, passed: Tensor) -> Posterior:
    """A belief from the message: log-probabilities `(..., K)` of classes, otherwise the task's outputs."""
    return Categorical(passed) if task.kind in OF_CLASSES else task.posterior(passed)


def moved(task: Task, passed: Tensor, like: Tensor) -> Tensor:
    """The belief in a message, at the resolution of `like` `(B, ..., D)` if there is one per pixel."""
    if task.positions != "pixel":
        return passed
    return resized(believed(task, passed), task, tuple(like.shape[1:-1])).passed


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of logits, in float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@dataclass(frozen=True)
class Distillation(PassesBeliefs, Rule):
    """Base of `sid` and `sid_cascade`: the objective of a belief."""

    direction: Direction = "forward"
    """Direction of both KL divergences; reverse needs label smoothing."""
    alpha: PositiveFraction | tuple[PositiveFraction, ...] = 0.5
    """Weight of the target; several numbers are a piecewise linear function of depth (as many as beliefs: a list)."""

    @abstractmethod
    def place(self, site: Site) -> Site | None:
        """Number of the site's belief among those of the network; None if the site has none."""

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """No module; refuses tasks that the objective does not support."""
        if self.direction == "reverse" and not isinstance(task, Classification):
            raise LayerwiseError(
                f'{self.name} with direction="reverse" needs a target without zeros, and {task.kind} has none; use '
                'direction="forward".'
            )
        if self.direction == "reverse" and getattr(task, "label_smoothing", 0.0) == 0:
            raise LayerwiseError(
                f'{self.name} with direction="reverse" needs a target without zeros; set label_smoothing to more than '
                '0 (--label-smoothing 0.1), or use direction="forward".'
            )
        return None

    def _belief(self, ctx: BlockContext, outputs: Tensor) -> Posterior:
        """The belief of outputs `(..., K)`."""
        return ctx.task.posterior(outputs)

    def distil(self, ctx: BlockContext, outputs: Tensor, before: Tensor) -> Signal:
        """The objective of the belief of outputs `(..., K)`, given the message with the belief before."""
        place = self.place(ctx.site)
        assert place is not None
        task, alpha, y = ctx.task, by_depth(self.alpha, place), labels_at(ctx, outputs)
        belief, before = self._belief(ctx, outputs), before.detach()
        label, consistency = self._divergences(task, belief, before, y)
        each = alpha * label + (1 - alpha) * consistency
        passed = task.as_outputs(belief.passed)
        metrics, statistics = metrics_of(task, passed, y)
        signal = Signal(loss=task.average(each, y), message=belief.passed, statistics=statistics)
        signal.metrics = {
            **metrics,
            "label_kl": task.average(label.detach(), y),
            "consistency": task.average(consistency.detach(), y),
        }
        if ctx.site.is_head:
            signal.metrics["loss"] = task.loss(passed, ctx.y)  # which must have the resolution of the outputs
        if not ctx.training:  # too slow for training
            unmoved, _ = self._divergences(task, believed(task, before), before, y)
            signal.metrics["entropy"] = task.average(belief.entropy(), y)
            signal.metrics["descent"] = task.average((each <= alpha * unmoved).to(each.dtype), y)
        return signal

    def _divergences(self, task: Task, belief: Any, before: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of a belief and the labels, and of the belief before and it; per prediction, or per target or label of it."""
        if isinstance(task, Classification):
            target, negentropy = task.target(y, belief.log_p.dtype)
            return divergences(belief.log_p, before, target, self.direction, negentropy)
        return task.surprise(belief.passed, y), believed(task, before).kl(belief)


class BeliefHead(nn.Module):
    """Maps belief and features to the outputs of the next belief: a linear layer on `concat(p, v)`, or two with ReLU.

    p are probabilities; under regression, means, and log variances if the task has them.

    Shapes: a belief as it is passed on `(..., K)` and features `(..., D)` to `(..., K)`.
    """

    def __init__(self, classes: int, width: int, hidden: int, dtype: torch.dtype, task: Task | None = None):
        super().__init__()
        self.task = task or Classification(classes)
        out = nn.Linear(hidden or classes + width, classes, dtype=dtype)
        self.layers = nn.Sequential(nn.Linear(classes + width, hidden, dtype=dtype), nn.ReLU(), out) if hidden else out

    def forward(self, before: Tensor, features: Tensor) -> Tensor:
        """Outputs of the next belief."""
        return self.layers(torch.cat([believed(self.task, before).features.to(features.dtype), features], dim=-1))


class BeliefToLogits(nn.Module):
    """Adds V p to the network's outputs; V is K x K and starts at zero."""

    def __init__(self, task: Task, dtype: torch.dtype):
        super().__init__()
        self.task = task
        self.weight = nn.Parameter(torch.zeros(task.outputs, task.outputs, dtype=dtype))

    def forward(self, before: Tensor, outputs: Tensor) -> Tensor:
        """Outputs of the last belief, `(..., K)`."""
        return outputs + nn.functional.linear(believed(self.task, before).features.to(self.weight.dtype), self.weight)


class BeliefReadout(nn.Module):
    """Outputs of the next belief, computed with a shared matrix and a learned share of the belief.

    Args:
        readout: from features to outputs; none at the head, whose features are the network's outputs.
    """

    def __init__(self, readout: Readout | None, task: Task, dtype: torch.dtype):
        super().__init__()
        self.task, self.readout = task, readout
        self.share = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, before: Tensor, features: Tensor, site: Site) -> Tensor:
        """Outputs of the belief after one that is passed on as `before`."""
        outputs = features if self.readout is None else self.readout.outputs(features, site).whole()
        return outputs + self.share * before


@dataclass(frozen=True)
class SID(HasReadout, Distillation):
    r"""Synergistic Information Distillation on any network: every block refines the belief of the block before.

    For block i with output $h_i = f_i(\mathrm{stopgrad}(h_{i-1}))$, pooled to a vector, and $p_0$ uniform:

    $$p_i = \mathrm{softmax}(g_i(\mathrm{concat}(p_{i-1}, \mathrm{pool}(h_i)))), \qquad
      p_L = \mathrm{softmax}(W_{out} h_L + V p_{L-1})$$

    $$L_i = \alpha_i\, KL(y \| p_i) + (1 - \alpha_i)\, KL(\mathrm{stopgrad}(p_{i-1}) \| p_i)$$

    with a learned belief head $g_i$ (one linear layer; two with `hidden`). With `direction="reverse"` both
    divergences have $p_i$ first. The last block has no belief head: it learns through the network's own head, whose
    logits get the belief before as well. $V$ starts at 0. Prediction is the whole stack of beliefs, not the plain
    network.

    K x K weights of the belief before are too many for a vocabulary. With a `readout` other than `private` the logits
    are $M u_i + s_i \log p_{i-1}$, and $W_{out} h_L + s_L \log p_{L-1}$ at the head: $u_i$ are the normalised
    features, M is the matrix that the readout names, and the learned number $s_i$ starts at 0. This is ours.

    Other tasks are ours. The belief of `Regression` is a Gaussian per target: means, and log variances with
    `loss="gaussian"`; that of `MultiLabel` a Bernoulli distribution per label, that of `Segmentation` a categorical
    per pixel, averaged over each cell if the next block has fewer. The divergence from the label is the task's
    loss, the other the closed form of two such distributions, averaged over targets or labels as the loss is. The
    belief before any block is one half, or a Gaussian around zero.

    The objective is the paper's. Our reading: features of an ordinary network replace its shared extractor, which makes
    the rule block-local; the form of the belief heads, and of the head. The gradient of $L_i$ on
    the logits is $p_i - (\alpha_i y + (1 - \alpha_i) p_{i-1})$ in the forward direction.

    >>> SID(group=2).groups(blocks=3)
    [range(0, 2), range(2, 4)]
    """

    hidden: NonNegativeInt = 0
    """Units of the belief heads' hidden layer; 0 for a linear belief head."""
    pool: Pooling = "auto"
    """How a block's output becomes a vector: auto | mean | moments (and standard deviation) | grid | cls | flatten
    | none."""
    group: PositiveInt = 1
    """Neighbouring blocks that share one belief, one graph and one backward pass."""

    name: ClassVar[str] = "sid"
    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation and belief (K numbers per sample)"
    flat_memory: ClassVar[bool] = True
    unlabelled: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Ye & Tang, arXiv 2510.03273 (2025), for the objective; belief heads on an ordinary network: our reading"
    )
    predicts_at_head: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = tuple(kind for kind in ANY_TASK if kind != "loss")
    only: ClassVar[str] = "it refines a distribution of the label, and a function of one's own has none"
    restrictions: ClassVar[str] = (
        "Needs a task with a distribution of the label; a custom loss function has none. "
        'Classes per position need pool="none", or the task LanguageModel. direction="reverse" needs label smoothing.'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden and self.readout != "private":
            raise LayerwiseError(
                f'hidden is about the belief heads of readout="private", and readout="{self.readout}" has a matrix in '
                "their place; leave it out."
            )

    def groups(self, blocks: int) -> list[range]:
        """`group` blocks each; the head belongs to the last group."""
        return grouped(blocks, self.group, join_head=True)

    def place(self, site: Site) -> Site | None:
        """One belief per group, after its last block, or the head."""
        count = len(self.groups(site.blocks))
        if site.is_head:
            return Site(count - 1, count, site.name)
        if (site.index + 1) % self.group or site.index + 1 >= site.blocks:
            return None
        return Site(site.index // self.group, count, site.name)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """A belief head for every group but the last, whose belief is the network's own head's."""
        super().auxiliary(site, h, task)
        if self.place(site) is None:
            return None
        width = self._vectors(h, site, task).shape[-1]
        if self.readout != "private":
            readout = None if site.is_head else Readout(width, self.readout, site, task, h, self.rank)
            return BeliefReadout(readout, task, h.dtype)
        if site.is_head:
            return BeliefToLogits(task, h.dtype)
        return BeliefHead(task.outputs, width, self.hidden, h.dtype, task)

    def _outputs(self, auxiliary: nn.Module, before: Tensor, features: Tensor, site: Site) -> Tensor:
        where = (site,) if isinstance(auxiliary, BeliefReadout) else ()
        return auxiliary(before, features, *where)

    def _vectors(self, h: Tensor, site: Site, task: Task) -> Tensor:
        if site.is_head:
            return task.outputs_last(h)
        return pool_vectors(h, self.pool, task.positions != "sample", site)

    def signal(self, ctx: BlockContext) -> Signal:
        """The objective of the group's belief."""
        if ctx.auxiliary is None:
            return Signal(message=ctx.message)
        if ctx.task.positions == "sample" and ctx.task.per_position(ctx.y) and self.pool != "none":
            raise LayerwiseError('sid reads a belief per sample, and there is a label per position; set pool="none".')
        features = self._vectors(ctx.h, ctx.site, ctx.task)
        before = ctx.message if ctx.message is not None else first_belief(features, ctx.task)
        before = moved(ctx.task, before, features)
        return self.distil(ctx, self._outputs(ctx.auxiliary, before, features, ctx.site), before)

    def beliefs(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Iterator[Tensor]:
        """The belief before any block, then one per group: log-probabilities `(B, ..., K)`, outputs without classes."""
        belief, task = None, cast(BeliefToLogits, auxiliary[len(network.blocks)]).task
        for index, block in enumerate(network.sites):
            x = block(x)
            if index not in auxiliary:
                continue
            site = Site(index, len(network.blocks), block.name, layouts=network.layouts, network=network)
            features = self._vectors(x, site, task)
            if belief is None:
                belief = first_belief(features, task)
                yield belief
            outputs = self._outputs(auxiliary[index], moved(task, belief, features), features, site)
            belief = task.posterior(outputs).passed
            yield belief

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """The last belief, as log-probabilities `(B, ..., K)`, or as the outputs of a task without classes."""
        *_, last = self.beliefs(network, auxiliary, x)
        return cast(BeliefToLogits, auxiliary[len(network.blocks)]).task.as_outputs(last)


EXTRACTOR = 2
"""Blocks of the model `sid_cascade` that hold its extractor."""


@dataclass(frozen=True)
class SIDCascade(HasTrunk, Distillation):
    r"""Synergistic Information Distillation as in its paper: modules refine a belief, given the same features.

    With features $z = c(x)$ of a shared extractor and $p_0$ uniform, module i computes
    $p_i = f_i(\mathrm{stopgrad}(p_{i-1}), z)$ and minimises

    $$L_i = \alpha_i\, KL(y \| p_i) + (1 - \alpha_i)\, KL(\mathrm{stopgrad}(p_{i-1}) \| p_i)$$

    over its own parameters; with `direction="reverse"` both divergences have $p_i$ first. The paper's first phase,
    which computes all beliefs without gradient, is not run: a module's belief is passed on before the module is
    updated, so what the next one gets is what that phase would have given it.

    What trains the extractor is the option `extractor`. `sum`: the sum of all modules' gradients on z, as in the
    authors' code; `mean` and `last` weight them otherwise. In these three the extractor is an ordinary network under
    backpropagation, whose loss is that of the modules; only the modules are isolated from one another. They run one
    after the other, each with a graph of its own, and their gradients add up on z before the extractor's one backward
    pass: the gradients are those of one backward pass of the summed losses, and the memory does not grow with the
    number of modules. `local`: each half of the extractor has a learned linear head and learns only from that; modules
    get a detached z, and nothing crosses any boundary backwards.

    It trains the model `sid_cascade`. The belief is the head's output, so prediction is the plain cascade.

    >>> SIDCascade().groups(blocks=3)
    [range(0, 2), range(2, 3), range(3, 4)]
    >>> SIDCascade(extractor="local").groups(blocks=3)
    [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    """

    extractor: Literal["sum", "mean", "last", "local"] = "sum"
    """What trains the extractor: the sum or mean of all modules' gradients, the last one's, or heads of its own."""

    name: ClassVar[str] = "sid_cascade"
    models: ClassVar[tuple[str, ...]] = ("sid_cascade",)
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels")
    only: ClassVar[str] = "its model passes on the probabilities of classes"
    locality: ClassVar[Locality] = "interlocking"
    boundary: ClassVar[str] = (
        "detached features and belief (K numbers per sample); the gradient on the features, back to the extractor"
    )
    flat_memory: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Ye & Tang, arXiv 2510.03273 (2025) and the authors' published code; one pass instead of two phases, and "
        'extractor="mean", "last", "local": ours'
    )
    restrictions: ClassVar[str] = (
        "Trains the model sid_cascade only. Its extractor learns by backpropagation from all modules, unless "
        'extractor="local". direction="reverse" needs label smoothing.'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extractor == "local":  # what the class declares holds for the others
            object.__setattr__(self, "locality", "local")
            object.__setattr__(self, "boundary", "detached features and belief (K numbers per sample)")

    def groups(self, blocks: int) -> list[range]:
        """Every module is a group; the extractor is one group, or two if it learns from its own heads."""
        end = 0 if self.extractor == "local" else min(EXTRACTOR, blocks)
        trunk = [range(end)] if end else []
        return trunk + [range(i, i + 1) for i in range(end, blocks + 1)]

    def has_trunk(self) -> bool:
        """The extractor learns last, unless it has heads of its own."""
        return self.extractor != "local"

    def to_trunk(self, site: Site, gradient: Tensor, task: Task) -> Tensor | None:
        """The gradient on the features, weighted; none on the belief."""
        if self.extractor == "last" and not site.is_head:
            return None
        place = self.place(site)
        assert place is not None
        sent_back = gradient / place.blocks if self.extractor == "mean" else gradient
        sent_back[:, : task.classes] = 0
        return sent_back

    def place(self, site: Site) -> Site | None:
        """One belief per module; the head is the last one."""
        if site.index < EXTRACTOR:
            return None
        return Site(site.index - EXTRACTOR, site.blocks - EXTRACTOR + 1, site.name)

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """A linear head for each half of an extractor that learns locally."""
        super().auxiliary(site, h, task)
        if site.index < EXTRACTOR and site.name != f"extractor{site.index + 1}":
            raise LayerwiseError(
                "rule 'sid_cascade' trains the model 'sid_cascade', cut as it comes (--model sid_cascade, no --cuts or "
                "--blocks); for any other network use rule 'sid'."
            )
        if self.place(site) is not None or self.extractor != "local":
            return None
        return nn.Linear(self._features(site, h, task).shape[-1], task.classes, dtype=h.dtype)

    def _features(self, site: Site, h: Tensor, task: Task) -> Tensor:
        """A vector from the output of the extractor's half: the mean over space, or the features of the state."""
        return h[:, task.classes :] if h.dim() == 2 else pool_vectors(h, "mean", False, site)

    def signal(self, ctx: BlockContext) -> Signal:
        """The objective of the module's belief; in the extractor, the cross-entropy of its own head if it has one."""
        if self.place(ctx.site) is not None:
            log_before = ctx.h_in[:, : ctx.task.classes]
            return self.distil(ctx, ctx.h if ctx.site.is_head else ctx.h[:, : ctx.task.classes], log_before)
        if ctx.auxiliary is None:
            return Signal()
        logits = ctx.auxiliary(self._features(ctx.site, ctx.h, ctx.task))
        return loss_of(ctx.task, logits, ctx.y)

    def _belief(self, ctx: BlockContext, outputs: Tensor) -> Posterior:
        """The belief of the head's logits; a module's state holds log-probabilities already."""
        return super()._belief(ctx, outputs) if ctx.site.is_head else believed(ctx.task, outputs)

    def beliefs(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Iterator[Tensor]:
        """The uniform belief, then one per module: log-probabilities `(B, K)`."""
        classes = len(network.head.parameters()[-1])  # the bias of the last layer
        for index, block in enumerate(network.blocks):
            x = block(x)
            if index >= EXTRACTOR - 1:
                yield x[:, :classes]
        yield log_softmax(network.head(x))
