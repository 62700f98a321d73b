"""Federated averaging over clients with local losses."""

import statistics

from evidence import spread, table, wrapped


def by_name(lines):
    """(alpha, rule, seed) to run."""
    found = {(line["options"]["alpha"], line["options"]["rule"], line["options"]["seed"]): line for line in lines}
    return dict(sorted(found.items()))


def groups(lines):
    """(alpha, rule) to the rounds of each seed."""
    found = {}
    for (alpha, rule, _), line in by_name(lines).items():
        found.setdefault((alpha, rule), []).append(line["rounds"])
    return found


def gap(found, alpha, rule):
    """Mean difference to backpropagation, seed by seed, in points."""
    pairs = zip(found[alpha, rule], found[alpha, "backprop"], strict=True)
    return 100 * statistics.mean(rows[-1]["accuracy"] - base[-1]["accuracy"] for rows, base in pairs)


def largest(found, name):
    """The largest value of a client over rounds and seeds, in MiB."""
    return f"{max(row[name] for rows in found for row in rows[1:]) / 2**20:.2f}"


def figures(lines):
    found = groups(lines)
    values = {f"{rule}_work": f"{float(largest(found[alpha, rule], 'work')):.1f}" for alpha, rule in found}
    for alpha, rule in found:
        values[f"{rule}_{'skewed' if alpha else 'iid'}"] = f"{gap(found, alpha, rule):+.1f}"
    return values


def small(lines):
    found = groups(lines)
    body = []
    for (alpha, rule), rounds in found.items():
        last = spread([rows[-1]["accuracy"] for rows in rounds], 100, 1)
        difference = "" if rule == "backprop" else f"{gap(found, alpha, rule):+.1f}"
        body.append([f"alpha {alpha:g}" if alpha else "IID", f"`{rule}`", last, difference, largest(rounds, "work")])
    head = ["shards", "rule", "last round, %", "- backprop, points", "gradients + activations, MiB"]
    return table(head, body)


def tables(lines):
    found = groups(lines)
    first = lines[0]["options"]
    last = first["rounds"]
    shown = list(dict.fromkeys([1, 2, last]))
    body = []
    for (alpha, rule), rounds in found.items():
        cells = [f"alpha {alpha:g}" if alpha else "IID", f"`{rule}`"]
        cells += [spread([rows[number]["accuracy"] for rows in rounds], 100, 1) for number in shown]
        cells.append("" if rule == "backprop" else f"{gap(found, alpha, rule):+.1f}")
        cells += [largest(rounds, name) for name in ("bytes-down", "bytes-up", "memory", "work")]
        body.append(cells)
    head = [
        *("shards", "rule", *(f"round {number}, %" for number in shown), "- backprop, points", "down, MiB/round"),
        *("up, MiB/round", "peak, MiB", "of it gradients + activations"),
    ]
    text = wrapped(
        f"FedAvg (Flower) over {first['clients']} clients, {first['train_samples']:,} training images of MNIST in all; "
        f"MLP {first['depth']}x{first['width']}, {first['precision']}, batch {first['batch_size']}, "
        f"{first['local_epochs']} local epochs per round; AdamW at {first['lr']:g} (tuned for no rule), which begins "
        "anew in every round. Shards are IID, or skewed by a Dirichlet distribution over clients with alpha = 0.5. "
        "Accuracy is that of the averaged network on the 10,000 test images by the rule's own predictor, mean ± "
        f"standard deviation over {len(next(iter(found.values())))} seeds. *- backprop* is the mean of the differences "
        "seed by seed. Bytes and memory are those of one client, exact; memory is that of a training step. "
        "`forward_forward` has `loss=symba alpha=0.1 label_scale=5`, the other rules their default options."
    )
    return [*text, "", *table(head, body)]
