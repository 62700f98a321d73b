"""Memory, time and gradients of networks whose modules are replaced."""

from evidence import table, wrapped

NETWORKS = {
    "vit": "ViT of 6 blocks of width 96, batch 32",
    "mlp": "MLP of 12 blocks of width 512, ReLU, batch 512",
    "conv": "Conv net of 8 blocks of width 32, batch norm, ReLU, batch 64",
}


def rows_of(lines, name):
    return [row for line in lines if line["name"] == name for row in line["rows"]]


def held(row):
    return (row["activations"] + row["gradients"]) / 2**20


def alike(row, digits):
    """The cosine, in so many digits."""
    return "-" if row["cosine"] is None else f"{row['cosine']:.{digits}f}"


def figures(lines):
    found = {}
    for name in NETWORKS:
        for row in rows_of(lines, name):
            key = f"{name}_{row['rule']}_{row['replaced']}".replace(" + ", "_").replace(" ", "_")
            found |= {
                f"{key}_mib": f"{held(row):.1f}",
                f"{key}_time": f"{row['ratio']:.2f}",
                f"{key}_cosine": alike(row, 2),
            }
    return found


def small(lines):
    """Per network and replacement the memory and the time under each rule, and the cosine."""
    body = []
    for name, words in NETWORKS.items():
        rows = rows_of(lines, name)
        for way in dict.fromkeys(row["replaced"] for row in rows):
            own = {row["rule"]: row for row in rows if row["replaced"] == way}
            cells = [f"{held(own[rule]):.1f} at {own[rule]['ratio']:.2f}" for rule in ("backprop", "sll")]
            body.append([words, way, *cells, alike(own["backprop"], 2)])
    return table(["network", "replaced", "backprop, MiB at time", "sll, MiB at time", "cosine"], body)


def tables(lines):
    text = wrapped(
        "Activations + gradients in MiB of one step, and its time as a multiple of the same rule's on the network as "
        "it is: the median of interleaved steps, one thread, AdamW, random data, in seconds of the processor (the "
        "machine had other work). The cosine is that of all gradients of backpropagation with the exact ones, at "
        "the weights of the start. There the inputs of GELU lie near zero, where the steps of `approx_gelu` are about "
        "0 and 1 and the derivative about 1/2; on normally distributed inputs the cosine of one GELU is 0.95 (a test)."
    )
    for name, words in NETWORKS.items():
        body = [
            [row["rule"], row["replaced"], f"{held(row):.2f}", f"{row['ratio']:.2f}", alike(row, 3)]
            for row in rows_of(lines, name)
        ]
        text += ["", f"## {words}", "", *table(["rule", "replaced", "MiB", "time", "cosine"], body)]
    return text
