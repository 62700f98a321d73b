"""Options of the benchmarks. This module does not import torch, so that help appears at once."""

from dataclasses import dataclass, field
from typing import Literal

from layerwise.core.ranges import Where, check_ranges

CLASSES = 10


@dataclass(frozen=True)
class Written:
    """Where to write the results of a benchmark."""

    json: str | None = None
    """Write the results as JSON to this file (a name without .json as --json=FILE); alone, or with -,
    print them instead of the table."""
    out: str | None = None
    """Write results, command, machine and report.html to this folder; the report of a comparison gains a section."""


@dataclass(frozen=True)
class Problem(Written):
    """The model, batch and optimizer that every benchmark trains."""

    model_options: dict[str, float] = field(default_factory=dict)
    """Numbers for the model; --model.width 256 is the same as --model-options width 256."""
    shape: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width of the random images; 1 1 T for windows of T tokens."""
    batch_size: int = 64
    """Samples per batch."""
    optimizer: str = "adamw"
    """Optimizer of every rule."""
    threads: int | None = None
    """Threads of the CPU, of each process."""


@dataclass(frozen=True)
class DeviceProblem(Problem):
    """A problem on one device."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the blocks (autocast)."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto."""
    micro: int = 1
    """Number of parts in which every block runs its batch."""
    classes: int = CLASSES
    """Outputs of the network; of a language model its vocabulary."""

    def __post_init__(self) -> None:
        check_ranges(micro=self.micro)


@dataclass(frozen=True)
class MemoryOptions(DeviceProblem):
    """Measure the exact peak bytes of one training step, by depth."""

    rule: tuple[str, ...] = ("sll", "local_ce", "backprop", "backprop_checkpoint", "backprop_offload")
    """Rules to measure, with options after colons: solo:group=3:readout=random."""
    model: tuple[str, ...] = ("mlp",)
    """Models to measure."""
    depths: str = "4,16,64,256"
    """Numbers of blocks, separated by commas."""
    offload: Where = "none"
    """none | host | disk: where idle blocks are kept; each row then has its own process, and its resident peak."""
    offload_folder: str | None = None
    """Folder for the file of --offload disk (default: the folder for temporary files)."""


@dataclass(frozen=True)
class SpeedOptions(DeviceProblem):
    """Measure the time per training step. Rules are interleaved: every round runs each rule once."""

    rule: tuple[str, ...] = ("sll", "backprop", "backprop_checkpoint")
    """Rules to time, with options after colons: solo:group=3. Ratios are to backprop if it is among them, otherwise to
    the first rule."""
    model: str = "vit"
    """mlp | vgg | resnet | vit."""
    depth: int | None = None
    """Number of blocks (default: that of the model)."""
    rounds: int = 10
    """Rounds that are measured."""
    warmup: int = 2
    """Rounds before the measured ones."""
