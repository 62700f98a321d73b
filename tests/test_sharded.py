"""Shards: each rank keeps a share of parameters, gradients and optimizer state, and learns what replicas learn."""

import copy

import pytest
import torch
from nets import PLAIN_SGD, batches, kinds, net, trained
from test_data_parallel import OF_SHARES, close, learned, share
from test_pipeline import same_state

from layerwise import LayerwiseError, Learner, rules


def spread(ranks, folder, work):
    from test_data_parallel import spread as of_data
    from layerwise.parallel.shards import Shards
    return of_data(ranks, folder, work, Shards)


def whole(tree):
    if isinstance(tree, dict):
        return {k: whole(v) for k, v in tree.items()}
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


def test_every_rule(tmp_path):
    names = [name for name in rules.names() if "mlp" in kinds(name)]
    cases = [(name, kind) for kind in ("mlp", "vit") for name in (names if kind == "mlp" else ["sll", "sid"])]
    data = batches(2, size=24)
    from layerwise.parallel.replicas import Replicas
    def work(shards):
        plain = Replicas(shards.ranks)
        out = {}
        for name, kind in cases:
            a = whole(learned(shards, net(kind, 3), name, data, clip=0.5, **PLAIN_SGD))
            b = learned(plain, net(kind, 3), name, data, clip=0.5, **PLAIN_SGD)
            out[name, kind] = a, b
        return out
    first, second = spread(2, tmp_path, work)
    for key in cases:
        print(key, same_state(*first[key]), close(*first[key], 1e-6), same_state(first[key][0], second[key][0]))
    assert 0
