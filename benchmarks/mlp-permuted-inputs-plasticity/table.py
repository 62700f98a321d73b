"""Accuracy on every new task of a stream of permuted inputs."""

import statistics

from evidence import spread, table, wrapped

EDGE = 8
"""Tasks at the beginning and at the end whose means are compared."""


def by_rule(lines):
    found = {}
    for line in lines:
        found.setdefault(line["name"].rpartition("-seed")[0], []).append(line)
    return found


def means(lines):
    """Accuracy in % after each task, mean over the seeds, by rule."""
    return {
        rule: [100 * statistics.mean(task) for task in zip(*(run["accuracy"] for run in runs), strict=True)]
        for rule, runs in by_rule(lines).items()
    }


def parts(runs):
    """Of every seed the mean accuracy in % over the first tasks, over the last ones, and the difference."""
    first = [100 * statistics.mean(run["accuracy"][:EDGE]) for run in runs]
    last = [100 * statistics.mean(run["accuracy"][-EDGE:]) for run in runs]
    return first, last, [b - a for a, b in zip(first, last, strict=True)]


def figures(lines):
    found = {}
    for rule, runs in by_rule(lines).items():
        for name, values in zip(("first", "last", "change"), parts(runs), strict=True):
            found[f"{rule}_{name}"] = spread(values)
    return found


def small(lines):
    body = [[rule, *(spread(values) for values in parts(runs))] for rule, runs in by_rule(lines).items()]
    return table(["rule", f"first {EDGE} tasks, %", f"last {EDGE} tasks, %", "change"], body)


def tables(lines):
    run = lines[0]
    tasks, steps = len(run["accuracy"]), run["steps"]
    text = wrapped(
        f"MNIST, {tasks} tasks, each a new permutation of the pixels, {steps} steps of 16 samples per task; MLP 3x100, "
        f"AdamW without weight decay, learning rate {run['lr']:g} (one for all rules, not tuned), default options of "
        "the rules, 3 seeds. The network is never reset. Accuracy on 1000 test images of the newest task after its "
        f"last step, means over the first and over the last {EDGE} tasks; mean ± standard deviation over the seeds. "
        "Continual backpropagation was published with streams of up to 2000 tasks: this is a first look."
    )
    body = []
    for rule, runs in by_rule(lines).items():
        seconds = statistics.median(run["seconds"] for run in runs)
        body.append([rule, *(spread(values) for values in parts(runs)), f"{seconds:.0f}"])
    head = ["rule", f"first {EDGE} tasks, %", f"last {EDGE} tasks, %", "change", "processor seconds"]
    picture = "![Accuracy on the newest task, by task, per rule](../../docs/images/plasticity.svg)"
    return [*text, "", *table(head, body), "", picture, ""]
