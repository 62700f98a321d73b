"""Memory and time of every way to fit a network into less memory, as ratios to plain backpropagation.

    python benchmarks/which-way-to-fit/measure.py [--rounds 8] [--folder FOLDER]

Memory is exact, of one step after a few: activations + gradients, and the optimizer's state. Time is that of steps of
all ways of a network in turn: seconds of the processor, of the system's part too, as other work may share the cores (it
does not count waiting for a disk that is slower than the system's file cache). A way whose steps differ
(`block_rota`) has the largest memory of a round of turns, and the mean time of as many turns as
there are rounds here. Freed memory stays with the process, as on the command line: otherwise plain backpropagation
would be slowed down by the pages that it gets anew in every step, and the other ways would look better. The figures go
to `results.jsonl` beside this file.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from layerwise import LanguageModel, Learner, create_rule
from layerwise.measure.bench_problem import batch_of, network_of, options_of
from layerwise.measure.bench_speed import speed_of
from layerwise.memory.malloc import keep_freed_memory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import evidence  # noqa: E402
import recording  # noqa: E402

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp", "depth": 24, "shape": (1, 28, 28), "batch": 512, "options": {"width": 512}},
    "conv": {"model": "vgg", "depth": 8, "shape": (3, 32, 32), "batch": 64, "options": {"width": 32}},
    "vit": {"model": "vit", "depth": 12, "shape": (3, 32, 32), "batch": 32, "options": {"width": 96}},
    "short": {"model": "vit", "depth": 12, "shape": (1, 28, 28), "batch": 64, "options": {"width": 96, "patch": 7}},
    "gpt": {"model": "gpt", "depth": 12, "shape": (1, 1, 128), "batch": 8, "options": {"width": 96}, "tokens": 1024},
}
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "backprop": ("backprop", {}, {}),
    **{f"accumulate {n}": ("backprop", {}, {"micro": n}) for n in (2, 4, 8, 16)},
    "checkpoint": ("backprop_checkpoint", {}, {}),
    "checkpoint matmul": ("backprop_checkpoint", {"policy": "matmul"}, {}),
    "checkpoint attention": ("backprop_checkpoint", {"policy": "attention"}, {}),
    **{f"checkpoint + accumulate {n}": ("backprop_checkpoint", {}, {"micro": n}) for n in (2, 4, 8, 16)},
    "fused": ("backprop_fused", {}, {}),
    "offload host": ("backprop_offload", {}, {}),
    "offload disk": ("backprop_offload", {"where": "disk"}, {}),
    **{f"offload disk + accumulate {n}": ("backprop_offload", {"where": "disk"}, {"micro": n}) for n in (2, 4)},
    "block_rota": ("block_rota", {"period": 1}, {}),
    "zeroth_order": ("zeroth_order", {}, {}),
    "local_ce": ("local_ce", {}, {}),
    **{f"local_ce, blocks in {n} parts": ("local_ce", {}, {"micro": n}) for n in (2, 4, 8)},
    "sll": ("sll", {}, {}),
    **{f"sll, blocks in {n} parts": ("sll", {}, {"micro": n}) for n in (2, 4, 8)},
    **{f"solo, {k} modules": ("solo", {"group": 12 // k}, {}) for k in (2, 3)},
}
SHARED = {"local_ce": {"readout": "shared"}, "sll": {"readout": "shared"}}
"""Options of rules on a network with an output per token of a vocabulary."""


def measure(name: str, rounds: int, folder: str) -> list[dict[str, Any]]:
    """A row per way to train one network."""
    net = NETWORKS[name]
    x, y, more = batch(net)
    learners = {}
    for way, (rule, options, how) in WAYS.items():
        if (way == "checkpoint attention" and net["model"] not in ("vit", "gpt")) or (
            rule == "solo" and "tokens" not in net
        ):
            continue
        network = network_of(net["model"], net["depth"], net["shape"], net["options"], net.get("tokens", 10))
        made = create_rule(rule, **options, **(SHARED.get(rule, {}) if more["task"] else {}))
        learners[way] = Learner(network, made, lr=1e-4, offload_folder=folder, example=x, **how, **more), x, y
    uses = {way: memory(way, *found) for way, found in learners.items()}
    seconds = speed_of(learners, rounds, warmup=1, clock=time.process_time)
    rows = []
    for way, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["backprop"], strict=True))
        middle = statistics.mean(ratios) if way == "block_rota" else statistics.median(ratios)
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        held = max(uses[way], key=lambda use: use.activations + use.gradients)
        row = {
            "way": way,
            "activations": held.activations,
            "gradients": held.gradients,
            "optimizer": max(use.optimizer for use in uses[way]),
            "parameters": held.parameters,
            "seconds": statistics.median(times) / net["batch"],
            "ratio": middle,
            "low": low,
            "high": high,
        }
        rows.append(row)
        mib = (row["activations"] + row["gradients"]) / 2**20
        print(
            f"{name:<5}{way:<27}{mib:9.2f} MiB {row['optimizer'] / 2**20:9.2f} MiB state  x{middle:.2f} "
            f"({low:.2f} .. {high:.2f})",
            flush=True,
        )
    return rows


def batch(net: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Random samples and labels of a network, and what a learner has to know about them."""
    if "tokens" not in net:
        return *batch_of(net["shape"], net["batch"]), {"task": None}
    torch.manual_seed(0)
    made = options_of(net["model"], net["depth"], net["options"])
    return *made.batch(net["shape"], net["tokens"], net["batch"]), {"task": LanguageModel(shift=False)}


def memory(way: str, learner: Learner, x: torch.Tensor, y: torch.Tensor) -> list[Any]:
    """The memory use of a step; for block_rota, of each step of a round of turns."""
    for _ in range(2):
        learner.step(x, y)
    return [learner.measured_step(x, y)[1] for _ in range(len(learner.network.blocks) if way == "block_rota" else 1)]


def main() -> None:
    """Measure, write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", default=".", help="on the disk to offload to")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "running statistics", UserWarning)  # said in the table
    command = recording.command_of(__file__)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        evidence.keep(options.out, name, measure(name, options.rounds, options.folder), command)


if __name__ == "__main__":
    main()
