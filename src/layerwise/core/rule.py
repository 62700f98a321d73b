"""The contract of a learning rule: what it may read, and what it must return to the engine.

The engine runs one *group* of blocks at a time (most rules: one block) and owns the update order. A rule
only answers questions. It sees tensors and modules; it knows no optimizer, device, process or data set.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerwise.core.abstract import Abstract
from layerwise.core.blocks import Block, Partition
from layerwise.core.chunked import LinearOutputs
from layerwise.core.layout import from_standard, to_standard
from layerwise.core.pullback import Pullback
from layerwise.core.ranges import check_fields
from layerwise.core.tasks import KINDS, Task
from layerwise.errors import LayerwiseError

ANY_TASK = (*KINDS, "soft_labels")
"""`Rule.tasks` of a rule that needs only the task's loss on outputs of any width."""

Locality = Literal["local", "interlocking", "broadcast", "perturbation", "equilibrium", "global"]
LOCALITIES: dict[Locality, str] = {
    "local": "a block learns from its own loss only",
    "interlocking": "a block also learns from the losses of later blocks",
    "broadcast": "something from the output, or from later blocks, is sent to every block",
    "perturbation": "forward passes only",
    "equilibrium": "iterated local inference",
    "global": "gradients flow through the whole network",
}
"""What each locality means."""


@dataclass(frozen=True)
class Site:
    """A place where a rule acts: a block, or the head after the last block."""

    index: int
    """0 .. blocks-1 for a block, `blocks` for the head."""
    blocks: int
    """Number of blocks in the network, the head not counted."""
    name: str
    """Name of the block, `"head"` for the head."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of one sample's output at every site, this one and the head included."""
    inputs: tuple[int, ...] = ()
    """Shape of one sample of the network's input."""
    layouts: tuple[str | None, ...] = ()
    """Where batch, channels and positions are in the output of every site; None if that is unknown."""
    input_layout: str | None = None
    """Layout of the network's input; None if unknown."""
    network: Partition | None = field(default=None, compare=False, repr=False)
    """The blocks and the head, for a rule whose auxiliary modules are copies of blocks (`Block.redrawn`)."""

    @property
    def is_head(self) -> bool:
        """Whether this is the head."""
        return self.index == self.blocks

    @property
    def block(self) -> Block:
        """The block at this site, or the head."""
        assert self.network is not None
        return self.network.sites[self.index]

    @property
    def depth(self) -> float:
        """Relative depth: 0 at the first block, 1 at the last one and at the head."""
        return min(self.index, self.blocks - 1) / max(self.blocks - 1, 1)

    def layout(self, index: int | None = None) -> str | None:
        """The layout of this site's output, or of that of site `index`; None for a site that belongs to no network.

        Raises:
            LayerwiseError: it is not known.
        """
        if not self.layouts:
            return None
        index = self.index if index is None else index
        found = self.layouts[index]
        if found is None:
            name = self.name if index == self.index or self.network is None else self.network.blocks[index].name
            shape = f" of shape (B, {', '.join(map(str, self.shapes[index]))})" if self.shapes else ""
            letters = {1: "BC", 3: "BCHW", 4: "BCDHW"}.get(len(self.shapes[index]) if self.shapes else 2, "BCL")
            raise LayerwiseError(
                f"the layers of block {name!r} do not tell which dimension of its output{shape} holds the channels; "
                f"declare it, such as layout={{{name!r}: {letters!r}}} (B batch, C channels, other letters positions)."
            )
        if found[0] != "B":
            raise LayerwiseError(
                f"block {self.name!r} passes on the layout {found}, and rules need the batch first; cut where it "
                "is, or build the layers with batch_first=True."
            )
        return found

    def standard(self, h: Tensor) -> Tensor:
        """The site's output in the standard order: `(B, C)`, `(B, L, C)`, `(B, C, H, W)` or `(B, C, D, H, W)`.

        Raises:
            LayerwiseError: its layout is not known.
        """
        layout = self.layout()
        return h if layout is None else to_standard(h, layout)

    def restored(self, h: Tensor) -> Tensor:
        """The inverse of `standard`."""
        layout = self.layout()
        return h if layout is None else from_standard(h, layout)

    def standard_shape(self, index: int) -> tuple[int, ...]:
        """Shape of one sample of site `index`'s output in the standard order."""
        layout, shape = self.layout(index), self.shapes[index]
        return shape if layout is None else tuple(to_standard(torch.empty(1, *shape, device="cpu"), layout).shape[1:])


