"""ForwardGNN: the layers of a graph network learn one by one, from nodes that represent the classes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.functional import goodness, wide
from layerwise.core.graphs import Graph, extended, graph_of, wired
from layerwise.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site
from layerwise.core.tasks import UNLABELLED
from layerwise.errors import LayerwiseError
from layerwise.rules.label_input import wrong_labels


def outputs(run: Callable[[int, Tensor], Tensor], blocks: int, h: Tensor) -> Iterator[Tensor]:
    """Outputs of all blocks, each of which gets the one before at unit length; `run` runs the block of an index."""
    for index in range(blocks):
        out = run(index, h)
        yield out
        h = F.normalize(out, dim=1)


@dataclass(frozen=True)
class GraphForward(Rule):
    r"""ForwardGNN: node classification by layers that learn on their own; a batch is all nodes of a graph.

    **Single forward** (`variant="single"`). The graph gets one more node per class, linked to the nodes whose label is
    known. With $h_{iv}$ the output of layer i at node v, of unit length where it is passed on, and $h_{ik}$ that at the
    node of class k:

    $$h_i = f_i\big(\mathrm{stopgrad}(h_{i-1} / \lVert h_{i-1} \rVert)\big), \qquad
      L_i = \mathrm{CE}\big((h_{iv}^\top h_{ik} / \tau)_k, \; y_v\big), \qquad
      p(k \mid v) = \tfrac1L \textstyle\sum_i \mathrm{softmax}_k(h_{iv}^\top h_{ik} / \tau)$$

    One pass through the graph, no negative samples. With `top_down`, $h_{iv}$ and $h_{ik}$ in the loss and in p are
    means over the own output and the (detached, normalised) outputs of all layers above.

    **Forward-forward** (`variant="labels"`: the label is appended to the features; `variant="nodes"`: the node is
    linked to the node of its class, in both directions). With $g_{iv} = \sum_j h_{ivj}^2$ on the graph with the true
    and with wrong labels, over the labelled nodes:

    $$L_i = \log(1 + e^{\theta - g_i^{+}}) + \log(1 + e^{g_i^{-} - \theta})$$

    The class is that of the largest $\sum_i g_{iv}$ when all nodes of unknown label are given it: one pass per class.

    The paper's: losses, normalisation, class nodes with random features, all three predictors. Ours: all layers learn
    in each step, not one after the other; the two kinds of samples are two copies of the graph through all layers (in
    the paper's code for class nodes, negative samples take over the features of positive ones); `negatives` wrong
    labels a step instead of all; class nodes that only receive (the authors' code: both directions); states above come
    from a pass right before the step, not from the step before.

    >>> GraphForward(variant="labels").groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    variant: Literal["single", "labels", "nodes"] = "single"
    """Single forward, or forward-forward with labels appended to features or with links to class nodes."""
    links: Literal["in", "both"] = "in"
    """Single forward: known nodes only send to the node of their class, or (authors' default) receive from it too."""
    temperature: PositiveFloat = 1.0
    """Single forward: tau, divides the scores."""
    top_down: bool = False
    """Single forward: average a layer's output with those of all layers above."""
    threshold: NonNegativeFloat = 2.0
    """Forward-forward: threshold theta of the sum of squares."""
    negatives: PositiveInt = 1
    """Forward-forward: wrong labels per node and step."""

    name: ClassVar[str] = "graph_forward"
    locality: ClassVar[Locality] = "local"
    whole_batch: ClassVar[str] = "trains on the nodes of one graph"
    boundary: ClassVar[str] = "detached activation of unit length, of the nodes and of one node per class"
    flat_memory: ClassVar[bool] = True
    unlabelled: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    only: ClassVar[str] = "its negative nodes carry a wrong class"
    source: ClassVar[str] = (
        "Park et al., arXiv 2403.11004 (2024); all layers in each step, copies of the graph, states above: our reading"
    )
    restrictions: ClassVar[str] = (
        "Networks on a graph only, with all nodes as one batch. The head is not used, and the plain network's output "
        "means nothing. Forward-forward runs the network once per class and predicts nodes of unknown label only."
    )
    models: ClassVar[tuple[str, ...]] = ("gcn", "gat")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_down:
            if self.variant != "single":
                raise LayerwiseError('top_down belongs to variant="single"; leave one of them out.')
            object.__setattr__(self, "locality", "broadcast")
            object.__setattr__(self, "boundary", f"{self.boundary}; the states of all layers above, of a pass before")

    def trains(self, site: Site) -> bool:
        """All blocks; the head is not used."""
        return not site.is_head

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The nodes with the class nodes, or copies of the graph with the true and with wrong labels."""
        graph, x = graph_of(ctx.network.model), ctx.x.flatten(1)
        known = graph.labels[: len(x)]
        scores = x.new_zeros(len(x), graph.classes, dtype=torch.float32)
        if self.variant == "single":
            h, edges = self._inputs(graph, x, [known])
            message: dict[str, Any] = {"edges": edges, "scores": scores, "above": ()}
            if self.top_down:  # the outputs that the layers will have in this step, before their updates
                passes = outputs(lambda index, h: ctx.run(index, h, message), len(ctx.network.blocks), h)
                message["above"] = tuple(F.normalize(out, dim=1) for out in passes)
            return h, message
        true = torch.where(ctx.y == UNLABELLED, known, ctx.y)
        counts = ctx.y != UNLABELLED
        wrong = [
            torch.where(counts, wrong_labels(true.clamp_min(0), graph.classes), known) for _ in range(self.negatives)
        ]
        h, edges = self._inputs(graph, x, [true, *wrong])
        return h, {"edges": edges, "scores": scores[:, 0].expand(1 + self.negatives, -1), "above": ()}

    def _inputs(self, graph: Graph, x: Tensor, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features of unit length and edges of one copy of the graph per list of labels `(N,)`."""
        nodes, classes = len(x), graph.classes
        edges = graph.between(nodes)
        if self.variant == "labels":
            if not graph.label_columns:
                raise LayerwiseError('variant="labels" needs a network with inputs for a label; give --model.labels.')
            parts = [torch.cat([x, self._columns(own, classes).to(x.dtype)], dim=1) for own in labels]
            classes = 0
        else:
            draw = Generator().manual_seed(classes)  # fixed, the same in every run
            virtual = torch.randn(classes, x.shape[1], generator=draw, device="cpu").to(x)
            parts = [part for _ in labels for part in (x, virtual)]
        back = self.variant == "nodes" or self.links == "both"
        h = F.normalize(torch.cat(parts), dim=1)
        return h, extended(edges, nodes, labels, classes, back)

    @staticmethod
    def _columns(labels: Tensor, classes: int) -> Tensor:
        """One-hot labels `(N, K)`; uniform if unknown."""
        hot = F.one_hot(labels.clamp_min(0), classes).float()
        return torch.where((labels < 0)[:, None], 1 / classes, hot)

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block on the edges of this pass."""
        if message is None:
            return block(h)
        with wired(message["edges"]):
            return block(h)

    def _pass(self, network: Partition, h: Tensor, edges: Tensor) -> Iterator[Tensor]:
        """Outputs of all blocks in a pass of prediction."""
        return outputs(lambda i, h: self.run(network.blocks[i], h, {"edges": edges}), len(network.blocks), h)

    def signal(self, ctx: BlockContext) -> Signal:
        """The loss of the layer; its scores of the classes; its direction as the next layer's input."""
        if ctx.site.is_head:
            return self._head(ctx)
        out = F.normalize(ctx.h, dim=1)
        message = dict(ctx.message)
        if self.variant == "single":
            logits = self._scores(ctx.h, message["above"][ctx.site.index + 1 :], len(ctx.y))
            message["scores"] = message["scores"] + wide(logits).softmax(-1)
            loss = ctx.task.loss(logits, ctx.y)
            return Signal(loss, message=message, output=out, metrics={"accuracy": ctx.task.accuracy(logits, ctx.y)})
        g = self._goodness(ctx.h, len(ctx.y), ctx.task.classes)
        message["scores"] = message["scores"] + g
        (true, *wrong), counts = g, ctx.y != UNLABELLED
        true, others = true[counts], torch.stack(wrong)[:, counts]
        loss = F.softplus(self.threshold - true).mean() + F.softplus(others - self.threshold).mean()
        return Signal(loss, message=message, output=out, metrics={"accuracy": (true > others).float().mean()})

    def _scores(self, h: Tensor, above: tuple[Tensor, ...], nodes: int) -> Tensor:
        """Products of the nodes with the class nodes `(N, K)`."""
        h = torch.stack([h, *above]).mean(0)
        return h[:nodes] @ h[nodes:].T / self.temperature

    def _goodness(self, h: Tensor, nodes: int, classes: int) -> Tensor:
        """Sums of squares of the nodes, per copy of the graph: `(copies, N)`."""
        copy = nodes + (0 if self.variant == "labels" else classes)
        return goodness(h, "sum").view(-1, copy)[:, :nodes]

    def _head(self, ctx: BlockContext) -> Signal:
        """The prediction of all layers together; the head itself does not learn."""
        scores = ctx.message["scores"]
        if self.variant == "single":
            logits = (scores / ctx.site.blocks).log()
            return Signal(metrics={"loss": ctx.task.loss(logits, ctx.y), "accuracy": ctx.task.accuracy(logits, ctx.y)})
        true, others = scores[0, ctx.y != UNLABELLED], scores[1:, ctx.y != UNLABELLED]
        accuracy = (true > others).float().mean()
        return Signal(metrics={"loss": F.softplus(others - true).mean(), "accuracy": accuracy})

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logarithm of the mean probability over layers, or summed goodness with every label: `(N, K)`."""
        graph, x = graph_of(network.model), x.flatten(1)
        known = graph.labels[: len(x)]
        if self.variant == "single":
            outs, states = self._pass(network, *self._inputs(graph, x, [known])), ()
            if self.top_down:  # else no output is kept
                outs = tuple(outs)
                states = tuple(F.normalize(out, dim=1) for out in outs)
            found = [wide(self._scores(out, states[i + 1 :], len(x))).softmax(-1) for i, out in enumerate(outs)]
            return torch.stack(found).mean(0).log()
        votes = []
        for label in range(graph.classes):
            h, edges = self._inputs(graph, x, [torch.where(known < 0, label, known)])
            found = [self._goodness(out, len(x), graph.classes)[0] for out in self._pass(network, h, edges)]
            votes.append(torch.stack(found).sum(0))
        return torch.stack(votes, dim=1)
