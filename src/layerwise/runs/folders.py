"""The folder of a run: locking it for one process, creating it, and reading its options."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import socket
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError, note, short, why
from layerwise.files import MissingFile, kind_of, read_text, shown
from layerwise.records import read_json
from layerwise.runs.layout import OPTIONS, check_run
from layerwise.runs.log import read_log
from layerwise.runs.options import TrainOptions, from_mapping, own_code_of, run_name, to_mapping
from layerwise.runs.writing import write_atomically


class Claim:
    """An exclusive lock on a folder: no second run, resume or comparison can use it meanwhile.

    The system's lock on the folder ends with `release`, or with the last process that holds it, however that ends.

    Args:
        folder: created if it is missing.
        patience: seconds to wait for another process, whose workers may live for a moment after it was killed.
        what: what to call another process in an error.

    Attributes:
        fresh: whether the folder was created here.
        handle: descriptor of the open folder, for processes that share the lock.

    Raises:
        LayerwiseError: the folder cannot be written, or another process works there.
    """

    def __init__(self, folder: Path, patience: float = 0.0, what: str = "run"):
        self.folder = folder
        try:
            self.fresh = kind_of(folder) is None
            folder.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError, LayerwiseError) as reason:
            raise _cannot_write(folder, reason) from reason
        self._close = weakref.finalize(self, os.close, self.handle)
        try:
            self._lock(patience, what)
        except BaseException:
            self.release()
            raise

    def _lock(self, patience: float, what: str) -> None:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as reason:
                if time.monotonic() >= deadline:
                    raise LayerwiseError(
                        f"another {what} is running in {shown(self.folder)}; wait for it, or stop it."
                    ) from reason
                time.sleep(0.1)
            except OSError:  # a file system without locks, such as some network file systems
                return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.folder), os.fstat(self.handle)):
                return
        raise LayerwiseError(f"another {what} has just replaced {shown(self.folder)}; try again.")

    def release(self) -> None:
        """Unlock the folder."""
        self._close()

    def discard_if_empty(self) -> None:
        """Remove the folder if it was created here and is empty."""
        with contextlib.suppress(OSError):
            if self.fresh:
                self.folder.rmdir()


@contextlib.contextmanager
def claimed(folder: Path, patience: float = 0.0, what: str = "run") -> Iterator[int]:
    """A context in which a folder is locked; yields the descriptor of the open folder. The arguments are `Claim`'s.

    A folder that was created here is removed again if it stays empty.

    Raises:
        LayerwiseError: the folder cannot be written, or another process works there.
    """
    claim = Claim(folder, patience, what)
    try:
        yield claim.handle
    finally:
        claim.discard_if_empty()
        claim.release()


def _cannot_write(folder: Path, reason: BaseException) -> LayerwiseError:
    cause = reason.__cause__ if isinstance(reason, LayerwiseError) and reason.__cause__ is not None else reason
    return LayerwiseError(f"cannot write to {shown(folder)} ({why(cause)}); choose another --out.")


def read_options(folder: Path) -> TrainOptions:
    """Read the options of the run in `folder`.

    Raises:
        LayerwiseError: the folder holds no run, or its config.json is damaged or cannot be read.
    """
    check_run(folder)
    file = folder / OPTIONS
    values = read_json(file, Any, "start the run again")
    for name in own_code_of(values):  # noted before the code runs, because the folder may come from somebody else
        note(f"runs {shown(name)}, which the run in {shown(folder)} names")
    return from_mapping(values, shown(file))


FREE = (
    *("device", "threads", "compile", "offload", "offload_folder"),
    *("out", "overwrite", "save_every", "log_every", "tensorboard"),
)


def check_unchanged(options: TrainOptions, trained: dict[str, Any], folder: Path) -> None:
    """Raise LayerwiseError if config.json and the checkpoint differ in an option that affects the result."""
    now = json.loads(json.dumps(to_mapping(options)))
    # Options that are newer than the checkpoint behaved like their present default.
    trained = json.loads(json.dumps(to_mapping(TrainOptions()))) | trained
    for part in ("rule", "model"):
        own = trained.get(part)
        if isinstance(own, dict) and own.get("name") == now[part]["name"] and now[part].keys() - own.keys():
            usual = to_mapping(replace(options, **{part: type(getattr(options, part))()}))[part]
            trained[part] = json.loads(json.dumps(usual)) | own
    for name in now.keys() - set(FREE):
        if now[name] != trained.get(name):
            raise LayerwiseError(
                f"the checkpoint in {shown(folder)} is of another run: config.json has {name} = "
                f"{short(now[name])} and the checkpoint {short(trained.get(name))}; put the options back, or start a "
                "new run."
            )


def wanted_folder(options: TrainOptions) -> Path:
    """The folder of a run, as given or by the run's name."""
    base = f"runs/{run_name(options)}"
    return Path(options.out or f"{base}-{options.rule.name}-seed{options.seed}")