@dataclass(frozen=True)
class BatchContext:
    """What a rule can read before the first block runs."""

    x: Tensor
    """The batch, `(B, ...)`."""
    y: Tensor
    """Labels, as the task defines them: `(B,)`, `(B, T)` for a language model, `(B, H, W)` for segmentation, ..."""
    task: Task
    network: Partition
    """The blocks and the head, for a rule that iterates over them before the update."""
    auxiliary: Mapping[int, nn.Module]
    """The rule's modules by index of their site."""
    run: Callable[[int, Tensor, Any], Tensor]
    """Runs the block at a site once more: `run(index, h, message)` is its output, without gradient.

    Use this (or `forward`) for every pass that is not the step's own. Mode, precision and random draws
    are those that the block will have in this step, so with the same input the output has the same bits. Buffers, such
    as batch norm's running statistics, and the generators stay as they are.
    """
    forward: Callable[[Tensor], Tensor]
    """Runs the whole network in this way: logits `(B, ..., K)` for `(B, ...)`.

    This is how a global error is broadcast without keeping any activation: a second forward pass.
    """
    linearize: Callable[[int, Tensor, Any], tuple[Tensor, Pullback]]
    """Runs the block at a site as `run` does: `linearize(index, h, message)` is its output, and the map from cotangents
    on it to those on `h`.

    The graph covers this block alone and lives as long as the map. A cotangent crosses a boundary only if the rule
    passes it on.
    """
    training: bool = True
    """Whether an update follows; False in evaluation."""


@dataclass(frozen=True)
class BlockContext:
    """What a rule can read when a block has just run."""

    site: Site
    h: Tensor
    """The block's output `(B, ...)`, with its graph (logits at the head)."""
    h_in: Tensor
    """The block's input; without history when the block is the first of its group."""
    message: Any
    """Message of the site before: tensors, or nested tuples, lists and dicts of them."""
    y: Tensor
    task: Task
    auxiliary: nn.Module | None
    """The module that `Rule.auxiliary` made for this site."""
    training: bool
    learns: bool = False
    """Whether the site's group learns in this pass; False in evaluation, and where it rests (`TakesTurns`)."""
    view: range = range(0)
    """The sites that this pass runs as one graph: the group's own, then (in training) those that extend this graph."""
    outputs: LinearOutputs | None = None
    """The network's outputs at a head whose last layer has not run, for `loss_at_head`; `h` is then its input."""
    run: Callable[[Tensor, Any], Tensor] | None = None
    """Runs the block once more: `run(h, message)` is its output, without gradient, as `BatchContext.run` gives it.

    None if the context was not made by the engine.
    """


Scalar = Tensor | Callable[[], Tensor]
"""A scalar, or a function that computes it when it is read."""


