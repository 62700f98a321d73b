"""Time per step as a ratio to backpropagation, by depth."""

from evidence import table, wrapped

MODELS = {"mlp": "MLP", "conv": "conv net", "vit": "ViT"}


def ratios(lines, kinds, rule):
    """Ratios of the rule at 4 to 64 blocks."""
    named = [line for line in lines if line["name"][:-2] in kinds and line["name"] != "mlp03"]
    return [row["ratio"] for line in named for row in line["rows"] if row["rule"] == rule]


def figures(lines):
    found = {kind: ratios(lines, [kind], "sll") for kind in MODELS}
    found["checkpoint"] = ratios(lines, list(MODELS), "backprop_checkpoint")
    ends = {f"{name}_low": min(values) for name, values in found.items()}
    ends |= {f"{name}_high": max(values) for name, values in found.items()}
    return {name: f"{value:.2f}" for name, value in ends.items()}


def small(lines):
    return by_network(lines, ("04", "64"))


def by_network(lines, depths):
    measured = [line for line in lines if line["name"][:-2] in MODELS and line["name"][-2:] in depths]
    rules = [row["rule"] for row in measured[0]["rows"]]
    body = []
    for line in measured:
        found = {
            row["rule"]: f"{row['ratio']:.2f} ({row['ratio_10']:.2f} .. {row['ratio_90']:.2f})" for row in line["rows"]
        }
        network = f"{MODELS[line['name'][:-2]]}, {int(line['name'][-2:])} blocks"
        body.append([network, *(found[rule] for rule in rules)])
    return table(["network", *(f"`{rule}`" for rule in rules)], body)


def tables(lines):
    text = wrapped(
        "Time per step divided by backpropagation's: median of interleaved steps, with the values at 10 % and 90 %. "
        "One thread, random data. The shares of a step are those of forward, backward, optimizer and the rest."
    )
    text += ["", *by_network(lines, ("03", "04", "12", "24", "64")), "", "## Each measurement"]
    for line in (line for line in lines if line["name"][:-2] in MODELS):
        body = [
            [
                f"`{row['rule']}`",
                f"{1000 * row['seconds']:.2f}",
                f"{row['samples_per_second']:.0f}",
                f"{row['ratio']:.3f} ({row['ratio_10']:.3f} .. {row['ratio_90']:.3f})",
                f"{row['flops'] / 1e9:.2f}",
                " / ".join(f"{100 * share:.0f}" for share in row["shares"].values()),
            ]
            for row in line["rows"]
        ]
        head = ["rule", "ms/step", "samples/s", "ratio to backprop", "GFLOP", "shares, %"]
        text += ["", f"`{line['name']}`: `{line['command']}`", "", *table(head, body)]
    for line in (line for line in lines if line["name"] == "profile"):
        names = list(line["rows"][0]["shares"])
        body = [
            [
                f"`{row['rule']}`",
                row["model"],
                f"{row['milliseconds']:.1f}",
                *(f"{100 * row['shares'][name]:.1f}" for name in names),
            ]
            for row in line["rows"]
        ]
        text += ["", "## Where the time of a step goes", "", f"`{line['command']}`", ""]
        text += table(["rule", "model", "ms/step", *(f"{name}, %" for name in names)], body)
    return text
