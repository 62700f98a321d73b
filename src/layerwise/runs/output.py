"""Output files that a user names: files that must not be replaced are protected."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layerwise.data.catalogue import is_table
from layerwise.data.folders import SUFFIXES
from layerwise.errors import LayerwiseError, why
from layerwise.files import KINDS, shown
from layerwise.runs.writing import FAILURES, as_bytes, flush

GRID_FILES = ("compare.json", "environment.json", "results.csv", "summary.json")  # what `compare` records


def data_paths(name: str) -> list[Path]:
    """The file or folder of a data set, if its name is a path.

    >>> [str(path) for path in data_paths("imagefolder:a/b") + data_paths("t.csv") + data_paths("digits")]
    ['a/b', 't.csv']
    """
    form, _, rest = name.partition(":")
    if is_table(name):
        return [Path(name)]
    return [Path(rest)] if form in ("imagefolder", "parquet", "text") and rest else []


def check_output(path: Path, inputs: Sequence[Path] = ()) -> Path:
    """Resolve the output file that a user named; links are followed.

    Args:
        path: from the user.
        inputs: files that the command reads; in a folder, its images and parquet files.

    Raises:
        LayerwiseError: one of the inputs, a file in the folder of a run, a record of a comparison; a folder, a socket
            or a disk; a name that no file can have, a parent folder that does not exist.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as reason:
        raise _failed(path, reason) from reason
    target = Path(os.path.realpath(path))
    if mode is None and not target.parent.is_dir():
        raise _failed(path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        kind = KINDS.get(stat.S_IFMT(mode), "special file")
        raise LayerwiseError(f"could not write {shown(path)}: it is a {kind}, not a file; choose another place.")
    for given in inputs if mode is not None else ():
        inside = target.suffix.lower() in (*SUFFIXES, ".parquet") and target.is_relative_to(os.path.realpath(given))
        if inside or (os.path.exists(given) and os.path.samefile(path, given)):
            raise LayerwiseError(
                f"could not write {shown(path)}: the command reads it, or a part of it; choose another place."
            )
    for folder in target.parents:
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            raise LayerwiseError(
                f"could not write {shown(path)}: it lies in {shown(folder)}, the folder of a run; choose a place "
                "outside it."
            )
    if mode is not None and target.name in GRID_FILES and (target.parent / "compare.json").is_file():
        raise LayerwiseError(f"could not write {shown(path)}: it is the record of a comparison; choose another place.")
    return target


@contextlib.contextmanager
def output_file(path: Path, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a new name to write to; the file then replaces `path` in one step, or is copied to a pipe or device there.

    Raises:
        LayerwiseError: `check_output` refuses it, the disk is full, or the folder is not writable.
    """
    target = check_output(path, inputs)
    place = _opened(path)
    partial = None
    try:
        folder = target.parent if place is None else Path(tempfile.gettempdir())
        partial = folder / f".{secrets.token_hex(8)}.partial"
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield partial
        if place is not None:
            with partial.open("rb") as file, os.fdopen(place, "wb") as out:
                place = None
                shutil.copyfileobj(file, out)
        else:
            if target.exists():
                shutil.copymode(target, partial)
            flush(partial)
            partial.replace(target)
    except (*FAILURES, ValueError) as reason:
        raise _failed(path, reason) from reason
    finally:
        if place is not None:
            os.close(place)
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()  # it is gone if it has replaced the target


def write_output(path: Path, content: str | bytes, inputs: Sequence[Path] = ()) -> None:
    """Write to the file that the user named; errors as of `output_file`."""
    with output_file(path, inputs) as file:
        file.write_bytes(as_bytes(content))


def check_json(path: str | None, inputs: Sequence[Path] = ()) -> bool:
    """Check the file of `--json`, as `check_output` does; return whether it is `-`, so that nothing else is printed."""
    if path is not None and path != "-":
        check_output(Path(path), inputs)
    return path == "-"


def write_json(path: str | None, found: Any, inputs: Sequence[Path] = ()) -> None:
    """Write results to the file of `--json`, or print them if it is `-`; do nothing if it was not given."""
    text = json.dumps(found, indent=2) + "\n"
    if path == "-":
        print(text, end="")
    elif path is not None:
        write_output(Path(path), text, inputs)


def is_printed(path: str | os.PathLike[str]) -> bool:
    """Whether what is written to a path of the user appears among what the command prints, as for `/dev/stdout`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except (OSError, ValueError):
        return False


def _opened(path: Path) -> int | None:
    """Open a pipe, a device, or an output that this process already has; None for other files."""
    try:
        status = os.stat(path)
        for standard in (1, 2):  # /dev/stdout continues at its current position, wherever it leads
            with contextlib.suppress(OSError):
                if os.path.samestat(status, os.fstat(standard)):
                    sys.stdout.flush()  # printed text comes first
                    return os.dup(standard)
        if stat.S_ISREG(status.st_mode):
            return None
        # Non-blocking, because opening a pipe without a reader would never end.
        place = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(place, True)
        return place
    except FileNotFoundError:
        return None
    except OSError as reason:
        raise _failed(path, reason) from reason


def _failed(path: Path, reason: BaseException) -> LayerwiseError:
    return LayerwiseError(f"could not write {shown(path)} ({why(reason)}); free space, or choose another place.")
