"""Where the time of a step goes: forward, local backward, check + clip + optimizer, the rest."""

import functools
import json
import statistics
import time
from collections import defaultdict

import torch

from layerwise import Learner, models

PARTS = {"forward": "forward", "_backward": "backward", "_step": "check + optimizer"}


def profile(rule: str, model: str, shape: tuple[int, int, int], batch: int, rounds: int, **dials: int) -> dict:
    """The median share of each part of the update order."""
    torch.manual_seed(0)
    learner = Learner(models.create(model, shape, 10, **dials), rule)
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    learner.step(x, y)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, method):
        @functools.wraps(method)
        def call(*args):
            started = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent[name] += time.perf_counter() - started

        return call

    for method, name in PARTS.items():
        setattr(learner.engine, method, timed(name, getattr(learner.engine, method)))
    totals, shares = [], defaultdict(list)
    for _ in range(rounds):
        spent.clear()
        started = time.perf_counter()
        learner.step(x, y)
        total = time.perf_counter() - started
        totals.append(total)
        for name in PARTS.values():
            shares[name].append(spent[name] / total)
    return {
        "rule": rule,
        "model": model,
        "milliseconds": 1000 * statistics.median(totals),
        "shares": {name: statistics.median(share) for name, share in shares.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for rule in ("sll", "local_ce", "backprop"):
        found.append(profile(rule, "mlp", (1, 28, 28), 128, rounds=20, depth=3, width=1000))
        found.append(profile(rule, "vit", (3, 32, 32), 64, rounds=3, depth=12, width=192))
    print(json.dumps(found))
