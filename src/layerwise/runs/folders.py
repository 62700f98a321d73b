"""The folder of a run: made empty, its options read back, its log cut where a run goes on."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError
from layerwise.runs.checkpoint import write_atomically
from layerwise.runs.options import TrainOptions, from_mapping, model_name, to_mapping


def read_options(folder: Path) -> TrainOptions:
    """The options of the run in `folder`.

    Raises:
        LayerwiseError: the folder holds no run, or its config.json is damaged.
    """
    file = folder / "config.json"
    try:
        return from_mapping(json.loads(file.read_text()), str(file))
    except OSError as reason:
        raise LayerwiseError(f"{folder} holds no run (no config.json); give the folder of a run.") from reason
    except ValueError as reason:
        raise LayerwiseError(f"{file} is damaged ({reason}); start the run again.") from reason


FREE = (
    *("device", "threads", "compile", "offload", "offload_folder"),
    *("out", "overwrite", "save_every", "log_every", "tensorboard"),
)


def check_options(options: TrainOptions, trained: dict[str, Any], folder: Path) -> None:
    """Raise LayerwiseError where config.json says other than the checkpoint on anything that decides the result."""
    now = json.loads(json.dumps(to_mapping(options)))
    # Options that are newer than the checkpoint had the value that is their default now.
    trained = json.loads(json.dumps(to_mapping(TrainOptions()))) | trained
    for name in now.keys() - set(FREE):
        if now[name] != trained.get(name):
            raise LayerwiseError(
                f"the checkpoint in {folder} is of another run: config.json has {name} = {json.dumps(now[name])} and "
                f"the checkpoint {json.dumps(trained.get(name))}; put the options back, or start a new run."
            )


def wanted_folder(options: TrainOptions) -> Path:
    """The folder of a run, as given or by the run's name."""
    base = f"runs/{options.data.replace('/', '_').replace(':', '_')}-{model_name(options.model)}"
    return Path(options.out or f"{base}-{options.rule.name}-seed{options.seed}")


def new_folder(options: TrainOptions) -> Path:
    """The folder of a new run, empty."""
    folder = wanted_folder(options)
    try:
        if folder.exists() and any(folder.iterdir()):
            if options.out is not None and not options.overwrite:
                raise LayerwiseError(
                    f"{folder} is not empty; choose another --out, go on with --resume {folder}, or replace it "
                    "with --overwrite."
                )
            if options.overwrite:
                if not (folder / "config.json").exists():
                    raise LayerwiseError(f"{folder} is not the folder of a run, so --overwrite does not delete it.")
                shutil.rmtree(folder)
            else:
                folder = next(path for path in numbered(folder) if not path.exists())
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise LayerwiseError(f"cannot write to {folder} ({reason.strerror}); choose another --out.") from reason
    return folder


def numbered(folder: Path) -> Iterator[Path]:
    """The folder, and the names for further runs of its name: -2, -3, ..."""
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))


def mark(folder: Path) -> None:
    """Note in the folder of a new run which job of torchrun it belongs to, so that a restart of it finds the run."""
    write_atomically(folder / "job", _job() + "\n")


def folder_of_restarted(options: TrainOptions) -> Path | None:
    """The folder that an earlier attempt of this job has made; None at the first, or where it made none."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    first = wanted_folder(options)
    for folder in [first] if options.out else itertools.takewhile(Path.exists, numbered(first)):
        with contextlib.suppress(OSError):
            if (folder / "job").read_text() == _job() + "\n":
                return folder
    return None


def _job() -> str:
    """What tells one start of torchrun from another: its id, or else its process, which starts every attempt."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def drop_lines_after(file: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run goes on from, and any half-written line."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError):
            values = json.loads(line)
            if values["step"] <= step and values["split"] != "test":  # the end is evaluated and logged anew
                kept.append(line)
    write_atomically(file, "".join(f"{line}\n" for line in kept))


def grid_run_folder(label: str, what: str, part: str) -> str:
    """Folder of a cell below that of the grid.

    >>> cell_folder("sll:overlap=1", "seed 0", "runs")
    'runs/sll-overlap=1/seed0'
    """
    rule = re.sub(r"[^\w.=+-]", "-", label)
    return f"{part}/{rule}/{what.replace(' ', '')}"
