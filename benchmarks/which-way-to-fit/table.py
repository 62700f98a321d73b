"""Memory and time of every way to fit a network, beside plain backpropagation."""

from evidence import table, wrapped

NETWORKS = {
    "mlp": "MLP of 24 blocks of width 512, batch 512",
    "conv": "conv net of 8 blocks of width 32, batch 64",
    "vit": "ViT of 12 blocks of width 96, batch 32",
    "short": "ViT of 12 blocks of width 96 on 16 patches, batch 64",
    "gpt": "GPT of 12 blocks of width 96, 8 windows of 128 of 1,024 tokens",
}


def rows_of(lines, name):
    return {row["way"]: row for line in lines if line["name"] == name for row in line["rows"]}


def held(row):
    return (row["activations"] + row["gradients"]) / 2**20


def figures(lines):
    found = {}
    for name in NETWORKS:
        for way, row in rows_of(lines, name).items():
            key = f"{name}_{way}".replace(" ", "_").replace("+_", "").replace(",", "")
            found |= {f"{key}_mib": f"{held(row):.1f}", f"{key}_time": f"{row['ratio']:.2f}"}
    return found


def small(lines):
    """Per network the memory and the time of the ways, side by side."""
    ways = list(dict.fromkeys(way for name in NETWORKS for way in rows_of(lines, name)))
    body = []
    for way in ways:
        cells = [rows_of(lines, name).get(way) for name in NETWORKS]
        body.append([way, *("" if row is None else f"{held(row):.1f} at {row['ratio']:.2f}" for row in cells)])
    return table(["way", *(f"{text}" for text in NETWORKS.values())], body)


def tables(lines):
    text = wrapped(
        "Activations + gradients in MiB at the time per sample as a multiple of plain backpropagation's. Memory is "
        "exact, of one step. Time is the median of interleaved steps, one thread, AdamW, random data, in seconds of "
        "the processor (the machine had other work; waiting for a disk does not count); of `block_rota` it is the mean "
        "over as many turns, drawn at random, and its memory the largest of a round. `accumulate n` is gradient "
        "accumulation: the whole network runs n parts of the batch, one after the other. `blocks in n parts`: each "
        "block of a local rule runs the batch in n parts and steps, before the next block does. With batch norm (the "
        "conv net) parts have statistics of their own. On the GPT `local_ce` and `sll` read out through the network's "
        "own output matrix (`readout=shared`), and the modules of `solo` have heads of two blocks."
    )
    text += ["", *small(lines)]
    for name, words in NETWORKS.items():
        body = [
            [
                way,
                f"{row['activations'] / 2**20:.2f}",
                f"{row['gradients'] / 2**20:.2f}",
                f"{row['optimizer'] / 2**20:.2f}",
                f"{1e3 * row['seconds']:.2f}",
                f"{row['ratio']:.2f} ({row['low']:.2f} .. {row['high']:.2f})",
            ]
            for way, row in rows_of(lines, name).items()
        ]
        head = ["way", "activations, MiB", "gradients, MiB", "optimizer, MiB", "ms per sample", "time (10 % .. 90 %)"]
        text += ["", f"## {words[0].upper()}{words[1:]}", "", *table(head, body)]
    return text
