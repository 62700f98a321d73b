"""Shared by all benchmarks: the problem (model, random batch, optimizer) and the files."""

import contextlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise import models
from layerwise.core.devices import pick_device
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.ranges import Where
from layerwise.core.tasks import LanguageModel
from layerwise.core.trees import mapped
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.measure.bench_options import CLASSES
from layerwise.memory.mmap import OnFile
from layerwise.parsing import parse
from layerwise.report.page import write_report
from layerwise.rules.words import rule_of
from layerwise.runs.environment import environment
from layerwise.runs.output import check_json, write_json
from layerwise.runs.writing import write_atomically

CPU = torch.device("cpu")
LEARNING_RATE = 1e-4


def prepared(
    rule: str,
    model: str,
    depth: int | None,
    shape: tuple[int, int, int],
    batch_size: int,
    optimizer: str,
    precision: Literal["fp32", "bf16", "fp16"],
    device: str,
    model_options: dict[str, float],
    offload_to: tuple[Where, str | None] = ("none", None),
    micro: int = 1,
    classes: int = CLASSES,
) -> tuple[Learner, Any, Tensor]:
    """A learner on the device, with a batch `(B, C, H, W)`, or what else the model takes, and its labels."""
    where = pick_device(device)
    offload, folder = offload_to[0], Path(offload_to[1] or tempfile.gettempdir())
    with OnFile(folder) if offload == "disk" else contextlib.nullcontext():  # as in a run: never all of it in memory
        network = network_of(model, depth, shape, model_options, classes)
    x, y = batch_of(shape, batch_size, classes)
    how: dict[str, Any] = {"micro": micro, "device": where, "offload": offload, "offload_folder": folder}
    made = options_of(model, depth, model_options)
    if isinstance(made, models.OutsideModel):
        network = models.outside.cut(network, "block", None, None, None)
        how |= {"task": LanguageModel()} if made.positions else {}
    elif made.tokens:
        how |= {"task": LanguageModel(shift=False)}
    if isinstance(made, models.OutsideModel) or made.tokens:
        with preserved_generators(CPU):
            seed_generators(derive_seed(0, "bench batch"), CPU)
            x, y = made.batch(shape, classes, batch_size)
    x, y = mapped(x, lambda tensor: tensor.to(where)), y.to(where)
    return (
        Learner(network, rule_of(rule), optimizer=optimizer, precision=precision, lr=LEARNING_RATE, example=x, **how),
        x,
        y,
    )


def network_of(
    model: str, depth: int | None, shape: Sequence[int], model_options: dict[str, float], classes: int = CLASSES
) -> Any:
    """Build the network that is measured: the same weights in every process."""
    with preserved_generators(CPU):
        seed_generators(derive_seed(0, "bench"), CPU)
        channels, height, width = shape
        return options_of(model, depth, model_options).build((channels, height, width), classes)


def options_of(model: str, depth: int | None, model_options: dict[str, float]) -> models.ModelOptions:
    """The options of a model, with a number of blocks if it has one."""
    kind = models.options(model)
    if depth is not None and "depth" not in {f.name for f in fields(kind)}:
        raise LayerwiseError(f"{model!r} has no option depth; leave --depth out, or add it to the function.")
    return kind.from_numbers(model_options, depth)


def batch_of(shape: Sequence[int], batch_size: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Random images `(B, C, H, W)` and labels `(B,)`: the same in every process."""
    with preserved_generators(CPU):
        seed_generators(derive_seed(0, "bench batch"), CPU)
        return torch.randn(batch_size, *shape), torch.randint(classes, (batch_size,))


def parse_problem(cls: type, argv: Sequence[str], command: str) -> Any:
    """Parse the options of a benchmark, and check them as far as possible before anything is measured.

    Raises:
        LayerwiseError: an unknown option or rule, a number out of range, a file or folder that cannot be written.
    """
    options = parse(cls, argv, command)
    if options.threads is not None:
        if options.threads < 1:
            raise LayerwiseError(f"threads is {options.threads}; it must be 1 or more.")
        torch.set_num_threads(options.threads)
    check_json(options.json)
    if options.out is not None:
        try:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise LayerwiseError(
                f"cannot write to {options.out} ({reason.strerror}); choose another --out."
            ) from reason
    if min(options.shape) < 1 or options.batch_size < 1 or getattr(options, "classes", 1) < 1:
        raise LayerwiseError("shape, batch size and classes must be 1 or more.")
    names = options.rule
    if not names:
        raise LayerwiseError(f"{command} measures no rule; name at least one, see layerwise ls rules.")
    for word in [names] if isinstance(names, str) else names:
        rule_of(word)
    return options


def write_figures(options: Any, rows: list[dict[str, Any]], kind: str, argv: Sequence[str]) -> int:
    """Write the files that the options ask for; returns the exit code."""
    write_json(options.json, rows)
    if options.out is not None:
        command = shlex.join(["layerwise", "bench", kind, *argv])
        found = {"command": command, "environment": environment(), "rows": rows}
        write_atomically(Path(options.out) / f"{kind}.json", json.dumps(found, indent=2) + "\n")
        page = write_report(Path(options.out))
        if options.json != "-":
            print(f"report: {page}")
    return 0
