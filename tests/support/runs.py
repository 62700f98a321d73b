"""Training runs through the command line, small enough for a test; shared by the tests."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from shlex import split

from safetensors.torch import load_file

from layerwise.cli.main import main
from layerwise.runs import checkpoint

__all__ = [
    "COMPARE",
    "SMALL",
    "STARTED",
    "TIMING",
    "contents",
    "lines",
    "open_files",
    "result",
    "split",
    "start",
    "state",
    "stop_all",
    "train",
    "weights",
]

COMPARE = split(
    "compare --rule sll,sll:overlap=1 backprop --seeds 2 --epochs 2 --model.width 16 --model.depth 2 --batch-size 256"
)
SMALL = split("--model.width 16 --model.depth 2 --batch-size 256 --threads 1")
TIMING = ("train_seconds", "samples_per_second", "seconds")
STARTED: list[subprocess.Popen] = []


def train(folder, *words):
    """Train in this process; digits and SLL on a small MLP unless the words say otherwise."""
    assert main(["train", *SMALL, "--out", str(folder), *words]) == 0
    return folder


def start(*words, **options):
    """The command line in a separate process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": ""}
    environment.pop("COLUMNS", None)  # pytest's own, in the workers
    command = [sys.executable, "-m", "layerwise", *map(str, words)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    STARTED.append(subprocess.Popen(command, env=environment, text=True, **options))
    return STARTED[-1]


def stop_all():
    """End what a test has started: one that failed would leave a run behind, and later tests would pay for it."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdout, process.stderr, process.stdin):
            if stream is not None:
                stream.close()


def open_files(pid):
    """Where the descriptors of a process point; some close while we look."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return found


def result(folder):
    return json.loads((folder / "result.json").read_text())


def lines(folder, split=None):
    """The log without timings."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in found
        if split in (None, line["split"])
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


def state(folder):
    """The last checkpoint's learner: weights, optimizer state, counters."""
    return checkpoint.load_latest(folder / "checkpoints")[0]["learner"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
