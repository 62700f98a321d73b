"""Peak resident memory by depth, and time per step, of blocks that are offloaded to disk.

    python benchmarks/offload-resident-memory/measure.py [--depths 8,64] [--rounds 10] [--folder FOLDER]

Memory is the high-water mark that the system reports (VmHWM) of whole runs, each in a process of its own: building the
network, training, checkpoint, evaluation. Time is that of steps of an offloaded and an ordinary learner in one process,
in turn. The figures go to `results.jsonl` beside this file.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from layerwise import Learner, models
from layerwise.measure.bench_speed import speed_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import evidence  # noqa: E402
import recording  # noqa: E402

WIDTH, BATCH, STEPS = 2048, 512, 3
RUN = f"--model mlp --model.width {WIDTH} --batch-size {BATCH} --steps {STEPS} --val-fraction 0 --threads 1"
CHILD = """
import pathlib, re, sys
from layerwise.cli.main import main
assert main(sys.argv[1:]) == 0
print("high water", re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def memory(depth: int, offload: str, folder: str) -> dict:
    """Peak resident MiB of a run in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = ["train", *RUN.split(), "--model.depth", str(depth), "--offload", offload, "--out", f"{out}/run"]
        done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = re.search(r"high water (\d+)", done.stdout)
        result = json.loads((Path(out) / "run" / "result.json").read_text())
    peak = int(found[1]) / 1024
    print(f"{offload:<6}{depth:>4} blocks: {peak:8.0f} MiB", flush=True)
    return {
        "depth": depth,
        "offload": offload,
        "resident_mib": peak,
        "parameters": result["parameters"],
        "exact_mib": result["memory_mib"],
        "samples_per_second": result["samples_per_second"],
    }


def time(depth: int, rounds: int, folder: str) -> dict:
    """Seconds of steps, offloaded and not, in turn."""
    torch.set_num_threads(1)
    x, y = torch.randn(BATCH, 1, 8, 8), torch.randint(10, (BATCH,))
    learners = {}
    for offload in ("none", "disk"):
        torch.manual_seed(0)
        model = models.create("mlp", (1, 8, 8), 10, depth=depth, width=WIDTH)
        learners[offload] = Learner(model, "sll", offload=offload, offload_folder=folder, example=x), x, y
    seconds = speed_of(learners, rounds, warmup=2)
    ratios = sorted(a / b for a, b in zip(seconds["disk"], seconds["none"], strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    found = {"depth": depth, "seconds": seconds, "ratio": statistics.median(ratios), "low": low, "high": high}
    print(f"time per step, {depth} blocks: {found['ratio']:.3f} ({low:.3f} .. {high:.3f})", flush=True)
    return found


def main() -> None:
    """Measure, write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", default="8,64")
    parser.add_argument("--time-depth", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", default=".", help="on the disk to offload to")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    timed = time(options.time_depth, options.rounds, options.folder)
    depths = [int(depth) for depth in options.depths.split(",")]
    rows = [memory(depth, offload, options.folder) for depth in depths for offload in ("disk", "none")]
    command = recording.command_of(__file__)
    options.out.mkdir(parents=True, exist_ok=True)
    evidence.keep(options.out, "memory", rows, command)
    evidence.keep(options.out, "time", timed, command)


if __name__ == "__main__":
    main()
