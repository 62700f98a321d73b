"""A process that trains the runs of a grid one after another, so that torch is imported once instead of once per run.

It reads tasks from standard input, one JSON object per line, and answers each with one line on standard output. It
exits at once when standard input ends, even in the middle of a task: the parent has died, or has finished.
"""

import contextlib
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from layerwise.compare.depth import held_at
from layerwise.compare.peak import bring_under
from layerwise.core.devices import pick_device
from layerwise.core.failures import NonFinite
from layerwise.errors import LayerwiseError, explained, is_out_of_memory
from layerwise.learner.fitting import use_of
from layerwise.measure.bench_speed import flops_of
from layerwise.measure.diagnostics import diagnose
from layerwise.memory.fitting import held_by
from layerwise.memory.malloc import keep_freed_memory
from layerwise.processes import lines_of_parent
from layerwise.runs import building, training
from layerwise.runs.options import TrainOptions, from_mapping


def train_task(task: dict[str, Any]) -> dict[str, Any]:
    """Train the run that the task describes, in its own folder; its output goes to `log.txt` there."""
    run = training.Run(from_mapping(task["options"]), task["command"])
    with (run.folder / "log.txt").open("w") as log, contextlib.redirect_stderr(log):
        run.train()
    return {}


def measure_task(task: dict[str, Any], warmup: int = 2, timed: int = 3) -> dict[str, Any]:
    """Measure the cost of a step: `flops_per_step`, `seconds_per_step`, `peak_bytes`, `held_bytes`; `steps_per_epoch`.

    Nothing is written.
    """
    options: TrainOptions = from_mapping(task["options"])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    dataset = building.load_data(options)
    batches, _, _ = building.split_batches(options, dataset, device)
    learner = building.build_learner(options, building.DataSignature.of(dataset), device, total=warmup + timed)
    x, y = next(iter(batches.epoch(0)))
    flops = flops_of(learner, x, y)
    use = use_of(learner, x, y)
    seconds = []
    for _ in range(warmup + timed):
        started = time.perf_counter()
        learner.step(x, y).read()  # `read` waits for an accelerator
        seconds.append(time.perf_counter() - started)
    return {
        "flops_per_step": flops,
        "seconds_per_step": statistics.median(seconds[warmup:]),
        "peak_bytes": use.peak,
        "held_bytes": held_by(use),
        "steps_per_epoch": len(batches),
    }


def fit_task(task: dict[str, Any]) -> dict[str, Any]:
    """Bring the run under a peak of memory; nothing is written."""
    options, baseline = (from_mapping(task[name]) for name in ("options", "baseline"))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return bring_under(options, baseline, task["peak"], task["settled"])


def depth_task(task: dict[str, Any]) -> dict[str, Any]:
    """Measure the memory of a step at other numbers of blocks; nothing is written."""
    options: TrainOptions = from_mapping(task["options"])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return held_at(options, tuple(task["depths"]))


def diagnose_task(task: dict[str, Any]) -> dict[str, Any]:
    """Diagnose a finished run, with its backprop twin if there is one; writes `diagnostics.json` there."""
    diagnose(Path(task["folder"]), Path(task["twin"]) if task["twin"] else None, task["device"])
    return {}


TASKS = {
    "train": train_task,
    "measure": measure_task,
    "fit": fit_task,
    "depths": depth_task,
    "diagnose": diagnose_task,
}


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Do one task; a failure becomes `{"kind": ..., "reason": ...}` with one sentence as the reason.

    The kinds are `mistake` (by the user), `diverged`, `memory`, and `error` (a fault, with its traceback).
    """
    try:
        return {"done": TASKS[task["do"]](task)}
    except NonFinite as error:
        return {"kind": "diverged", "reason": str(error)}
    except LayerwiseError as error:
        return {"kind": "mistake", "reason": str(error)}
    except Exception as error:
        kind = "memory" if is_out_of_memory(error) else "error"
        return {"kind": kind, "reason": explained(error), "traceback": traceback.format_exc()}


def main() -> None:
    """Answer tasks until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the output of a task must not look like an answer
    keep_freed_memory()
    tasks = lines_of_parent()
    while True:
        print(json.dumps(answer(json.loads(tasks.get()))), file=answers, flush=True)


if __name__ == "__main__":
    main()
