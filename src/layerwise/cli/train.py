"""`layerwise train`: train a network in one process, or as one rank of several."""

import math
import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.cli.early import check_options
from layerwise.cli.flags import check_flags
from layerwise.errors import LayerwiseError, say
from layerwise.parsing import environment_number, parse, take_option
from layerwise.runs.launch import ParallelOptions
from layerwise.runs.layout import check_run
from layerwise.terminal import indented, terminal_width


def train_command(argv: list[str]) -> int:
    """`layerwise train`: train a network, or continue a run."""
    command = shlex.join(["layerwise", "train", *argv])
    argv = list(argv)
    json = take_option(argv, "json")
    words = list(argv)
    resume = take_option(words, "resume")
    folder, launch = None if resume is None else Path(resume), None
    if folder is not None:
        given = {f.name: take_option(words, f.name) for f in fields(ParallelOptions)}
        if words:
            raise LayerwiseError(
                f"--resume continues a run with its own options, so {' '.join(words)!r} cannot be given; leave it out."
            )
        words += [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
        launch = parse(ParallelOptions, words, "train")
        check_run(folder)
    elif take_option(list(argv), "parallel") in (None, "none"):  # one rank reports it for all
        check_options(argv, "recipe", "rule", "model", "data")
        check_flags("train", argv)
    from layerwise.runs import distributed, pipelined, replicated
    from layerwise.runs.arguments import train_options
    from layerwise.runs.folders import read_options
    from layerwise.runs.interrupt import Interrupted
    from layerwise.runs.options import TrainOptions
    from layerwise.runs.output import check_json, write_json
    from layerwise.runs.training import Run

    if folder is None or launch is None:
        launch = train_options(argv, "train", distributed.TrainCommand)
        options = TrainOptions(**{f.name: getattr(launch, f.name) for f in fields(TrainOptions)})
    else:
        options = read_options(folder)
    as_json = check_json(json)

    def done(result: dict[str, Any], folder: Path) -> None:
        if not as_json:
            print(result_table(result, folder))
        write_json(json, result | {"folder": str(folder)})

    if launch.parallel != "none":
        if launch.parallel == "sharded":
            from layerwise.runs.sharded import ShardedRun as kind  # here, as fully_shard takes seconds to import
        else:
            kind = {"pipeline": pipelined.PipelineRun, "data": replicated.DataRun}[launch.parallel]
        return distributed.train_rank(kind, launch, options, command, folder, done)
    if "TORCHELASTIC_RUN_ID" in os.environ and environment_number("WORLD_SIZE", 1) > 1:
        raise LayerwiseError(
            "torchrun has started several processes of the same run; add --parallel pipeline, data or sharded."
        )
    run = Run(options, command, folder)
    try:
        result = run.train()
    except Interrupted as stop:
        say(str(stop))
        return 128 + stop.signum
    done(result, run.folder)
    return 0


def result_table(result: dict[str, Any], folder: Any) -> str:
    """The results of a run as a table of two columns, for a person to read."""
    from layerwise.core.tasks import metric_of
    from layerwise.report.verdict import FEW

    memory, metric = result["memory_mib"], metric_of(result["task"])
    val = result[f"val_{metric.name}"]
    updates = math.ceil(result["steps"] / result.get("options", {}).get("accumulate", 1))  # older results have none
    held = ", ".join(f"{name} {memory[name]:.1f}" for name in ("parameters", "optimizer", "gradients", "activations"))
    rows = {
        "rule": f"{result['rule']} on {result['model']}, {result['data']}, seed {result['seed']}",
        f"test {metric.words}": metric.written(result[f"test_{metric.name}"]),
        f"val {metric.words}": "none" if val is None else metric.written(val),
        "by block": " ".join(f"{name} {metric.factor * value:.1f}" for name, value in result["blocks"].items()),
        "updates": f"{updates:,}",
        "training time": f"{result['train_seconds']:.1f} s, {result['samples_per_second']:,.0f} samples/s",
        "peak memory": f"{memory['peak']:.1f} MiB ({held})",
        "files": str(folder),
    }
    if result["skipped_steps"]:
        rows["skipped steps"] = str(result["skipped_steps"])
    if result.get("chance") is not None:
        rows["updates"] += f"; always answering the most frequent class gives {100 * result['chance']:.1f} %"
    if updates < FEW:
        rows["updates"] += f"; under {FEW} updates results say little about longer training"
    rows |= {f"note {i}": note for i, note in enumerate(result["notes"], 1)}
    margin, width = max(map(len, rows)) + 2, terminal_width()
    return "\n".join(indented(name, value, margin, width) for name, value in rows.items())
