"""How sparse are the layers of Forward-Forward, and do they hold units that belong to one class?

    python benchmarks/mlp-forward-forward-sparsity/measure.py

The same network is trained by `forward_forward` and by `backprop`, and measured untrained too. Per layer, on test
samples that are classified correctly: Hoyer's sparsity (`layerwise.measure.diagnostics.hoyer_sparsity`), the share of
units that never fire, and the share of category-specific units: those for which one class holds more than half of the
sum over classes of the unit's mean activity. Forward-Forward is measured with the true label written into the image, as
Tosato et al. (arXiv 2305.18353) do. The figures go to `results.jsonl`.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from layerwise import Learner, create_rule, data, models
from layerwise.measure.diagnostics import dead_units, features, hoyer_sparsity

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import evidence  # noqa: E402
import recording  # noqa: E402

RULES = {"forward_forward": {"lr": 1e-3}, "backprop": {"lr": 1e-3}}
SAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load(options.data)
    command = recording.command_of(__file__)
    for name in ("forward_forward", "backprop", "untrained"):
        for seed in range(options.seeds):
            found = measured(name, dataset, options.width, options.epochs, seed)
            evidence.keep(options.out, f"{name}-seed{seed}", found, command)


def measured(name: str, dataset: data.Dataset, width: int, epochs: int, seed: int) -> dict:
    """Accuracy, and per layer its sparsity and its units."""
    torch.manual_seed(seed)
    model = models.create("mlp", dataset.shape, len(dataset.classes), depth=3, width=width)
    rule = create_rule("backprop" if name == "untrained" else name)
    common = {"mean": dataset.mean, "std": dataset.std}
    x, y = next(data.Batches(dataset.test, SAMPLES, seed=0, shuffle=False, drop_last=False, **common).epoch(0))
    learner = Learner(model, rule, seed=seed, example=x, **RULES.get(name, {}))
    batches = data.Batches(dataset.train, 128, seed=seed, **common)
    for epoch in range(0 if name == "untrained" else epochs):
        for batch in batches.epoch(epoch):
            learner.step(*batch)
    right = learner(x).argmax(1) == y
    layers = activities(learner, x, y)
    kept = slice(None) if name == "untrained" else right
    units = {layer: class_units(h[kept], y[kept], len(dataset.classes)) for layer, h in layers.items()}
    print(name, seed, f"{right.float().mean():.4f}", flush=True)
    return {
        "accuracy": float(right.float().mean()),
        "layers": {
            layer: {"hoyer": hoyer_sparsity(h[kept]), "dead": dead_units(h[kept]), **units[layer]}
            for layer, h in layers.items()
        },
    }


@torch.no_grad()
def activities(learner: Learner, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Outputs of the layers: of the plain image, or of the image with its true label for Forward-Forward."""
    if learner.rule.name != "forward_forward":
        return features(learner, [x])
    first = learner.auxiliary["0"]
    with learner.evaluating():
        labelled = learner.rule.labelled(x, torch.nn.functional.one_hot(y, first.classes), first)
        return {site.name: h for site, h, _ in learner.rule.activities(learner.network, labelled)}


def class_units(h: Tensor, y: Tensor, classes: int) -> dict[str, float]:
    """Share of units of which one class holds more than half of the mean activity; how many classes have some."""
    means = torch.stack([h[y == k].mean(0) for k in range(classes)])  # (K, D)
    share = means / means.sum(0).clamp_min(1e-12)
    best, which = share.max(0)
    specific = best > 0.5
    return {"specific": float(specific.float().mean()), "classes": len(which[specific].unique())}


if __name__ == "__main__":
    main()
