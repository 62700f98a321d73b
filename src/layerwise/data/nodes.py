"""Nodes of one graph as samples: Cora, with its public split."""

import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.core.graphs import Graph
from layerwise.core.tasks import UNLABELLED
from layerwise.data.machine import cache_folder, find_local
from layerwise.data.sources import InMemorySource
from layerwise.errors import LayerwiseError
from layerwise.files import open_regular, shown

CORA_CLASSES = (
    "Theory",
    "Reinforcement_Learning",
    "Genetic_Algorithms",
    "Neural_Networks",
    "Probabilistic_Methods",
    "Case_Based",
    "Rule_Learning",
)


class NodeSource(InMemorySource):
    """All nodes of a graph as one batch, in order; those of one split have a label.

    Args:
        images: uint8 (N, 1, 1, F), the features.
        labels: int64 (N,), -100 outside the split.
    """

    whole = True
    pictures = False


class Nodes(NamedTuple):
    """A graph whose nodes are split three ways."""

    train: NodeSource
    val: NodeSource
    test: NodeSource
    graph: Graph


def cora(root: str | Path | None) -> Nodes:
    """Cora: 2,708 papers with their words and citations, and the public split of 140, 500 and 1,000 labels.

    Args:
        root: folder that holds cora/cora.npz; default $LAYERWISE_DATA, then PyTorch Geometric's download.

    Raises:
        LayerwiseError: a file that is not readable, or no download.
    """
    folder = find_local("cora", root)
    words, y, edges, masks = _from_file(folder / "cora.npz") if folder is not None else _from_geometric()
    images = words.to(torch.uint8).mul(255)[:, None, None]
    train, val, test = (NodeSource(images, torch.where(mask, y, UNLABELLED)) for mask in masks)
    return Nodes(train, val, test, Graph(edges, train.labels, len(CORA_CLASSES)))


def _from_file(path: Path) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Which words each node has, labels, edges, three masks."""
    from scipy.sparse import csr_matrix

    try:
        with open_regular(path, "fetch Cora again") as raw, np.load(raw, allow_pickle=False) as file:
            matrix = csr_matrix((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"]))
            masks = [torch.from_numpy(file[f"{split}_mask"]) for split in ("train", "val", "test")]
            y, edges = torch.from_numpy(file["label"]), torch.from_numpy(file["edge_index"])
            words = torch.from_numpy(matrix.toarray()) > 0
        nodes = (len(words),)
        if y.shape != nodes or any(mask.shape != nodes or mask.dtype != torch.bool for mask in masks):
            raise ValueError("its labels and masks do not fit its nodes")
    except LayerwiseError:
        raise
    except Exception as reason:  # numpy's and scipy's readers raise these for damaged bytes
        why = str(reason).partition("\n")[0] or type(reason).__name__
        raise LayerwiseError(f"{shown(path)} is not a readable file of Cora ({why}); fetch it again.") from reason
    return words, y, edges, masks


def _from_geometric() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    hint = "set LAYERWISE_DATA to a folder that holds cora/cora.npz"
    try:
        datasets = importlib.import_module("torch_geometric.datasets")
        found: Any = datasets.Planetoid(os.fspath(cache_folder() / "planetoid"), "Cora")[0]
    except ImportError as reason:
        raise LayerwiseError(
            f"cora comes with PyTorch Geometric; pip install 'layerwise[graph]', or {hint}."
        ) from reason
    except OSError as reason:  # errors of a failed download
        raise LayerwiseError(f"Cora could not be downloaded ({reason}); try again, or {hint}.") from reason
    return found.x > 0, found.y, found.edge_index, [found.train_mask, found.val_mask, found.test_mask]
