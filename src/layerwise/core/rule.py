"""The contract of a learning rule: what it may look at, and what it must give to the engine.

The engine runs one *group* of blocks at a time (most rules: one block) and owns the update order. A rule
only answers questions. It sees tensors and modules; it knows no optimizer, device, process or data set.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.layout import from_standard, to_standard
from layerwise.core.tasks import Classification
from layerwise.errors import LayerwiseError, suggestion

Locality = Literal["local", "interlocking", "broadcast", "perturbation", "equilibrium", "global"]


@dataclass(frozen=True)
class Site:
    """A place where a rule acts: a block, or the head behind the last block."""

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
    """Where batch, channels and positions are in the output of every site; None where that is not known."""
    input_layout: str | None = None
    """The same of the network's input."""
    network: Partition | None = field(default=None, compare=False, repr=False)
    """The blocks and the head, for a rule whose auxiliary modules are built after them (`Block.redrawn`)."""

    @property
    def is_head(self) -> bool:
        """Whether this is the head."""
        return self.index == self.blocks

    @property
    def depth(self) -> float:
        """Relative depth: 0 at the first block, 1 at the last one and at the head."""
        return min(self.index, self.blocks - 1) / max(self.blocks - 1, 1)

    def layout(self, index: int | None = None) -> str | None:
        """The layout of this site's output, or of that of site `index`; None for a site on its own, of no network.

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
            raise LayerwiseError(
                f"the layers of block {name!r} do not tell which dimension of its output{shape} holds the channels; "
                f"declare it, such as layout={{{name!r}: 'BCL'}} (B batch, C channels, other letters positions)."
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
        return shape if layout is None else tuple(to_standard(torch.empty(1, *shape), layout).shape[1:])


@dataclass(frozen=True)
class BatchContext:
    """What a rule may look at before the first block runs."""

    x: Tensor
    """The batch, `(B, ...)`."""
    y: Tensor
    """Labels, `(B,)`, or `(B, T)` for a language model."""
    task: Classification
    network: Partition
    """The blocks and the head, for a rule that iterates over them before the update."""
    auxiliary: Mapping[int, nn.Module]
    """The rule's modules by index of their site."""
    forward: Callable[[Tensor], Tensor]
    """Runs the whole network without gradient, with this step's own random draws: logits `(B, ..., K)`.

    This is how a global error is broadcast without keeping any activation: a second forward pass.
    """


@dataclass(frozen=True)
class BlockContext:
    """What a rule may look at when a block has just run."""

    site: Site
    h: Tensor
    """The block's output `(B, ...)`, with its graph (logits at the head)."""
    h_in: Tensor
    """The block's input; without history when the block is the first of its group."""
    message: Any
    """What the site before sent: tensors, or nested tuples, lists and dicts of them."""
    y: Tensor
    task: Classification
    auxiliary: nn.Module | None
    """The module that `Rule.auxiliary` made for this site."""
    training: bool
    learns: bool = False
    """Whether the site's group learns in this pass; False in evaluation, and where it rests (`Rule.learns_at`)."""
    view: range = range(0)
    """The sites that this pass runs as one graph: the group's own, then (in training) those that lend it theirs."""


@dataclass
class Signal:
    """A rule's answer: the teaching signal of the block and what crosses to the next one.

    Give `loss` (a scalar; its gradient is the signal), or `cotangent` (the gradient with respect to the
    block's output, same shape as `BlockContext.h`), or both, or neither (the block does not learn here).
    """

    loss: Tensor | None = None
    cotangent: Tensor | None = None
    message: Any = None
    """Handed to the next site; the engine detaches it at the end of a group."""
    output: Tensor | None = None
    """Input of the next block, where it is not the block's output (normalised, label attached, ...)."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars on the device, read later; a mean over the batch each. `"loss"` is the loss above unless given."""


