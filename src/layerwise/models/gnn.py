"""Networks on a graph, with the layers of PyTorch Geometric."""

import importlib
from abc import abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.graphs import Graph
from layerwise.errors import LayerwiseError
from layerwise.models.base import BlockSequential, ModelOptions, check_sizes, named, require


class GraphLayer(nn.Module):
    """A layer of PyTorch Geometric on the edges of a graph that the network holds.

    Args:
        conv: the layer, a function of features `(N, inputs)` and edges `(2, E)`.
        graph: holds the edges.
        inputs: number of its inputs, including those for a label.
        label_columns: how many of them are for a label; they are zero if a batch has none.
    """

    graph: Graph

    def __init__(self, conv: nn.Module, graph: Graph, inputs: int, label_columns: int):
        super().__init__()
        self.conv = conv
        self.inputs, self.label_columns = inputs, label_columns
        self.__dict__["graph"] = graph  # not a child: the network holds it once

    def forward(self, h: Tensor) -> Tensor:
        """Features `(N, inputs)` to `(N, outputs)`."""
        if self.label_columns and h.shape[1] == self.inputs - self.label_columns:
            h = F.pad(h, (0, self.label_columns))
        return self.conv(h, self.graph.wiring(len(h)))


class GraphSequential(BlockSequential):
    """A graph, blocks and a head, one after the other."""

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks; the graph belongs to the first."""
        return tuple(name for name in super().block_names if name != "graph")


@dataclass(frozen=True)
class GraphModelOptions(ModelOptions):
    """Options of a network on a graph: block i is dropout, graph layer and activation; the head a graph layer."""

    depth: int = 2
    """Number of hidden layers; each is a block."""
    width: int = 128
    """Units per hidden layer."""
    dropout: float = 0.5
    """Probability of zeroing an input of a layer."""
    labels: bool = False
    """Inputs for a label after those of the features, for graph_forward with --rule.variant labels."""

    def build(self, shape: tuple[int, int, int], classes: int, graph: Graph | None = None) -> BlockSequential:
        """Build the model for nodes with features of `shape`, on `graph`.

        Raises:
            LayerwiseError: there is no graph, PyTorch Geometric is not installed, or an option does not fit.
        """
        check_sizes(shape, classes)
        if graph is None:
            raise LayerwiseError(
                "gcn and gat need data with a graph, such as cora; choose --data cora, or give graph=."
            )
        columns = classes if self.labels else 0
        graph = Graph(graph.edges, graph.labels, graph.classes, columns)
        inputs = shape[0] * shape[1] * shape[2] + columns
        children: dict[str, nn.Module] = {"graph": graph}
        for i in range(self.depth):
            parts: dict[str, nn.Module] = {"dropout": nn.Dropout(self.dropout)} if self.dropout else {}
            conv = self._conv(_geometric(), inputs, self.width, last=False)
            parts |= {"layer": GraphLayer(conv, graph, inputs, columns if i == 0 else 0), "activation": nn.ReLU()}
            children[f"block{i + 1}"] = named(**parts)
            inputs = self.width
        parts = {"dropout": nn.Dropout(self.dropout)} if self.dropout else {}
        parts["layer"] = GraphLayer(self._conv(_geometric(), inputs, classes, last=True), graph, inputs, 0)
        children["head"] = named(**parts)
        return GraphSequential(OrderedDict(children))

    @abstractmethod
    def _conv(self, layers: Any, inputs: int, outputs: int, last: bool) -> nn.Module: ...


def _geometric() -> Any:
    """The layers of PyTorch Geometric, imported when they are needed."""
    try:
        return importlib.import_module("torch_geometric.nn")
    except ImportError as reason:
        raise LayerwiseError("graph networks need PyTorch Geometric; pip install 'layerwise[graph]'.") from reason


@dataclass(frozen=True)
class GCN(GraphModelOptions):
    """Graph convolutional network on the graph of the data: block i is dropout, a graph convolution and ReLU.

    Source: Kipf & Welling, ICLR 2017, https://arxiv.org/abs/1609.02907.

    Example:
        >>> GCN(depth=1, width=16)
        GCN(depth=1, width=16, dropout=0.5, labels=False)
    """

    def _conv(self, layers: Any, inputs: int, outputs: int, last: bool) -> nn.Module:
        return layers.GCNConv(inputs, outputs)


@dataclass(frozen=True)
class GAT(GraphModelOptions):
    """Graph attention network on the graph of the data: block i is dropout, attention over neighbours and ReLU.

    The heads of a block share its units evenly; the network's head has one. Dropout acts on attention too.

    Source: Veličković et al., ICLR 2018, https://arxiv.org/abs/1710.10903.

    Example:
        >>> GAT(heads=8)
        GAT(depth=2, width=128, dropout=0.5, labels=False, heads=8)
    """

    heads: int = 4
    """Attention heads of a block."""

    def _conv(self, layers: Any, inputs: int, outputs: int, last: bool) -> nn.Module:
        heads = 1 if last else self.heads
        require(outputs % heads == 0, f"{heads} heads do not share {outputs} units evenly; choose another width.")
        return layers.GATConv(inputs, outputs // heads, heads=heads, dropout=self.dropout)
