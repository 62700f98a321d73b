"""Exact peak bytes of one training step of a language model by depth."""

from evidence import table, wrapped

TITLE = "gpt of width 64, 4 windows of 128 tokens, 32,000 tokens in the vocabulary"
COLUMNS = ("parameters", "optimizer", "gradients", "activations", "peak")
NAMES = {
    "local": "local_ce:readout=shared",
    "solo": "solo:group=1:depth=1",
    "separate": "solo:group=1:depth=0:head=separate",
    "sll": "sll:readout=shared",
    "sll_separate": "sll:readout=shared:head=separate",
    "backprop": "backprop",
    "checkpoint": "backprop_checkpoint",
}


def held(lines):
    """(rule, depth) to MiB of activations and gradients."""
    rows = [row for line in lines for row in line["rows"]]
    return {(row["rule"], row["depth"]): (row["activations"] + row["gradients"]) / 2**20 for row in rows}


def figures(lines):
    found = held(lines)
    return {
        f"{name}_{depth}": f"{found[rule, depth]:.1f}"
        for name, rule in NAMES.items()
        for depth in sorted({depth for _, depth in found})
    }


def small(lines):
    found = held(lines)
    depths = sorted({depth for _, depth in found})
    body = [
        [TITLE, f"`{rule}`", *(f"{found[rule, depth]:.1f}" for depth in depths)]
        for rule in dict.fromkeys(rule for rule, _ in found)
    ]
    return table(["network", "rule", *(f"{depth} blocks, MiB" for depth in depths)], body)


def tables(lines):
    text = wrapped(
        "One training step, exact bytes on the CPU, MiB. Every rule has its peak at the loss of the head: two chunks "
        "of logits (131 positions each, 32 MiB; all logits would be 62.5) and the gradient of the output matrix (7.8). "
        "Local rules hold the activations of the last block beside them, as it learns together with the head, unless "
        "`head=separate`; checkpointing holds the input of every block, 0.125 MiB each, and backpropagation the "
        "activations of all."
    )
    for line in lines:
        body = [
            [
                f"`{row['rule']}`",
                str(row["depth"]),
                *(f"{row[name] / 2**20:.3f}" for name in COLUMNS),
                f"{(row['activations'] + row['gradients']) / 2**20:.3f}",
            ]
            for row in line["rows"]
        ]
        text += ["", f"## {TITLE}", "", f"`{line['command']}`", ""]
        text += table(["rule", "blocks", *COLUMNS, "act. + grad."], body)
    return text
