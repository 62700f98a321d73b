"""Settings of a comparison besides those of its runs. This module does not import torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

RIVALS = ("sll", "sid", "local_ce", "backprop", "backprop_checkpoint")


@dataclass(frozen=True)
class ComparisonSettings:
    """Which rules and seeds are compared, and on what budget."""

    rules: Annotated[tuple[str, ...], arg(name="rule")] = RIVALS
    """Rules, with options after colons: sll sll:overlap=1:lr=2e-3 backprop; several numbers as weight=0/1; an
    option of the model as backprop:model.depth=2; or all."""
    seeds: int = 3
    """Number of seeds: 0, 1, ..."""
    budget: Literal["epochs", "steps", "seconds", "flops"] | None = None
    """The budget of every run; its amount is --epochs, --steps, --seconds or --flops."""
    seconds: float | None = None
    """Seconds of training per run, converted to steps by a measurement before the first run."""
    flops: float | None = None
    """Floating-point operations of training per run, converted to steps in the same way."""
    tune: int = 0
    """Trials of learning rate and weight decay per rule, chosen on the validation split; 0 for none."""
    depths: str = "auto"
    """Numbers of blocks, such as 4,16,64, at which the memory of a step is measured too; none for no such figures;
    auto for 4,16,64 where that takes little time beside the runs."""
    jobs: int | None = None
    """Number of runs at the same time (default: as many as cores and memory allow)."""
    report: bool = True
    """Diagnose the finished runs (of classes) and write report.html."""
