"""Do rules keep learning on a stream of tasks? Permuted MNIST: every task is a new permutation of the pixels.

    python benchmarks/mlp-permuted-inputs-plasticity/measure.py

A small network goes through the tasks one after the other, each with the same number of steps, and is never reset.
After each task its accuracy on test images of that task is measured: how well it has learned the newest one, not what
it remembers. A rule that loses its plasticity falls from task to task. Permutations, order of the samples and the
network's first weights depend on the seed alone, so all rules see the same stream. The figures go to `results.jsonl`.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from layerwise import Learner, create_rule, data, models

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import evidence  # noqa: E402
import recording  # noqa: E402

RULES = {
    "backprop": {},
    "continual_backprop": {"replacement_rate": 1e-4},
    "hedge_backprop": {},
    "local_ce": {},
    "sll": {},
}
WIDTH, DEPTH, BATCH, TESTED = 100, 3, 16, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load(options.data)
    train = next(data.Batches(dataset.train, len(dataset.train), seed=0, mean=dataset.mean, std=dataset.std).epoch(0))
    test = next(data.Batches(dataset.test, TESTED, seed=0, mean=dataset.mean, std=dataset.std).epoch(0))
    command = recording.command_of(__file__)
    for seed in range(options.seeds):
        for name in options.rules.split(","):
            found = measured(name, train, test, options.tasks, options.steps, options.lr, seed)
            print(name, seed, *(f"{100 * a:.1f}" for a in found["accuracy"][:: max(options.tasks // 8, 1)]), flush=True)
            evidence.keep(options.out, f"{name}-seed{seed}", found, command)


def measured(name: str, train, test, tasks: int, steps: int, lr: float, seed: int) -> dict:
    """Accuracy after each task, and the seconds of all steps."""
    torch.manual_seed(seed)
    (x, y), (test_x, test_y) = train, test
    model = models.create("mlp", x.shape[1:], 10, depth=DEPTH, width=WIDTH)
    rule = create_rule(name, **RULES[name])
    learner = Learner(model, rule, lr=lr, weight_decay=0.0, seed=seed, example=x[:BATCH])
    stream, accuracies, began = torch.Generator().manual_seed(seed), [], time.process_time()
    for _ in range(tasks):
        pixels = torch.randperm(x[0].numel(), generator=stream)
        for chosen in torch.randperm(len(x), generator=stream)[: steps * BATCH].split(BATCH):
            learner.step(permuted(x[chosen], pixels), y[chosen])
        right = learner(permuted(test_x, pixels)).argmax(1) == test_y
        accuracies.append(float(right.float().mean()))
    return {"accuracy": accuracies, "seconds": time.process_time() - began, "lr": lr, "steps": steps}


def permuted(x: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Images `(B, ...)` with their pixels in another order."""
    return x.flatten(1)[:, pixels].reshape(x.shape)


if __name__ == "__main__":
    main()
