"""How sparse are the layers of Forward-Forward, and do they hold units that belong to one class?

    python benchmarks/ff_sparsity/measure.py

The same network is trained by `forward_forward` and by `backprop`, and measured untrained too. Per layer, on test
samples that are classified correctly: Hoyer's sparsity (`layerwise.measure.diagnostics.hoyer_sparsity`), the share of
units that never fire, and the share of category-specific units: those for which one class holds more than half of the
sum over classes of the unit's mean activity. Forward-Forward is measured with the true label written into the image, as
Tosato et al. (arXiv 2305.18353) do. Raw figures go to `results.json`, the table to `table.md`.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from layerwise import Learner, create_rule, data, models
from layerwise.measure.diagnostics import dead_units, features, hoyer_sparsity
from layerwise.runs.environment import processor

HERE = Path(__file__).parent
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
    found = {
        name: [measured(name, dataset, options.width, options.epochs, seed) for seed in range(options.seeds)]
        for name in ("forward_forward", "backprop", "untrained")
    }
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "table.md").write_text(table(found, options))
    print(table(found, options))


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


def table(found: dict, options: argparse.Namespace) -> str:
    """Mean and standard deviation over the seeds."""

    def spread(values: list[float], digits: int = 2) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    lines = [
        f"# Sparsity of Forward-Forward's layers, {options.data}, MLP 3x{options.width}",
        "",
        "Command: `python benchmarks/ff_sparsity/measure.py`. AdamW, learning rate 1e-3 (not tuned), "
        f"{options.epochs} epochs,",
        f"{options.seeds} seeds; default options of the rules. On those of the first {SAMPLES} test samples that are "
        "classified correctly (untrained: on all): Hoyer's",
        "sparsity (0 to 1), share of units that never change, share of units of which one class holds more than half "
        "of the mean activity, and the number of",
        "classes that have such units. Mean ± standard deviation over the seeds.",
        "",
        "| rule | accuracy, % | layer | Hoyer | dead | category-specific | classes with such units |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        accuracy = spread([100 * run["accuracy"] for run in runs])
        for layer in runs[0]["layers"]:
            rows = [run["layers"][layer] for run in runs]
            cells = [spread([row[key] for row in rows]) for key in ("hoyer", "dead", "specific")]
            classes = spread([row["classes"] for row in rows], 1)
            lines.append(f"| {name} | {accuracy} | {layer} | {' | '.join(cells)} | {classes} |")
    lines += [
        "",
        "Machine:",
        "",
        "```",
        f"cpu: {processor()}, one thread, shared; torch {torch.__version__}",
        "```",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
