"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from layerwise.core.tasks import ACCURACY, Metric
from layerwise.errors import on_one_line, quiet
from layerwise.memory.meter import MemoryUse

SILENCE = 20.0
"""Seconds after which a run that prints plain lines says how far it is."""


class Progress:
    """Shows loss, accuracy (or the task's metric), samples per second, memory and the time left.

    Args:
        total: steps in the whole run.
        per_epoch: steps in an epoch.
        title: first line.
        silent: show nothing, as with --quiet.
        metric: shown beside the loss.
    """

    def __init__(self, total: int, per_epoch: int, title: str, silent: bool = False, metric: Metric = ACCURACY):
        self.total, self.per_epoch, self.metric = total, per_epoch, metric
        silent = silent or quiet.get()
        self.console = Console(stderr=True, highlight=False, quiet=silent)
        self.console.print(on_one_line(title), markup=False, soft_wrap=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # so that all of it fits into 80 columns
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=silent or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=total)
        self.started = self.told = time.perf_counter()
        self.train: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, step: int, values: dict[str, float], speed: float) -> None:
        """Update the bar with the newest training scalars; without a bar, print a line if the last one is old."""
        self.train = values
        if not self.console.is_terminal and time.perf_counter() - self.told > SILENCE:
            self._tell(step, {}, speed, None)
        self.bar.update(self.task, completed=step, description=self._line(step, {}, speed, None))

    def epoch(self, step: int, val: dict[str, float], speed: float, memory: MemoryUse | None) -> None:
        """Print one line at the end of an epoch."""
        self._tell(step, val, speed, memory)
        self.bar.update(self.task, completed=step)

    def _tell(self, step: int, val: dict[str, float], speed: float, memory: MemoryUse | None) -> None:
        line = self._line(step, val, speed, memory)
        if not self.console.is_terminal:
            line += f" · {self._left(step)} left"
        self.console.print(on_one_line(line), markup=False, soft_wrap=True)
        self.told = time.perf_counter()

    def _line(self, step: int, val: dict[str, float], speed: float, memory: MemoryUse | None) -> str:
        parts = [f"epoch {step / self.per_epoch:.1f}"]
        if "head/loss" in self.train:
            parts.append(f"loss {self.train['head/loss']:.3f}")
        name, words = f"head/{self.metric.name}", "" if self.metric == ACCURACY else f" {self.metric.words}"
        if name in val:
            parts.append(f"val{words} {self.metric.written(val[name])}")
        elif name in self.train:
            factor, unit = self.metric.factor, " %" if self.metric.share else ""
            parts.append(f"train{words} {factor * self.train[name]:.1f}{unit}")
        parts.append(f"{speed:,.0f} samples/s")
        if memory is not None:
            parts.append(f"{memory.peak / 2**20:,.1f} MiB")
        return " · ".join(parts)

    def _left(self, step: int) -> str:
        return clock((time.perf_counter() - self.started) / step * (self.total - step))


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds, with hours if there are any.

    >>> clock(65), clock(3661)
    ('1:05', '1:01:01')
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A context in which a terminal shows that something is being done; elsewhere a line says so."""
    console = Console(stderr=True, highlight=False, quiet=quiet.get())
    if not console.is_terminal:
        console.print(what, markup=False, soft_wrap=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield


class GridProgress:
    """Shows the progress of a grid of runs, and the time left: a bar on a terminal, elsewhere a line per finished run.

    Args:
        work: the work of all runs, in any unit.
        runs: their number.
        title: first line.
        live: redraw the bar automatically; not while times are measured, because it would disturb them.
    """

    def __init__(self, work: float, runs: int, title: str, live: bool = True):
        self.work, self.done = work, 0.0
        self.runs, self.over = runs, 0
        self.running: dict[str, tuple[float, Callable[[], float]]] = {}
        self.live = live
        self.console = Console(stderr=True, highlight=False, quiet=quiet.get())
        self.console.print(on_one_line(title), markup=False, soft_wrap=True)
        self.bar = Bar(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            transient=True,
            auto_refresh=live,
            disable=quiet.get() or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=work, left="?")
        self.started = time.perf_counter()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> "GridProgress":
        self.bar.start()
        if self.live and self.console.is_terminal:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._watch.is_alive():
            self._watch.join()
        self.bar.stop()

    def skipped(self, work: float) -> None:
        """A run was finished earlier, so it takes no time now."""
        self.work -= work
        self.over += 1

    def begun(self, name: str, work: float, share: Callable[[], float]) -> None:
        """A run has started; `share()` gives how much of it is done, from 0 to 1."""
        self.running[name] = (work, share)

    def ended(self, name: str, line: str = "") -> None:
        """A run has ended or failed; prints `line`, or its name where there is no bar."""
        self.done += self.running.pop(name)[0]
        self.over += 1
        if not self.console.is_terminal:
            line = f"{line or name} · {self.over} of {self.runs} · {self.left()} left"
        if line:
            self.console.print(on_one_line(line), markup=False, soft_wrap=True)

    def reached(self, turn: int) -> None:
        """Show how many parts of the work are done; without a terminal, print a line for every tenth of them."""
        before, self.done, self.over = self.over, float(turn), turn
        if self.console.is_terminal:
            words = f"{turn} of {self.runs}"
            self.bar.update(self.task, completed=turn, description=words, left=self.left(), refresh=True)
        elif 10 * turn // self.runs > 10 * before // self.runs:
            self.console.print(f"{turn} of {self.runs} · {self.left()} left", markup=False, soft_wrap=True)

    def left(self) -> str:
        """Estimate the time left from the work done so far."""
        done = self._done()
        if done <= 0:
            return "?"
        return clock((time.perf_counter() - self.started) / done * max(self.work - done, 0))

    def _done(self) -> float:
        return self.done + sum(work * share() for work, share in self.running.copy().values())

    def _refresh(self) -> None:
        while not self._over.wait(1.0):
            words = f"{self.over} of {self.runs} · {', '.join(self.running.copy())}"
            self.bar.update(self.task, total=self.work, completed=self._done(), description=words, left=self.left())
