"""A graph as a part of a network: its edges and what is known of its nodes' labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from layerwise.core.tasks import UNLABELLED
from layerwise.errors import LayerwiseError

_wired: ContextVar[Tensor | None] = ContextVar("wired", default=None)


@contextmanager
def wired(edges: Tensor) -> Iterator[None]:
    """A context in which graph layers run on other edges, `(2, E)`, than those of their own graph."""
    token = _wired.set(edges)
    try:
        yield
    finally:
        _wired.reset(token)


class Graph(nn.Module):
    """Edges and known labels of N nodes; as a module it only lays the nodes' features out as a matrix.

    It is the first child of a graph network, so that edges and labels are moved and stored with the network. Fewer
    than N rows are the first nodes, with the edges between them.

    Args:
        edges: int64 `(2, E)`, from node to node, numbers from 0; an undirected edge is held in both directions.
        labels: int64 `(N,)`: the labels that are known, such as those of the training split; -100 elsewhere.
        classes: number of classes K.
        label_columns: K where the network has inputs for a label after those of the features, else 0.

    Raises:
        LayerwiseError: an edge from or to a node that is not there, or a label that is out of range.

    >>> graph = Graph(torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.tensor([1, -100, -100]), classes=2)
    >>> graph.wiring(2)  # of the first two nodes
    tensor([[0],
            [1]])
    """

    edges: Tensor
    labels: Tensor

    def __init__(self, edges: Tensor, labels: Tensor, classes: int, label_columns: int = 0):
        super().__init__()
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(labels):
            raise LayerwiseError(f"the edges name nodes outside 0 to {len(labels) - 1}; give one label per node.")
        known = labels[labels != UNLABELLED]
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
            raise LayerwiseError(
                f"the known labels are not in 0 to {classes - 1}; write {UNLABELLED} where none is known."
            )
        self.classes, self.label_columns = classes, label_columns
        self.register_buffer("edges", edges)
        self.register_buffer("labels", labels)

    @classmethod
    def blank(cls, nodes: int, edges: int, classes: int) -> "Graph":
        """A graph of the given sizes, to be filled by `load_state_dict`."""
        return cls(torch.zeros(2, edges, dtype=torch.int64), torch.full((nodes,), UNLABELLED), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(N, ...)` as `(N, F)`."""
        return x.flatten(1)

    def wiring(self, rows: int) -> Tensor:
        """The edges `(2, E)` on which a layer with `rows` rows runs: the graph's, or those of `wired`.

        Raises:
            LayerwiseError: there are more rows than nodes.
        """
        other = _wired.get()
        return self.between(rows) if other is None else other

    def between(self, nodes: int) -> Tensor:
        """The edges between the first `nodes` nodes."""
        if nodes > len(self.labels):
            raise LayerwiseError(
                f"the graph has {len(self.labels)} nodes and the input {nodes} rows; a rule that makes more samples "
                "out of a batch cannot train a graph network, except graph_forward."
            )
        if nodes == len(self.labels):
            return self.edges
        return self.edges[:, (self.edges < nodes).all(0)]


def graph_of(network: nn.Module) -> Graph:
    """The graph of a network.

    Raises:
        LayerwiseError: the network has none.
    """
    for module in network.modules():
        if isinstance(module, Graph):
            return module
    raise LayerwiseError(
        "graph_forward trains networks on a graph; choose the model gcn or gat, and data with a graph."
    )


def extended(edges: Tensor, nodes: int, linked: list[Tensor], classes: int, back: bool) -> Tensor:
    """Copies of a graph side by side, each with one more node per class, to which the nodes of that class are linked.

    Copy c holds the nodes `c (N + K) .. c (N + K) + N - 1`, then its K class nodes.

    Args:
        edges: `(2, E)`, of one copy.
        nodes: N.
        linked: per copy, int64 `(N,)`: the class of each node, or a negative number for no link.
        classes: K; with 0 there are no class nodes.
        back: whether the class nodes are linked back to the nodes.

    >>> extended(torch.empty(2, 0, dtype=torch.int64), 2, [torch.tensor([1, -100])], classes=2, back=True)
    tensor([[0, 3],
            [3, 0]])
    """
    parts = []
    for copy, labels in enumerate(linked):
        first = copy * (nodes + classes)
        parts.append(edges + first)
        if classes:
            members = (labels >= 0).nonzero().flatten()
            to_class = torch.stack([members, nodes + labels[members]]) + first
            parts += [to_class, to_class.flip(0)] if back else [to_class]
    return torch.cat(parts, dim=1)