BEGINNING = {"job", "job.partial", f"{OPTIONS}.partial", "tokenizer.json", "tokenizer.json.partial"}
"""Files that a run killed at its very beginning leaves behind; nobody needs them."""


LEFT = {"metrics.jsonl", "checkpoints", "model.safetensors", "test_correct.npy", "result.json", "log.txt"} | {
    *("diagnostics.json", "beliefs.json", "failed.json", "tensorboard")
}
"""Files of a run besides its options."""


def new_folder(options: TrainOptions) -> Claim:
    """Create the empty, locked folder of a new run. `--overwrite` renames the old one; `drop_replaced` deletes it.

    Raises:
        LayerwiseError: the folder holds something, another process works there, or it cannot be written.
    """
    wanted = wanted_folder(options)
    try:
        for folder in [wanted] if options.out or options.overwrite else numbered(wanted):
            claim = _new_folder(folder, options)
            if claim is not None:
                return claim
    except (OSError, ValueError) as reason:
        raise _cannot_write(wanted, reason) from reason
    raise AssertionError("the names do not end")


def _new_folder(folder: Path, options: TrainOptions) -> Claim | None:
    """Create the empty, locked folder; None if it is taken and another name is allowed."""
    any_name = options.out is None and not options.overwrite
    if any_name and kind_of(folder) is not None and (kind_of(folder) != "folder" or not _is_vacant(folder)):
        return None
    try:
        claim = Claim(folder)
    except LayerwiseError as reason:
        if any_name and isinstance(reason.__cause__, BlockingIOError):
            return None
        raise
    try:
        if _is_vacant(folder):
            return claim
        if any_name:  # another run was faster
            claim.release()
            return None
        if not options.overwrite:
            if kind_of(folder / OPTIONS) != "file":
                raise LayerwiseError(f"{shown(folder)} is not empty and is not a run; choose another --out.")
            raise LayerwiseError(
                f"{shown(folder)} is not empty; choose another --out, continue it with --resume {shown(folder)}, or "
                "replace it with --overwrite."
            )
        return _replaced(folder, claim, options)
    except BaseException:
        claim.release()
        raise


