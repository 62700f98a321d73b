"""Exact peak bytes of one training step by depth."""

from evidence import table, wrapped

TITLES = {
    "mlp": "MLP of width 256, batch 64",
    "conv": "Conv net of width 16, batch 16",
    "vit": "ViT of width 64, batch 8",
}
COLUMNS = ("parameters", "optimizer", "gradients", "activations", "peak")


def held(rows):
    """(rule, depth) to MiB of activations and gradients."""
    return {(row["rule"], row["depth"]): (row["activations"] + row["gradients"]) / 2**20 for row in rows}


def figures(lines):
    (vit,) = (line for line in lines if line["name"] == "vit")
    return {f"{rule}_{depth}": f"{mib:.1f}" for (rule, depth), mib in held(vit["rows"]).items()}


def small(lines):
    body = []
    for line in (line for line in lines if line["name"] == "vit"):
        found = held(line["rows"])
        depths = sorted({depth for _, depth in found})
        for rule in dict.fromkeys(rule for rule, _ in found):
            body.append([TITLES[line["name"]], f"`{rule}`", *(f"{found[rule, depth]:.1f}" for depth in depths)])
    return table(["network", "rule", *(f"{depth} blocks, MiB" for depth in depths)], body)


def tables(lines):
    text = wrapped(
        "One training step, exact bytes on the CPU, MiB. Only activations and gradients are the rule's doing; "
        "parameters and optimizer state grow with depth whatever the rule. `docs/images/memory.svg` is drawn from "
        "these rows."
    )
    for line in lines:
        body = [
            [f"`{row['rule']}`", str(row["depth"]), *(f"{row[name] / 2**20:.3f}" for name in COLUMNS)]
            for row in line["rows"]
        ]
        text += [
            "",
            f"## {TITLES[line['name']]}",
            "",
            f"`{line['command']}`",
            "",
            *table(["rule", "blocks", *COLUMNS], body),
        ]
    return text
