"""Peak resident memory by depth, and time per step, of blocks offloaded from disk.

    python benchmarks/streaming/measure.py [--depths 8,64] [--rounds 10] [--folder FOLDER]

Memory is the high-water mark that the system reports (VmHWM) of whole runs, each in a process of its own: building the
network, training, checkpoint, evaluation. Time is that of steps of an offloaded and an ordinary learner in one process,
in turn. Writes memory.json, time.json, environment.txt and table.md beside this file.
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
from layerwise.runs.environment import environment, in_words

HERE = Path(__file__).parent
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


def table(rows: list[dict], timed: dict) -> str:
    """The figures as a page."""
    lines = [
        "# Blocks offloaded from disk: resident memory and time",
        "",
        f"MLP of width {WIDTH}, `sll`, AdamW, batch {BATCH}, one thread. A block's weight is "
        f"{WIDTH**2 * 4 / 2**20:.0f} MiB, {3 * WIDTH**2 * 4 / 2**20:.0f} MiB with the optimizer's state. Resident: the "
        f"system's high-water mark (VmHWM) of a whole `layerwise train` of {STEPS} steps with checkpoint and "
        "evaluation, in a process of its own. Exact: peak of the memory meter in one step, parameters and optimizer "
        "state in it as far as they are on the device.",
        "",
        "Command: `bash benchmarks/streaming/run.sh`.",
        "",
        "| blocks | parameters + state, MiB | `--offload` | resident, MiB | exact, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        state = 3 * row["parameters"] * 4 / 2**20
        exact = row["exact_mib"]["peak"]
        lines.append(f"| {row['depth']} | {state:.0f} | {row['offload']} | {row['resident_mib']:.0f} | {exact:.0f} |")
    held = {row["depth"]: row["resident_mib"] for row in rows if row["offload"] == "disk"}
    first, last = min(held), max(held)
    seconds = {name: statistics.median(found) for name, found in timed["seconds"].items()}
    lines += [
        "",
        f"Resident memory at {last} blocks is {held[last] / held[first]:.3f} times that at {first} (offloaded). "
        f"Time per step at {timed['depth']} blocks, offloaded ÷ not, median of {len(timed['seconds']['disk'])} "
        f"interleaved pairs (10 % .. 90 %): {timed['ratio']:.3f} ({timed['low']:.3f} .. {timed['high']:.3f}); "
        f"{seconds['disk']:.2f} s and {seconds['none']:.2f} s.",
        "",
        "Machine:",
        "",
        "```",
        in_words(environment()),
        "```",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", default="8,64")
    parser.add_argument("--time-depth", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", default=".", help="on the disk to stream to")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    timed = time(options.time_depth, options.rounds, options.folder)
    depths = [int(depth) for depth in options.depths.split(",")]
    rows = [memory(depth, offload, options.folder) for depth in depths for offload in ("disk", "none")]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(rows, indent=2) + "\n")
    (options.out / "time.json").write_text(json.dumps(timed, indent=2) + "\n")
    (options.out / "environment.txt").write_text(in_words(environment()) + "\n")
    (options.out / "table.md").write_text(table(rows, timed))
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
