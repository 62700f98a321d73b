"""Which client holds which sample."""

import numpy as np
import torch
from torch import Tensor

from layerwise import LayerwiseError
from layerwise.core.randomness import derive_seed

ATTEMPTS = 1000


def shards(labels: Tensor, clients: int, alpha: float, seed: int, least: int = 1) -> list[Tensor]:
    """Cut a data set into one shard per client; every sample is in exactly one of them.

    With alpha = 0 the samples are dealt out at random (IID). Otherwise each class is cut in proportions that are drawn
    from a Dirichlet distribution with all parameters alpha (Hsu et al., arXiv 1909.06335, 2019, in the per-class form
    of Li et al., arXiv 2102.02079): the smaller alpha, the fewer classes a client sees.

    Args:
        labels: int64 `(N,)`.
        clients: how many shards.
        alpha: 0, or the concentration.
        seed: of every draw; the shards depend on nothing else.
        least: smallest number of samples in a shard; proportions are drawn again until every shard has it.

    Returns:
        Indices in ascending order, a tensor per client.

    >>> [len(shard) for shard in shards(torch.arange(10) % 2, clients=3, alpha=0.0, seed=0)]
    [4, 3, 3]
    """
    if clients < 1 or clients * least > len(labels):
        raise LayerwiseError(
            f"{clients} clients cannot have {least} of {len(labels)} samples each; use fewer clients, smaller batches "
            "or more samples."
        )
    if not 0 <= alpha < float("inf"):
        raise LayerwiseError(f"alpha is {alpha}; use 0 for shards that are alike, or a number larger than 0.")
    rng = np.random.default_rng(derive_seed(seed, "shards"))
    if alpha == 0:
        return [part.sort().values for part in torch.from_numpy(rng.permutation(len(labels))).tensor_split(clients)]
    classes = [np.flatnonzero(labels.numpy() == label) for label in labels.unique().tolist()]
    for _ in range(ATTEMPTS):
        cut: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for members in classes:
            ends = np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(members)
            for shard, part in zip(cut, np.split(rng.permutation(members), ends.round().astype(int)), strict=True):
                shard.append(part)
        found = [torch.from_numpy(np.sort(np.concatenate(parts))) for parts in cut]
        if min(map(len, found)) >= least:
            return found
    raise LayerwiseError(
        f"in {ATTEMPTS} draws with alpha = {alpha} some client had fewer than {least} samples; use a larger alpha, "
        "fewer clients or smaller batches."
    )
