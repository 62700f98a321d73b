"""What every benchmark shares: its problem (model, random batch, optimizer), its options, and its files."""

import contextlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise import models
from layerwise.core.devices import pick_device
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.ranges import Where, check_ranges
from layerwise.core.tasks import LanguageModel
from layerwise.core.trees import mapped
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.memory.mmap import OnFile
from layerwise.parsing import parse
from layerwise.report.page import write_report
from layerwise.rules.words import rule_of
from layerwise.runs.environment import environment
from layerwise.runs.output import check_output, write_output
from layerwise.runs.writing import write_atomically

CLASSES = 10
CPU = torch.device("cpu")
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Problem:
    """The model, batch and optimizer that every benchmark trains, and where the results go."""

    model_options: dict[str, float] = field(default_factory=dict)
    """Numbers for the model: --model-options width 256."""
    shape: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width of the random images; 1 1 T for windows of T tokens."""
    batch_size: int = 64
    """Samples per batch."""
    optimizer: str = "adamw"
    """Optimizer of every rule."""
    threads: int | None = None
    """Threads of the CPU, of each process."""
    json: str | None = None
    """Also write the results to this file."""
    out: str | None = None
    """Write results, command, machine and report.html to this folder; the report of a comparison gains a section."""


@dataclass(frozen=True)
class DeviceProblem(Problem):
    """A problem on one device."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the blocks (autocast)."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto."""
    micro: int = 1
    """Parts in which every block runs its batch."""
    classes: int = CLASSES
    """Outputs of the network; of a language model its vocabulary."""

    def __post_init__(self) -> None:
        check_ranges(micro=self.micro)


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
    """The options of a model, with a number of blocks where it has one."""
    kind = models.options(model)
    if depth is not None and "depth" not in {f.name for f in fields(kind)}:
        raise LayerwiseError(f"{model!r} has no option depth; leave --depth out, or let the function have it.")
    return kind.from_numbers(model_options, depth)


def batch_of(shape: Sequence[int], batch_size: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Random images `(B, C, H, W)` and labels `(B,)`: the same in every process."""
    with preserved_generators(CPU):
        seed_generators(derive_seed(0, "bench batch"), CPU)
        return torch.randn(batch_size, *shape), torch.randint(classes, (batch_size,))


def parse_problem(cls: type, argv: Sequence[str], command: str) -> Any:
    """Parse the options of a benchmark, and check what can be checked before anything is measured.

    Raises:
        LayerwiseError: an unknown option or rule, a number out of range, a file or folder that cannot be written.
    """
    options = parse(cls, argv, command)
    if options.threads is not None:
        if options.threads < 1:
            raise LayerwiseError(f"threads is {options.threads}; it must be 1 or more.")
        torch.set_num_threads(options.threads)
    if options.json is not None and not Path(options.json).parent.is_dir():
        raise LayerwiseError(f"cannot write {options.json}: there is no folder {Path(options.json).parent}.")
    if options.json is not None:
        check_output(Path(options.json))
    if options.out is not None:
        try:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise LayerwiseError(
                f"cannot write to {options.out} ({reason.strerror}); choose another --out."
            ) from reason
    if min(options.shape) < 1 or options.batch_size < 1 or getattr(options, "classes", 1) < 1:
        raise LayerwiseError("shape, batch size and classes must be 1 or more.")
    names = getattr(options, "rules", None) or getattr(options, "rule", ())
    if not names:
        raise LayerwiseError(f"{command} measures no rule; name at least one, see layerwise ls rules.")
    for word in [names] if isinstance(names, str) else names:
        rule_of(word)
    return options


def write_figures(options: Any, rows: list[dict[str, Any]], kind: str, argv: Sequence[str]) -> int:
    """Write the files that the options ask for; returns the exit code."""
    if options.json is not None:
        write_output(Path(options.json), json.dumps(rows, indent=2) + "\n")
    if options.out is not None:
        command = shlex.join(["layerwise", "bench", kind, *argv])
        found = {"command": command, "environment": environment(), "rows": rows}
        write_atomically(Path(options.out) / f"{kind}.json", json.dumps(found, indent=2) + "\n")
        print(f"report: {write_report(Path(options.out))}")
    return 0
