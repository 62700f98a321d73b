"""Resident memory and seconds per step of a Llama that is never in memory as a whole."""

import statistics

from evidence import table, wrapped


def rows_of(lines):
    return [row for line in lines for row in line["rows"]]


def gib(number):
    return f"{number / 2**30:.2f}"


def figures(lines):
    rows = rows_of(lines)
    alone, apart = [r for r in rows if r["ranks"] == 1], [r for r in rows if r["ranks"] > 1]
    seconds = [statistics.median(row["step_seconds"]) for row in alone]
    return {
        "billions": f"{rows[0]['model_parameters'] / 1e9:.2f}",
        "held": gib(max(row["held_bytes"] for row in alone)),
        "peak": gib(max(row["peak"] for row in alone)),
        "rank_peak": gib(max(row["peak"] for row in apart)),
        "tokens": str(rows[0]["tokens"]),
        "seconds": f"{min(seconds):.0f} to {max(seconds):.0f}",
    }


def small(lines):
    body = []
    for row in rows_of(lines):
        losses = [sum(step.values()) / len(step) for step in (row["losses"][0], row["losses"][-1])]
        body.append(
            [
                row["rule"],
                row["library"],
                row["blocks"],
                gib(row["held_bytes"]),
                gib(row["build_peak"]),
                gib(row["peak"]),
                f"{row['build_seconds']:.0f}",
                f"{statistics.median(row['step_seconds']):.0f}",
                f"{losses[0]:.2f} to {losses[1]:.2f}",
            ]
        )
    head = ["rule", "model", "blocks here", "held, GiB", "built, GiB", "peak, GiB", "build, s", "step, s", "mean loss"]
    return table(head, body)


def tables(lines):
    row = rows_of(lines)[0]
    text = wrapped(
        "A Llama of 16 layers of width 2,048 (inner width 8,192, 32 heads, 16 of keys), in float32, over bytes: with a "
        f"vocabulary of 256 a readout of `local_ce` has half a million weights ({row['readout_parameters'] / 1e6:.1f} "
        "million in all) and a block 63 million. AdamW, `LanguageModel()`, "
        f"batches of {row['tokens']} bytes of this project's documentation, {len(row['step_seconds'])} steps, "
        f"{row['threads']} thread per process. The model is made under `torch.device('meta')`; a block is made when "
        "it is first needed, lies on the disk with its optimizer state, and is written to a safetensors file of its "
        f"own at the end ({row['saved_files']} files, {gib(row['saved_bytes'])} GiB)."
    )
    text += ["", *small(lines), ""]
    return text + wrapped(
        "*Held* is what the process trains: weights and optimizer state. *Peak* is the most that was ever resident, as "
        "Linux counts it (VmHWM, pages of mapped files included), from the start of Python to the end, and *built* the "
        "same when the learner is built. The system's file cache, which gives way to others, is not counted. *Step* is "
        "the median. The machine was shared with other work, so that seconds are rough. The loss is the mean over the "
        "blocks here, of the first and of the last step: four steps show that it is trained, no more."
    )
