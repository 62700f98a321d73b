"""Two processes that train the same blocks, each on its half of the batch: `replicas=` instead of DDP.

torchrun --nproc-per-node 2 examples/data_parallel.py
"""

import torch
import torch.distributed as dist
from torch import nn

import layerwise
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.replicas import Replicas


def network():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 64), nn.ReLU()), *(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 4))


def main() -> None:
    ranks = Ranks(timeout=60, device=torch.device("cpu"))  # instead of init_process_group
    rank, count = ranks.rank, ranks.count
    try:
        layerwise.Learner(nn.parallel.DistributedDataParallel(network()), "local_ce")
    except layerwise.LayerwiseError as refused:
        if rank == 0:
            print(refused)
    x, y = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4
    learner = layerwise.Learner(network(), "local_ce", optimizer="sgd", lr=0.1, replicas=Replicas(ranks))
    alone = layerwise.Learner(network(), "local_ce", optimizer="sgd", lr=0.1, replicas=layerwise.learner.OneProcess())
    for _ in range(10):
        learner.step(x[rank::count], y[rank::count])
        alone.step(x, y)
    pairs = zip(learner.network.parameters(), alone.network.parameters(), strict=True)
    if rank == 0:
        print("as one process on the whole batch:", all(torch.allclose(a, b, atol=1e-5) for a, b in pairs))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