@dataclass(frozen=True)
class Rule:
    """Base class of the learning rules: a frozen dataclass whose fields are the rule's options.

    A subclass declares the class attributes below and overrides the methods that it needs; `signal` is the
    only one without a default. Draw random numbers with torch's ordinary functions: the engine starts the
    generators anew for every (seed, step, block).
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
    """Paper, year, and how far the code is the paper's statement."""
    restrictions: ClassVar[str] = ""
    """What the rule cannot do, in one or two sentences."""
    models: ClassVar[tuple[str, ...]] = ()
    """The models that the rule trains; empty for a rule that trains any network."""
    unlabelled: ClassVar[bool] = False
    """Whether a label may be -100, for a sample that counts in no loss and no accuracy; a test verifies it."""
    begins_with_batch: ClassVar[bool] = False
    """Whether `begin`, where it is overridden, looks at nothing but the batch, its draws and the first site's module.

    In a pipeline, whose blocks live on several ranks, it then runs on the first one; other rules are refused.
    """
    predicts_at_head: ClassVar[bool] = False
    """Whether what `signal` tells of the head is the accuracy and loss of the rule's own prediction.

    Evaluation then takes one pass; otherwise prediction has a pass of its own.
    """

    def groups(self, blocks: int) -> list[range]:
        """Which neighbouring sites share one graph, one backward pass and one optimizer.

        Args:
            blocks: number of blocks L; the head is site L.

        Returns:
            Ranges of sites with rising starts that cover `0 .. L`. The default gives every site its own. Where a
            range reaches into the next one, its signals pass through the sites there (which learn in their own turn).
        """
        return [range(i, i + 1) for i in range(blocks + 1)]

    def groups_at(self, update: int, blocks: int) -> list[range]:
        """The groups of one update: those of `groups`, or neighbours of them joined.

        Where they are joined, one backward pass goes through all their blocks, and their optimizers step one after the
        other. Evaluation keeps to `groups`.

        Args:
            update: number of the update, from 0; with `accumulate` batches for each.
            blocks: number of blocks L.
        """
        return self.groups(blocks)

    def trains(self, site: Site) -> bool:
        """Whether the site's parameters learn; a group in which none does runs without a graph."""
        return True

    def learns_at(self, update: int, site: Site) -> bool:
        """Whether the group that begins at the site learns in one update; one that rests runs without a graph.

        Blocks that are trained one after the other take turns in this way.

        Args:
            update: number of the update, from 0; with `accumulate` batches for each.
            site: the first site of a group, as `groups` has them.
        """
        return True

    def has_trunk(self) -> bool:
        """Whether the first group is a trunk: a part that learns last, from what the groups behind it send back.

        The trunk's graph is kept while they learn, one after the other, each with a graph of its own.
        """
        return False

    def to_trunk(self, site: Site, gradient: Tensor, task: Classification) -> Tensor | None:
        """What a group sends back to the trunk; nothing for None. The engine sums it over the groups.

        Args:
            site: the group's first site.
            gradient: of the group's loss on its input `(B, ...)`.
            task: the task.

        Returns:
            A share of the gradient on the trunk's output, of its shape.
        """
        return gradient

    def auxiliary(self, site: Site, h: Tensor, task: Classification) -> nn.Module | None:
        """The module that the rule adds at a site; `h` is a sample of the output, for its shape."""
        return None

    def prepare(self, network: Partition, x: Tensor, y: Tensor) -> None:
        """Look at training data once, before the first step, and set tensors of the network; nothing by default.

        Args:
            network: the blocks and the head.
            x: samples `(N, ...)`: a few thousand in a run, the first batch in a loop of one's own.
            y: their labels.
        """

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The first block's input and the first message."""
        return ctx.x, None

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block; overridden where the forward pass itself differs (checkpointing, offloading).

        Args:
            block: what to run.
            h: its input.
            message: what the site before sent; None in `BatchContext.forward`.
        """
        return block(h)

    def signal(self, ctx: BlockContext) -> Signal:
        """The teaching signal and the next message, when the block at `ctx.site` has run."""
        raise NotImplementedError

    def ask(self, x: Tensor, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Input of the first block and first message of a forward pass of prediction; `begin` without labels.

        Args:
            x: inputs `(B, ...)`.
            auxiliary: the rule's module at the first site.
        """
        return x, None

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """What a site makes of its block's output in a forward pass of prediction, such as adding to a vote.

        It sees one site at a time, so that a pipeline predicts as well, site by site.

        Args:
            site: the place.
            h: the block's output; the network's logits at the head.
            message: what the site before, or `ask`, has sent.
            auxiliary: the rule's module here.

        Returns:
            Input of the next block (the rule's logits `(B, ..., K)` at the head), and the next message.
        """
        return h, message

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logits `(B, ..., K)` for `x`: a forward pass with `ask` and `answer`; without these, the plain network's.

        A rule that predicts from all sites at once overrides this. A pipeline then refuses it, unless
        `predicts_at_head`.
        """
        h, message = self.ask(x, auxiliary.get(0))
        for index, block in enumerate([*network.blocks, network.head]):
            site = Site(index, len(network.blocks), block.name, layouts=network.layouts)
            h, message = self.answer(site, block(h), message, auxiliary.get(index))
        return h

    def predicts_plainly(self) -> bool:
        """Whether the prediction is the network's plain output."""
        return all(getattr(type(self), name) is getattr(Rule, name) for name in ("ask", "answer", "predict"))

    def beliefs(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Iterator[Tensor]:
        """Log-probabilities `(B, ..., K)` that cross from site to site, the first message included, as they arise.

        Raises:
            LayerwiseError: the rule passes on no beliefs.
        """
        raise LayerwiseError(f"rule {self.name!r} passes on no beliefs; those that do are 'sid' and 'sid_cascade'.")


def check_words(rule: Rule) -> None:
    """Raise LayerwiseError where an option is none of the words that its field lists.

    The learner asks this of every rule, so that no rule has to.
    """
    for option in fields(rule):
        value, words = getattr(rule, option.name), get_args(option.type)
        if get_origin(option.type) is Literal and value not in words:
            legal = suggestion(str(value), [str(word) for word in words])
            raise LayerwiseError(f"{rule.name}'s option {option.name} is {value!r}; {legal}.")


def cross_entropy_at_head(ctx: BlockContext) -> Signal:
    """The signal of a head: the task's loss on its logits."""
    loss = ctx.task.loss(ctx.h, ctx.y)
    # Named here, so that it stays the task's loss where a rule adds to the signal.
    metrics = {"loss": loss, "accuracy": ctx.task.accuracy(ctx.h, ctx.y)}
    return Signal(loss=loss, message=ctx.message, metrics=metrics)


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
