"""Resident memory and time per step of blocks that are offloaded to disk."""

import statistics

from evidence import table, wrapped


def parts(lines):
    found = {line["name"]: line for line in lines}
    return found["memory"]["rows"], found["time"]


def place(row):
    """`disk` or `none`; the option was called `stream` when the stored rows were measured."""
    return row["offload"] if "offload" in row else row["stream"]


def figures(lines):
    rows, time = parts(lines)
    held = {(place(row), row["depth"]): row["resident_mib"] for row in rows}
    depths = sorted({depth for _, depth in held})
    return {
        "last": f"{held['disk', depths[-1]]:.0f}",
        "none_last": f"{held['none', depths[-1]]:.0f}",
        "ratio": f"{held['disk', depths[-1]] / held['disk', depths[0]]:.3f}",
        "time": f"{time['ratio']:.3f} ({time['low']:.3f} .. {time['high']:.3f})",
    }


def small(lines):
    body = []
    for row in parts(lines)[0]:
        state = 3 * row["parameters"] * 4 / 2**20
        lie_in = "disk" if place(row) == "disk" else "memory"
        cells = [f"{state:.0f}", lie_in, f"{row['resident_mib']:.0f}", f"{row['exact_mib']['peak']:.0f}"]
        body.append([str(row["depth"]), *cells])
    return table(["blocks", "parameters + state, MiB", "blocks lie in", "resident, MiB", "exact, MiB"], body)


def tables(lines):
    _, time = parts(lines)
    seconds = {name: statistics.median(found) for name, found in time["seconds"].items()}
    text = wrapped(
        "MLP of width 2048, `sll`, AdamW, batch 512, one thread. A block's weight is 16 MiB, 48 MiB with the "
        "optimizer's state. Resident is the system's high-water mark (VmHWM) of a whole `layerwise train` of 3 steps "
        "with checkpoint and evaluation, in a process of its own. Exact is the peak of the memory meter in one step; "
        "it counts parameters and optimizer state as far as they are on the device."
    )
    text += ["", *small(lines), ""]
    return text + wrapped(
        f"Time per step at {time['depth']} blocks, offloaded divided by not, median of {len(time['seconds']['disk'])} "
        f"interleaved pairs (10 % .. 90 %): {time['ratio']:.3f} ({time['low']:.3f} .. {time['high']:.3f}); "
        f"{seconds['disk']:.2f} s and {seconds['none']:.2f} s."
    )