@dataclass
class Signal:
    """A rule's result: the teaching signal of the block and the message to the next one.

    Give `loss` (a scalar; its gradient is the signal), or `cotangent` (the gradient with respect to the
    block's output, same shape as `BlockContext.h`), or both, or neither (the block does not learn here). A rule that
    computes gradients of parameters itself gives them in `gradients`, alone or in addition.
    """

    loss: Tensor | None = None
    cotangent: Tensor | None = None
    message: Any = None
    """Message to the next site; the engine detaches it at the end of a group."""
    output: Tensor | None = None
    """Input of the next block, if it is not the block's output (normalised, label attached, ...)."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Scalars on the device, read later; each is a mean over the batch. `"loss"` is the loss above unless given.

    Each is a `Scalar`. A function without arguments is called when somebody reads the metric. What it holds is kept
    until then, for every block: let that be a few numbers, or memory grows with depth.
    """
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Sums for metrics that are not means over the batch, see `Task.statistics`."""
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    """Gradients that the rule has computed itself, by parameter of the block or of the rule's module here.

    Each is a mean over the batch and is added to what the backward pass gives the parameter.
    """


@dataclass(frozen=True)
class Rule(Abstract):
    """Base class of the learning rules: a frozen dataclass whose fields are the rule's options.

    A subclass declares the class attributes below and overrides the methods that it needs; `signal` is the
    only one without a default. Draw random numbers with torch's ordinary functions: the engine
    reseeds the generators for every (seed, step, block).
    """

    name: ClassVar[str]
    """Name under which the rule is registered."""
    locality: ClassVar[Locality]
    """Where the teaching signal comes from; a test verifies it."""
    boundary: ClassVar[str]
    """What crosses a block boundary, in words."""
    flat_memory: ClassVar[bool]
    """Whether activations + gradients do not grow with the number of blocks; a test verifies it."""
    source: ClassVar[str]
    """Paper, year, and which parts are our own reading."""
    restrictions: ClassVar[str] = ""
    """What the rule cannot do, in one or two sentences."""
    tasks: ClassVar[tuple[str, ...]] = ("classification", "language_model")
    """Kinds of tasks that the rule supports, from `KINDS` and `"soft_labels"`, see `ANY_TASK`; a test verifies it."""
    only: ClassVar[str] = "its signal is defined for class numbers alone"
    """Why it does not support other tasks, as part of a sentence."""
    models: ClassVar[tuple[str, ...]] = ()
    """The models that the rule trains; empty for a rule that trains any network."""
    unlabelled: ClassVar[bool] = False
    """Whether a label may be -100, for a sample that counts in no loss and no accuracy; a test verifies it."""
    begins_with_batch: ClassVar[bool] = False
    """Whether `begin`, if it is overridden, reads only the batch, its random draws and the first site's module.

    In a pipeline, whose blocks live on several ranks, it then runs on the first one; other rules are refused.
    """
    runs_once: ClassVar[bool] = True
    """Whether the rule runs every block once per step and in order.

    A rule that runs a block (or a copy of one) again trains a model that is cut at its calls (`cut_at_calls`) only
    where that model is regular, so that its blocks can be run one by one.
    """
    whole_batch: ClassVar[str] = ""
    """Why the batch cannot be run in parts (`Learner(micro=n)`), such as "compares samples"; empty where it can.

    It can where losses are means over the samples and messages have one entry per sample.
    """
    builds_graph: ClassVar[bool] = True
    """Whether autograd builds a graph in training. Without one, a rule gives `Signal.gradients`, and a loss is only a
    metric.
    """
    reads_input: ClassVar[bool] = False
    """Whether `signal` reads the network's input, which then has to be one tensor."""
    predicts_at_head: ClassVar[bool] = False
    """Whether `signal` reports at the head the accuracy and loss of the rule's own prediction.

    Evaluation then takes one pass; otherwise prediction needs a separate pass.
    """

    reads_logits: ClassVar[bool] = True
    """Whether `signal` reads the network's logits itself. If it only gives `loss_at_head` at the head, False
    lets the loss of a large vocabulary be computed in chunks. Declared by the class that defines `signal`, or set on a
    rule whose options decide it.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def groups(self, blocks: int) -> list[range]:
        """Which neighbouring sites share one graph, one backward pass and one optimizer.

        Args:
            blocks: number of blocks L; the head is site L.

        Returns:
            Ranges of sites with rising starts that cover `0 .. L`. The default gives every site its own. Where a
            range reaches into the next one, its signals pass through the sites there (which learn in their own turn).
        """
        return [range(i, i + 1) for i in range(blocks + 1)]

    def trains(self, site: Site) -> bool:
        """Whether the site's parameters learn; a group in which none does runs without a graph."""
        return True

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The module that the rule adds at a site; `h` is a sample of the output, for its shape."""
        return None

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The first block's input and the first message."""
        return ctx.x, None

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block; override it if the forward pass itself differs (checkpointing, offloading).

        Args:
            block: what to run.
            h: its input.
            message: what the site before sent; None in `BatchContext.forward`.
        """
        return block(h)

    @abstractmethod
    def signal(self, ctx: BlockContext) -> Signal:
        """The teaching signal and the next message, when the block at `ctx.site` has run."""

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logits `(B, ..., K)` for `x`; the network's own output by default.

        A rule whose prediction adds something at every site inherits `PredictsBySite` instead of overriding this. A
        pipeline refuses a rule that overrides it, unless `predicts_at_head`.
        """
        return network(x)


