"""Memory, time and gradients of a network whose modules are replaced, beside the network as it is.

    python benchmarks/replacements-memory-gradient/measure.py [--rounds 8]

Memory (activations + gradients) is exact, of one step after two. Time is that of steps in turn, in seconds of the
processor, as a multiple of the same rule's on the network as it is. The cosine is that of all gradients of a backward
pass through the whole network with those of the network as it is, at the same weights and batch; parameters that are
merged away are left out of both. The figures go to `results.jsonl` beside this file.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import Learner, replace
from layerwise.measure.bench_problem import batch_of, network_of
from layerwise.measure.bench_speed import speed_of

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import evidence  # noqa: E402
import recording  # noqa: E402

NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {"model": "vit", "depth": 6, "shape": (3, 32, 32), "batch": 32, "options": {"width": 96}},
    "mlp": {"model": "mlp", "depth": 12, "shape": (1, 28, 28), "batch": 512, "options": {"width": 512}},
    "conv": {"model": "vgg", "depth": 8, "shape": (3, 32, 32), "batch": 64, "options": {"width": 32}},
}
REPLACED: dict[str, dict[str, Any]] = {
    "vit": {
        "as it is": (),
        "approx_gelu": ("approx_gelu",),
        "ms_norm": ("ms_norm",),
        "approx_gelu + ms_norm": ("approx_gelu", "ms_norm"),
        "velora": ("velora",),
        "approx_gelu + ms_norm + velora": ("approx_gelu", "ms_norm", "velora"),
        "low_precision": ("low_precision",),
    },
    "mlp": {
        "as it is": (),
        "mask_relu": ("mask_relu",),
        "velora": ("velora",),
        "sparse": ("sparse",),
        "bi_mask": ("bi_mask",),
    },
    "conv": {
        "as it is": (),
        "division_conv": ("division_conv",),
        "division_conv + division_norm": ("division_conv", "division_norm"),
        "division_conv + division_norm + mask_relu": ("division_conv", "division_norm", "mask_relu"),
        "low_precision": ("low_precision",),
        "biper": ("biper",),
    },
}
RULES = ("backprop", "sll")


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of the cross-entropy, through the whole network; the first pass lets modules see a batch."""
    model.train()
    F.cross_entropy(model(x), y)
    loss = F.cross_entropy(model(x), y)
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def cosine(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float | None:
    """Of two sets of gradients, over the parameters that both have; None where some have another shape (`sparse`)."""
    names = [name for name in exact if name in found]
    if any(found[name].shape != exact[name].shape for name in names):
        return None
    a, b = (torch.cat([grads[name].flatten() for name in names]).double() for grads in (found, exact))
    return F.cosine_similarity(a, b, dim=0).item()


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row per replacement and rule."""
    net = NETWORKS[name]
    x, y = batch_of(net["shape"], net["batch"])
    plain = network_of(net["model"], net["depth"], net["shape"], net["options"])
    exact = gradients(copy.deepcopy(plain), x, y)
    rows = []
    made = {way: replace(copy.deepcopy(plain), what, example=x) for way, what in REPLACED[name].items() if what}
    networks = {"as it is": plain, **made}
    cosines = {way: cosine(gradients(copy.deepcopy(own), x, y), exact) for way, own in networks.items()}
    for rule in RULES:
        learners = {way: (Learner(copy.deepcopy(own), rule, lr=1e-4, example=x), x, y) for way, own in networks.items()}
        uses = {}
        for way, (learner, *batch) in learners.items():
            for _ in range(2):
                learner.step(*batch)
            uses[way] = learner.measured_step(*batch)[1]
        seconds = speed_of(learners, rounds, warmup=1, clock=time.process_time)
        for way, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, seconds["as it is"], strict=True))
            row = {
                "rule": rule,
                "replaced": way,
                "activations": uses[way].activations,
                "gradients": uses[way].gradients,
                "ratio": ratio,
                "cosine": cosines[way],
            }
            rows.append(row)
            mib = (row["activations"] + row["gradients"]) / 2**20
            print(f"{name:<5}{rule:<10}{way:<32}{mib:9.2f} MiB x{ratio:.2f} cosine {row['cosine']}", flush=True)
    return rows


def main() -> None:
    """Measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "running statistics", UserWarning)
    command = recording.command_of(__file__)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        evidence.keep(options.out, name, measure(name, options.rounds), command)


if __name__ == "__main__":
    main()
