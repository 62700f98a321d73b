"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from layerwise.memory import MemoryUse


class Progress:
    """Shows loss, accuracy, samples per second, memory and the time left.

    Args:
        total: steps in the whole run.
        per_epoch: steps in an epoch.
        title: first line.
    """

    def __init__(self, total: int, per_epoch: int, title: str):
        self.total, self.per_epoch = total, per_epoch
        self.console = Console(stderr=True, highlight=False)
        self.console.print(title, markup=False, soft_wrap=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # so that all of it fits into 80 columns
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=total)
        self.started = time.perf_counter()
        self.train: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, step: int, values: dict[str, float], speed: float) -> None:
        """Update the bar with the newest training scalars."""
        self.train = values
        self.bar.update(self.task, completed=step, description=self._line(step, {}, speed, None))

    def epoch(self, step: int, val: dict[str, float], speed: float, memory: MemoryUse | None) -> None:
        """Print one line at the end of an epoch."""
        line = self._line(step, val, speed, memory)
        if not self.console.is_terminal:
            line += f" · {self._left(step)} left"
        self.console.print(line, markup=False, soft_wrap=True)
        self.bar.update(self.task, completed=step)

    def _line(self, step: int, val: dict[str, float], speed: float, memory: MemoryUse | None) -> str:
        parts = [f"epoch {step / self.per_epoch:.1f}"]
        if "head/loss" in self.train:
            parts.append(f"loss {self.train['head/loss']:.3f}")
        if "head/accuracy" in val:
            parts.append(f"val {100 * val['head/accuracy']:.2f} %")
        elif "head/accuracy" in self.train:
            parts.append(f"train {100 * self.train['head/accuracy']:.1f} %")
        parts.append(f"{speed:,.0f} samples/s")
        if memory is not None:
            parts.append(f"{memory.peak / 2**20:,.1f} MiB")
        return " · ".join(parts)

    def _left(self, step: int) -> str:
        seconds = (time.perf_counter() - self.started) / step * (self.total - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
