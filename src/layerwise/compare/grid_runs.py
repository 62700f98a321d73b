"""The runs of a grid: each in its own folder, finished, failed or not run yet."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.compare.pool import WorkerPool
from layerwise.errors import LayerwiseError, note
from layerwise.files import MissingFile, kind_of, shown
from layerwise.report.finished import check_finished, check_has_samples
from layerwise.report.reading import Failure, read_record, read_result
from layerwise.runs.folders import FREE, claimed
from layerwise.runs.log import read_log
from layerwise.runs.options import TrainOptions, to_mapping, to_words
from layerwise.runs.writing import write_atomically

FINAL = ("diverged",)
"""Kinds of failure that follow from options and seed: such a run is not repeated."""


@dataclass(frozen=True)
class GridRun:
    """One run of a grid; `options.out` is its folder."""

    label: str
    """The rule as given, with its options."""
    name: str
    """Rule and seed, in words."""
    options: TrainOptions

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self.options.out is not None
        return Path(self.options.out)

    @property
    def command(self) -> str:
        """The command line that trains this run alone."""
        return shlex.join(["layerwise", "train", *to_words(self.options)])

    @property
    def result(self) -> dict[str, Any] | None:
        """Contents of `result.json`, which a run writes when it is finished."""
        try:
            return read_result(self.folder, "result.json")
        except MissingFile:
            return None

    @property
    def failure(self) -> dict[str, Any] | None:
        """`kind` and `reason` of a run that failed."""
        return None if self.result else self._read("failed.json", Failure)

    @property
    def settled(self) -> bool:
        """Whether the run is finished, or would fail again."""
        return self.result is not None or (self.failure or {}).get("kind") in FINAL

    def damage(self) -> str | None:
        """Why the files of a finished or failed run cannot be used; None if they can, or if there are none yet."""
        try:
            if kind_of(self.folder / "result.json") is None:
                self._read("failed.json", Failure)
                return None
            check_finished(self.folder)
            if self.options.task == "classification":
                check_has_samples(self.folder)
        except LayerwiseError as reason:
            return str(reason)
        return None

    def _read(self, file: str, kind: Any) -> dict[str, Any] | None:
        """A JSON file of the folder; None if it is missing."""
        try:
            return read_record(self.folder, file, kind)
        except MissingFile:
            return None

    def last_step(self) -> int:
        """The last step that the run has logged so far."""
        return max((line["step"] for line in read_log(self.folder / "metrics.jsonl")), default=0)

    def check(self) -> None:
        """Raise LayerwiseError if the folder holds a run with other options."""
        before = self._read("config.json", dict[str, Any]) or {}
        now = json.loads(json.dumps(to_mapping(self.options)))
        for name in before.keys() & now.keys() - set(FREE):
            if before[name] != now[name]:
                raise LayerwiseError(
                    f"{self.folder} holds a run with {name} = {json.dumps(before[name])}, not "
                    f"{json.dumps(now[name])}; choose another --out."
                )


def discard_damaged(grid_runs: Sequence[GridRun], root: Path) -> None:
    """Remove the finished runs whose files are damaged or do not belong together, so that they are trained again.

    Args:
        grid_runs: of a comparison.
        root: its folder.

    Raises:
        LayerwiseError: a link leads out of the folder.
    """
    for run in grid_runs:
        if not Path(os.path.realpath(run.folder)).is_relative_to(os.path.realpath(root)):
            raise LayerwiseError(
                f"{shown(run.folder)} is a link out of {shown(root)}; put the folder itself there, or remove the link."
            )
        reason = run.damage()
        if reason is None:
            continue
        note(f"{run.name} is trained again, because {reason.rstrip('.').partition('; ')[0]}")
        with claimed(run.folder):
            _remove(run.folder)


def _remove(folder: Path) -> None:
    """Remove the folder of a run; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if kind_of(folder) is not None:
        raise LayerwiseError(f"{shown(folder)} cannot be removed, and its run is to be trained again; remove it.")


def train_all(
    grid_runs: Sequence[GridRun],
    pool: WorkerPool,
    jobs: int,
    begun: Callable[[GridRun], None] = lambda run: None,
    ended: Callable[[GridRun], None] = lambda run: None,
) -> None:
    """Train the runs that are not settled, `jobs` at a time; a run that a crash left unfinished starts again.

    A run that fails leaves `failed.json` with `kind` and `reason` in its folder; the others continue.

    Raises:
        LayerwiseError: a folder holds a run with other options; in that case none is trained.
    """
    for run in grid_runs:
        if run.settled:
            run.check()
    by_folder = {str(run.folder): run for run in grid_runs}

    def begin(task: dict[str, Any]) -> None:
        run = by_folder[task["folder"]]
        with claimed(run.folder):  # no other process is training it
            _remove(run.folder)
        begun(run)

    def end(task: dict[str, Any], answer: dict[str, Any]) -> None:
        run = by_folder[task["folder"]]
        if "kind" in answer:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(run.folder / "failed.json", json.dumps(answer, indent=2) + "\n")
        ended(run)

    tasks = [
        {
            "do": "train",
            "folder": str(run.folder),
            "options": to_mapping(run.options),
            "command": run.command,
        }
        for run in grid_runs
        if not run.settled
    ]
    pool.run(tasks, end, jobs, begin)
