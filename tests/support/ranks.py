"""Replicas in separate processes, and comparisons of two states; shared by the tests."""

import copy

import pytest
import torch
from torch import nn

from layerwise import Learner, Partition
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.replicas import Replicas
from support.jobs import ended, job


def same_state(a, b):
    """Whether two states of learners hold the same names and bits, in whatever order."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def share(x, rank, ranks):
    return x.chunk(ranks)[rank]


def spread(ranks, folder, work, kind=Replicas):
    """The results of `work(replicas)` on every rank of a job."""

    def child():
        replicas = kind(Ranks(30, torch.device("cpu")))
        torch.save(work(replicas), folder / f"found{replicas.rank}")
        replicas.gather(None)

    with job(ranks, folder, child) as processes:
        codes, errors = ended(processes, folder)
    assert codes == [0] * ranks, errors
    return [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(ranks)]


def learned(replicas, model, rule, data, **options):
    """The state after one step per batch, each replica with its share."""
    learner = Learner(copy.deepcopy(model), rule, replicas=replicas, **options)
    for x, y in data:
        learner.step(share(x, replicas.rank, replicas.count), share(y, replicas.rank, replicas.count))
    return copy.deepcopy(whole(learner.state_dict()))


def whole(tree):
    """A state with full tensors instead of shards; all ranks call it together."""
    if isinstance(tree, dict):
        return {name: whole(value) for name, value in tree.items()}
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


def close(a, b, tolerance=1e-5):
    """Whether two states hold the same weights, up to the order of summation."""
    pairs = [(a[part], b[part]) for part in ("model", "auxiliary")]
    assert all(one.keys() == other.keys() for one, other in pairs)
    return all((one[n].double() - other[n].double()).abs().max() < tolerance for one, other in pairs for n in one)


def normed():
    torch.manual_seed(1)
    parts = [nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)]
    return Partition(nn.Sequential(*parts), ["2", "4"])


def similar(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert {n: v for n, v in one.items() if n != "split"} == pytest.approx(
            {n: v for n, v in other.items() if n != "split"}, abs=1e-4
        )