def _is_vacant(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= BEGINNING


def _replaced(folder: Path, old: Claim, options: TrainOptions) -> Claim:
    """Replace the folder of an old run, which is kept under another name until the new run has begun."""
    if kind_of(folder / OPTIONS) != "file":
        raise LayerwiseError(f"{shown(folder)} is not the folder of a run, so --overwrite does not delete it.")
    real = folder.resolve()
    if Path.cwd().is_relative_to(real):
        raise LayerwiseError(
            f"the current folder lies in {shown(folder)}, which --overwrite is to replace; go to another folder first."
        )
    if (needed := _named_inside(to_mapping(options) | {"out": None}, real)) is not None:
        raise LayerwiseError(
            f"{shown(needed)}, which the run needs, lies in {shown(folder)}, which --overwrite is to replace; move it, "
            "or choose another --out."
        )
    aside = set_aside(folder)
    if kind_of(aside) is not None:
        if kind_of(aside) != "folder" or not _was_run(aside):
            raise LayerwiseError(
                f"{shown(aside)}, where --overwrite puts the old run aside, is not a run and is not deleted; move it "
                "away."
            )
        shutil.rmtree(aside)  # an earlier replacement was killed before it could delete it
    real.rename(aside)
    try:
        new = Claim(real)
    except LayerwiseError:
        aside.rename(real)
        raise
    old.release()
    new.folder = folder
    return new


def _was_run(folder: Path) -> bool:
    """Whether a folder is a run, or the rest of one whose deletion was interrupted."""
    return kind_of(folder / OPTIONS) == "file" or {path.name for path in folder.iterdir()} <= {*BEGINNING, *LEFT}


def _named_inside(options: Any, real: Path) -> str | None:
    """Find a path in the options, alone or in a form such as `text:PATH` or `FILE.py:NAME`, that lies in a folder."""
    if isinstance(options, Mapping):
        options = list(options.values())
    if isinstance(options, (list, tuple)):
        return next((found for value in options if (found := _named_inside(value, real)) is not None), None)
    if isinstance(options, str) and options:
        for word in (options, options.partition(":")[2], options.rpartition(":")[0]):
            with contextlib.suppress(OSError, ValueError):  # not a path
                if word and Path(word).exists() and Path(word).resolve().is_relative_to(real):
                    return word
    return None


def set_aside(folder: Path) -> Path:
    """The name under which a replaced run is kept until its successor has begun."""
    real = folder.resolve()
    return real.with_name(f".{real.name[:200]}.replaced")


def drop_replaced(folder: Path) -> list[str]:
    """Delete the run that this folder's new one has replaced; returns a sentence if that fails."""
    aside = set_aside(folder)
    try:
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as reason:
        return [f"the replaced run could not be deleted from {shown(aside)} ({why(reason)})"]
    return []


def undo_replacement(folder: Path) -> None:
    """Restore a replaced run if its successor could not begin."""
    aside = set_aside(folder)
    with contextlib.suppress(OSError):
        if aside.exists() and _is_vacant(folder):
            shutil.rmtree(folder)
            aside.rename(folder.resolve())


def numbered(folder: Path) -> Iterator[Path]:
    """The folder, and the names for further runs of its name: -2, -3, ..."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))


def mark(folder: Path) -> None:
    """Record torchrun's job in the folder of a new run, so that a restart of the job finds the run."""
    write_atomically(folder / "job", _job() + "\n")


def folder_of_restarted(options: TrainOptions) -> Path | None:
    """The folder that an earlier attempt of this job has created; None at the first attempt, or if there is none."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    first = wanted_folder(options)
    for folder in [first] if options.out else itertools.takewhile(kind_of, numbered(first)):
        try:
            if read_text(folder / "job", "start the job again") == _job() + "\n":
                return folder
        except MissingFile:
            continue
    return None


def _job() -> str:
    """Identifies a start of torchrun: its id, or else its process, which starts every attempt."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def check_not_lost(folder: Path, save_every: int) -> None:
    """Raise LayerwiseError if all checkpoints of the run in `folder` are lost, because it would begin again.

    Args:
        folder: of a run without a checkpoint.
        save_every: steps between its checkpoints.
    """
    logged = max((line["step"] for line in read_log(folder / "metrics.jsonl")), default=0)
    had = logged > save_every or any(kind_of(folder / name) for name in ("result.json", "model.safetensors"))
    begun = list((folder / "checkpoints").iterdir()) if kind_of(folder / "checkpoints") else ["none"]
    if had or not begun:
        raise LayerwiseError(
            f"the checkpoints of the run in {shown(folder)} are gone, and its log reaches step {logged}; put them back "
            "into checkpoints/, or start the run again with --overwrite."
        )
