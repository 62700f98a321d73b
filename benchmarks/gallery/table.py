"""The gallery as tables: training, memory at two depths, what must hold to the bit."""

from evidence import table, wrapped

RULES = ("sll", "sid", "local_ce", "mono_forward", "backprop")


def cells(line):
    return {row["rule"]: row for row in line["rows"]}


def trained(lines):
    return [row for line in lines for row in line["rows"] if "refused" not in row]


def growth(lines, rules):
    """Memory at the larger depth over that at the smaller one, where blocks are equal."""
    rows = [row for line in lines if line["equal"] for row in line["rows"] if row["rule"] in rules and "bytes" in row]
    return [row["bytes"][1] / row["bytes"][0] for row in rows]


def figures(lines):
    rows, back = trained(lines), growth(lines, ("backprop",))
    return {
        "networks": str(len(lines)),
        "cells": str(sum(len(line["rows"]) for line in lines)),
        "trained": str(sum(row["falls"] for row in rows)),
        "same": str(sum(row["same"] for row in rows)),
        "plain": str(sum(row.get("plain", False) for row in rows)),
        "growth": f"{100 * (max(growth(lines, RULES[:-1])) - 1):.1f}",
        "backprop_low": f"{min(back):.1f}",
        "backprop_high": f"{max(back):.1f}",
    }


def ordered(lines):
    return sorted(lines, key=lambda line: (line["library"] == "torch", line["library"], line["name"]))


def named(line):
    return [line["title"], line["library"]]


def small(lines):
    reasons = refusals(lines)
    body = []
    for line in ordered(lines):
        found = []
        for row in (cells(line)[rule] for rule in RULES):
            if "refused" in row:
                found.append(f"refused ({reasons.index(row['refused']) + 1})")
            else:
                found.append(f"{row['first']:.2f} → {row['last']:.2f}{'' if row['falls'] else ' **no**'}")
        body.append([*named(line), *found])
    text = table(["network", "library", *(f"`{rule}`" for rule in RULES)], body)
    return [*text, *(line for i, reason in enumerate(reasons, 1) for line in ["", *wrapped(f"({i}) {reason}")])]


def refusals(lines):
    return list(dict.fromkeys(row["refused"] for line in ordered(lines) for row in line["rows"] if "refused" in row))


def memory(lines):
    body = []
    for line in ordered(lines):
        found = [cells(line)[rule].get("bytes") for rule in RULES]
        shown = [f"{a / 2**20:.2f}, × {b / a:.2f}" if a else "" for a, b in (pair or (0, 0) for pair in found)]
        depths = "{} and {}".format(*line["depths"])
        body.append([*named(line), depths, "yes" if line["equal"] else "no", *shown])
    return table(["network", "library", "blocks", "equal", *(f"`{rule}`" for rule in RULES)], body)


def bits(lines):
    body = []
    for line in ordered(lines):
        rows = [row for row in line["rows"] if "refused" not in row]
        (plain,) = (row["plain"] for row in rows if "plain" in row)
        held = [all(row[what] for row in rows) for what in ("same", "local", "frozen")]
        body.append([*named(line), *("yes" if good else "**no**" for good in (*held, plain))])
    head = ["network", "library", "`learner(x)` is the model", "local", "frozen stays", "`backprop` is the plain loop"]
    return table(head, body)


def tables(lines):
    text = wrapped(
        'Small networks with random weights, cut at their own calls: `Learner(model, rule)` with `cuts="auto"` or '
        "patterns. One batch, 20 steps of AdamW, one thread; the loss at the head (that of the task) in the first step "
        "and in the last one. Batches are dictionaries with masks and -100 where the library has them. `networks.py` "
        "lists the networks; `entry.py` says how a torchvision for CUDA is imported beside a torch for the CPU."
    )
    text += ["", "## Training", "", *small(lines), "", "## Memory", ""]
    text += wrapped(
        "Activations and gradients of a step at the smaller depth in MiB, and how many times that the larger depth "
        "takes; exact bytes of the project's meter."
    )
    text += ["", *memory(lines), "", "## To the bit", ""]
    text += wrapped(
        "Over all rules of a row. *`learner(x)` is the model*: equal bits to the model's own output in evaluation "
        "mode, for `sid` to its beliefs about what the model's own blocks return. *Local*: no path of the graph "
        "of a group's loss leads to a parameter that is another group's alone, by a walk from the loss to the "
        "leaves. *Frozen stays*: parameters without `requires_grad` keep their bits. *`backprop` is the plain "
        "loop*: after three steps parameters and buffers have the bits of an ordinary loop with the library's own "
        "loss where it has one, under the same random draws."
    )
    return [*text, "", *bits(lines)]