def leaves_logits(rule: Rule) -> bool:
    """Whether the rule leaves the network's logits to the loss; a subclass with its own `signal` declares it again.

    >>> class Silent(Rule):
    ...     reads_logits = False
    ...     def signal(self, ctx): return loss_at_head(ctx)
    >>> class Louder(Silent):
    ...     def signal(self, ctx): return Signal(cotangent=ctx.h)
    >>> leaves_logits(Silent()), leaves_logits(Louder())
    (True, False)
    """
    defining = next(kind for kind in type(rule).__mro__ if "signal" in vars(kind))
    return (vars(rule) | vars(defining)).get("reads_logits") is False


def loss_of(task: Task, outputs: Tensor | LinearOutputs, y: Tensor) -> Signal:
    """A signal with the task's loss on a readout's outputs, and its metrics.

    Args:
        task: the task.
        outputs: as the task defines them, `(B, K)`, `(B, T, K)` or `(B, K, H, W)`; or those of a linear readout, not
            computed yet, so that the outputs of a large vocabulary are computed in chunks.
        y: labels at their resolution.
    """
    if isinstance(outputs, LinearOutputs):
        chunk = task.chunk(outputs.features.shape[:-1].numel())
        if chunk is not None and not y.is_floating_point():
            loss, statistics = task.loss_in_chunks(outputs, y, chunk)
            return Signal(loss=loss, metrics=task.measures(statistics), statistics=statistics)
        outputs = outputs.whole()
    loss = task.loss(outputs, y)
    metrics, statistics = metrics_of(task, outputs, y, loss.detach())
    return Signal(loss=loss, metrics=metrics, statistics=statistics)


def metrics_of(
    task: Task, outputs: Tensor, y: Tensor, loss: Tensor | None = None
) -> tuple[dict[str, Scalar], dict[str, Tensor]]:
    """The task's metrics of outputs, and the sums that they are computed from, if any; as in `loss_of`.

    Args:
        task: the task.
        outputs: as the task defines them.
        y: labels at their resolution.
        loss: the task's loss on them, if it is known.
    """
    outputs = outputs.detach()
    statistics = task.statistics(outputs, y) if loss is None else task.statistics_beside(outputs, y, loss)
    return {**(task.measures(statistics) if statistics else task.metrics_later(outputs, y))}, statistics


def loss_at_head(ctx: BlockContext) -> Signal:
    """The signal of a head: the task's loss on the network's output."""
    signal = loss_of(ctx.task, ctx.h if ctx.outputs is None else ctx.outputs, ctx.y)
    assert signal.loss is not None
    # Set here, so that the metric stays the task's loss even if a rule adds to the signal.
    return replace(signal, message=ctx.message, metrics={"loss": signal.loss, **signal.metrics})


cross_entropy_at_head = loss_at_head
"""The name of `loss_at_head` where the task is classification."""


def by_depth(value: float | tuple[float, ...], site: Site) -> float:
    """A number at a site's depth: the same everywhere, or a piecewise linear function of relative depth.

    Args:
        value: a number; or the values at equally spaced depths from the first block to the last.
        site: the place.

    >>> by_depth((0.0, 1.0), Site(index=1, blocks=3, name="b"))
    0.5
    """
    if isinstance(value, (int, float)):
        return float(value)
    if len(value) == 1:
        return float(value[0])
    place = site.depth * (len(value) - 1)
    left = min(int(place), len(value) - 2)
    return value[left] + (value[left + 1] - value[left]) * (place - left)
