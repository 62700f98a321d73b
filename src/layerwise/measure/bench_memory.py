"""`layerwise bench memory`: exact peak bytes of one training step, by depth."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch

from layerwise import models
from layerwise.core.ranges import Where
from layerwise.errors import LayerwiseError
from layerwise.measure.bench_options import CLASSES, MemoryOptions
from layerwise.measure.bench_problem import (
    CPU,
    options_of,
    parse_problem,
    prepared,
    write_figures,
)
from layerwise.memory.malloc import keep_freed_memory
from layerwise.memory.meter import resident_peak
from layerwise.memory.offload import window_of
from layerwise.memory.stores import DiskStore
from layerwise.parsing import read_whole
from layerwise.rules.words import rule_of
from layerwise.runs.progress import GridProgress
from layerwise.terminal import table, terminal_width

COLUMNS = ("parameters", "optimizer", "gradients", "activations", "peak")
HELD = "act. + grad."
"""The column that does not depend on depth under a local rule."""


def memory_of(
    rule: str,
    model: str,
    depth: int | None,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    batch_size: int = 64,
    optimizer: str = "adamw",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "cpu",
    offload: Where = "none",
    offload_folder: str | None = None,
    micro: int = 1,
    classes: int = CLASSES,
    **model_options: float,
) -> dict[str, Any]:
    """Measure the peak memory of a training step.

    Args:
        rule: name of a rule, with options after colons.
        model: name of a model.
        depth: number of blocks; None for the model's own.
        shape: channels, height, width.
        batch_size: samples per batch.
        optimizer: name of the optimizer.
        precision: precision of the blocks.
        device: where to run.
        offload: where idle blocks wait: none, host or disk.
        offload_folder: folder for the file of disk (default: the folder for temporary files).
        micro: parts in which every block runs its batch.
        classes: outputs of the network; of a language model its vocabulary.
        model_options: further options of the model.

    Returns:
        `rule`, `model`, `depth`, `offload`, and in bytes `parameters`, `optimizer`, `gradients`, `activations`, `peak`.
        Of an offloaded network, only the blocks that are on the device count.

    >>> row = memory_of("sll", "mlp", 2, shape=(1, 8, 8), batch_size=4, width=16)
    >>> row["parameters"]  # 65*16 + 17*16 + 17*10 weights and a fixed 10x16 projection
    6568
    """
    where = offload, offload_folder
    learner, x, y = prepared(
        rule, model, depth, shape, batch_size, optimizer, precision, device, model_options, where, micro, classes
    )
    learner.step(x, y)
    _, use = learner.measured_step(x, y)
    depth = len(learner.network.blocks) if depth is None else depth
    return {"rule": rule, "model": model, "depth": depth, "offload": offload, **asdict(use)}


def in_own_process(task: dict[str, Any]) -> dict[str, Any]:
    """Run `memory_of` in a process of its own; the row also has its largest resident size, `resident`."""
    command = [sys.executable, "-c", "from layerwise.measure import bench_memory; bench_memory.answer()"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        words = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise LayerwiseError(
            f"the process that measured {task['rule']} at depth {task['depth']} ended with exit code "
            f"{done.returncode} ({words[-1]}); choose smaller --depths, or look for what ended it."
        ) from None
    if "failure" in answer:
        raise LayerwiseError(answer["failure"])
    return answer


def answer() -> None:
    """Run in the other process: read the arguments of `memory_of` from standard input, print the row as JSON."""
    keep_freed_memory()
    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task.pop("threads"))
    try:
        answer = memory_of(**task)
        answer["resident"] = resident_peak()
    except LayerwiseError as error:
        answer = {"failure": str(error)}
    print(json.dumps(answer))


def depths_of(model: str, depths: list[int]) -> list[int] | list[None]:
    """The numbers of blocks at which to measure a model; a model without depth is measured once."""
    dials = {field.name for field in fields(models.options(model))}
    return depths if "depth" in dials else [None]


def memory_command(argv: list[str]) -> int:
    """`layerwise bench memory`: print a row per model, rule and depth."""
    options = parse_problem(MemoryOptions, argv, "bench memory")
    try:
        depths = [read_whole(depth) for depth in options.depths.split(",")]
    except ValueError as reason:
        raise LayerwiseError(f"--depths {options.depths!r} is not a list such as 4,16,64.") from reason
    by_model = {model: depths_of(model, depths) for model in options.model}
    for model, depth in [(name, depth) for name in options.model for depth in by_model[name]]:
        made = options_of(model, depth, options.model_options)
        if not isinstance(made, models.OutsideModel):
            with torch.device("meta"):  # report mistakes before the first measurement
                network = made.build(options.shape, options.classes)
            for rule in options.rule if options.offload != "none" else ():
                window_of(rule_of(rule), len(network.block_names))
    if options.offload == "disk":
        DiskStore(Path(options.offload_folder or tempfile.gettempdir()), CPU)  # refuses a folder that it cannot use
    rows, lines = [], []
    columns = (*COLUMNS, HELD) if options.offload == "none" else (*COLUMNS, HELD, "resident")
    count = len(options.rule) * sum(map(len, by_model.values()))
    progress = GridProgress(count, count, f"bench memory: {count} measurements, each of two steps")
    with progress:
        _measure(options, by_model, columns, rows, lines, progress)
    if options.json != "-":
        print(table([("rule", "model", "depth", *columns), *lines], terminal_width(), right=2))
        print("sizes in MiB")
    return write_figures(options, rows, "memory", argv)


def _measure(
    options: MemoryOptions,
    by_model: Mapping[str, Sequence[int | None]],
    columns: Sequence[str],
    rows: list[dict[str, Any]],
    lines: list[tuple[str, ...]],
    progress: GridProgress,
) -> None:
    """Add a row of figures, and its line of the table, for each model, rule and depth."""
    for model in options.model:
        for rule in options.rule:
            for depth in by_model[model]:
                task = {
                    "rule": rule,
                    "model": model,
                    "depth": depth,
                    "shape": options.shape,
                    "batch_size": options.batch_size,
                    "optimizer": options.optimizer,
                    "precision": options.precision,
                    "device": options.device,
                    "offload": options.offload,
                    "offload_folder": options.offload_folder,
                    "micro": options.micro,
                    "classes": options.classes,
                    **options.model_options,
                }
                apart = options.offload != "none"
                title = f"{rule} {model}" + ("" if depth is None else f", {depth} blocks")
                progress.begun(title, 1.0, lambda: 0.0)
                try:
                    row = in_own_process(task | {"threads": torch.get_num_threads()}) if apart else memory_of(**task)
                except LayerwiseError as reason:
                    if options.rule != MemoryOptions.rule or not issubclass(models.options(model), models.OutsideModel):
                        raise
                    progress.ended(title, f"{rule} is left out: {reason}")
                    break
                rows.append(row)
                sizes = row | {HELD: row["gradients"] + row["activations"]}
                figures = ["-" if sizes[name] is None else f"{sizes[name] / 2**20:.3f}" for name in columns]
                lines.append((rule, model, str(row["depth"]), *figures))
                progress.ended(title, f"{title}: peak {row['peak'] / 2**20:.1f} MiB")
