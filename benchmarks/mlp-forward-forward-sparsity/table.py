"""Sparsity of Forward-Forward's layers."""

import statistics

from evidence import spread, table, wrapped


def by_rule(lines):
    found = {}
    for line in lines:
        found.setdefault(line["name"].rpartition("-seed")[0], []).append(line)
    order = ("forward_forward", "backprop", "untrained")
    return {name: found[name] for name in order if name in found}


def figures(lines):
    found = {}
    for name, runs in by_rule(lines).items():
        means = [statistics.mean(run["layers"][layer]["hoyer"] for run in runs) for layer in runs[0]["layers"]]
        found[name] = ", ".join(f"{mean:.2f}" for mean in means)
    return found


def small(lines):
    body = []
    for name, runs in by_rule(lines).items():
        layers = runs[0]["layers"]
        cells = [spread([run["layers"][layer]["hoyer"] for run in runs]) for layer in layers]
        body.append([name, spread([100 * run["accuracy"] for run in runs]), *cells])
    return table(["rule", "accuracy, %", "Hoyer, layer 1", "layer 2", "layer 3"], body)


def tables(lines):
    body = []
    for name, runs in by_rule(lines).items():
        for layer in runs[0]["layers"]:
            rows = [run["layers"][layer] for run in runs]
            cells = [spread([row[key] for row in rows]) for key in ("hoyer", "dead", "specific")]
            accuracy = spread([100 * run["accuracy"] for run in runs])
            body.append([name, accuracy, layer, *cells, spread([row["classes"] for row in rows], digits=1)])
    text = wrapped(
        "MNIST, MLP 3x500, AdamW, learning rate 1e-3 (not tuned), 8 epochs, 3 seeds; default options of the rules. "
        "Measured on those of the first 2000 test samples that are classified correctly (untrained: on all): Hoyer's "
        "sparsity (0 to 1), share of units that never change, share of units of which one class holds more than half "
        "of the mean activity, and the number of classes that have such units. Mean ± standard deviation over the "
        "seeds."
    )
    head = ["rule", "accuracy, %", "layer", "Hoyer", "dead", "category-specific", "classes with such units"]
    return [*text, "", *table(head, body)]
