"""Processor time of a step against a loop of the same mathematics written by hand.

    python benchmarks/step-by-hand/measure.py [--only mlp] [--rounds 15] [--out FOLDER]

`local_ce` and `sll` on MLPs are compared with loops that contain only the mathematics. `sid_cascade` is compared with
the form that its authors published: all modules without gradient for the beliefs, then all modules with one backward
pass of the summed losses. The contenders take their steps in turn, in an order that changes from round to round, on one
thread. Time is the processor's, of this process alone. Each figure is a ratio within a round.

Before it is timed, every pair is compared: the MLPs' weights have the same bits after three steps. The cascade's are
compared in float64, to 1e-9 of the largest: its authors add the gradients on the features up from the last module to
the first, the library from the first to the last, so that the last bits differ.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import Learner, keep_freed_memory, models

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import evidence  # noqa: E402
import recording  # noqa: E402

CLASSES = 10
Step = Callable[[Tensor, Tensor], object]


def adamw(*modules: nn.Module) -> torch.optim.Optimizer:
    """The learner's optimizer: decay for matrices, fused."""
    parameters = [p for module in modules for p in module.parameters()]
    matrices, vectors = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01, fused=True)


def blocks_of(model: nn.Module) -> list[Any]:
    """The blocks; the head is the last."""
    return list(model.children())


def local_ce_by_hand(model: nn.Module, readouts: Sequence[nn.Module]) -> Step:
    """Every block has a linear readout; the last one learns through the head."""
    *first, last, head = blocks_of(model)
    parts = [*zip(first, readouts, strict=True), (last, head)]
    optimizers = [adamw(*part) for part in parts]

    def step(x: Tensor, y: Tensor) -> None:
        for (block, readout), optimizer in zip(parts, optimizers, strict=True):
            x = block(x.detach())
            loss = F.cross_entropy(readout(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def sll_by_hand(model: nn.Module, projections: Sequence[nn.Module]) -> Step:
    """Every block has a fixed projection and is aligned with the block before; the last one learns through the head."""
    *first, last, head = blocks_of(model)
    matrices: list[Any] = [p.matrix for p in projections]
    optimizers = [*map(adamw, first), adamw(last, head)]

    def step(x: Tensor, y: Tensor) -> None:
        before = None
        for i, (block, optimizer) in enumerate(zip([*first, last], optimizers, strict=True)):
            x = block(x.detach())
            v = head(x) if i == len(first) else F.linear(F.layer_norm(x, x.shape[-1:]), matrices[i])
            loss = F.cross_entropy(v, y)
            if before is not None:
                log_bc = torch.logsumexp(0.5 * (before.log_softmax(-1) + v.log_softmax(-1)), -1)
                loss = loss + (-log_bc).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            before = v.detach()

    return step


def cascade_in_two_passes(model: nn.Module, _: Sequence[nn.Module]) -> Step:
    """The authors' form: beliefs without gradient, then all modules and one backward pass of the summed losses."""
    extractor = nn.Sequential(*list(model.children())[:2])
    modules = list(model.children())[2:]
    optimizers = [adamw(extractor), *map(adamw, modules)]

    def logits(module: Any, p: Tensor, z: Tensor) -> Tensor:
        return module.out(F.relu(module.hidden(torch.cat([p, z], -1))))

    def step(x: Tensor, y: Tensor) -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        z = extractor(x)[:, CLASSES:]
        beliefs = [torch.full((len(x), CLASSES), 1 / CLASSES, dtype=z.dtype)]
        with torch.no_grad():
            for module in modules[:-1]:
                beliefs.append(logits(module, beliefs[-1], z).softmax(-1))
        loss = torch.zeros((), dtype=z.dtype)
        for module, before in zip(modules, beliefs, strict=True):
            log_p = logits(module, before, z).log_softmax(-1)
            loss = loss + 0.5 * F.nll_loss(log_p, y) + 0.5 * F.kl_div(log_p, before, reduction="batchmean")
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss

    return step


CASES: dict[str, tuple] = {
    # name: rule, model, its sizes, image, batch, steps in a round, loop by hand
    "mlp, local_ce": ("local_ce", "mlp", {"depth": 3, "width": 1000}, (1, 28, 28), 128, 2, local_ce_by_hand),
    "mlp, sll": ("sll", "mlp", {"depth": 3, "width": 1000}, (1, 28, 28), 128, 2, sll_by_hand),
    "tiny, local_ce": ("local_ce", "mlp", {"depth": 12, "width": 8}, (1, 4, 4), 32, 10, local_ce_by_hand),
    "tiny, sll": ("sll", "mlp", {"depth": 12, "width": 8}, (1, 4, 4), 32, 10, sll_by_hand),
} | {
    f"cascade of {depth}, {side}x{side}": (
        "sid_cascade",
        "sid_cascade",
        {"depth": depth},
        (3, side, side),
        128,
        1,
        cascade_in_two_passes,
    )
    for side in (32, 8)
    for depth in (20, 64)
}


def pair(name: str, dtype: torch.dtype) -> tuple[Learner, Step, nn.Module, Tensor, Tensor]:
    """The learner, the loop by hand on a copy of its weights, that copy, a batch."""
    rule, kind, sizes, shape, batch, _, by_hand = CASES[name]
    torch.manual_seed(0)
    model = models.create(kind, shape, CLASSES, **sizes).to(dtype)
    x, y = torch.randn(batch, *shape, dtype=dtype), torch.randint(CLASSES, (batch,))
    other = copy.deepcopy(model)
    learner = Learner(model, rule, example=x)
    readouts = [copy.deepcopy(learner.auxiliary[key]) for key in sorted(learner.auxiliary, key=int)]
    return learner, by_hand(other, readouts), other, x, y


def apart(name: str) -> float:
    """The difference of the two after three steps, relative to the largest weight; exits if it is too large."""
    exact = CASES[name][0] != "sid_cascade"
    learner, step, other, x, y = pair(name, torch.float32 if exact else torch.float64)
    for _ in range(3):
        learner.step(x, y)
        step(x, y)
    mine, by_hand = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (learner.network.model, other))
    found = float((mine - by_hand).abs().max() / mine.abs().max())
    if found > (0 if exact else 1e-9):
        raise SystemExit(f"{name}: the loop by hand computes something else; the weights are {found} apart")
    return found


def measure(name: str, rounds: int, warmup: int = 2) -> dict:
    """Ratios of the library's processor time to that of the loop by hand."""
    far = apart(name)
    learner, step, _, x, y = pair(name, torch.float32)
    steps: list[Step] = [learner.step, step]
    seconds: list[list[float]] = [[], []]
    for i in range(warmup + rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            begun = time.process_time()
            for _ in range(CASES[name][5]):
                steps[which](x, y)
            if i >= warmup:
                seconds[which].append((time.process_time() - begun) / CASES[name][5])
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    found = {
        "case": name,
        "rounds": rounds,
        "apart": far,
        "seconds": statistics.median(seconds[1]),
        "extra": statistics.median(a - b for a, b in zip(*seconds, strict=True)),
        "groups": len(learner.groups),
        "ratio": [statistics.median(ratios), ratios[rounds // 10], ratios[-1 - rounds // 10]],
    }
    words = "{:.3f} ({:.3f} .. {:.3f})".format(*found["ratio"])
    print(f"{name}: {1000 * found['seconds']:.2f} ms by hand, {words}", flush=True)
    return found


def main() -> None:
    """Measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # otherwise the system clears its pages again and again, a random number of them
    rows = [measure(name, options.rounds) for name in CASES if name.startswith(options.only)]
    command = recording.command_of(__file__)
    options.out.mkdir(parents=True, exist_ok=True)
    evidence.keep(options.out, "steps", rows, command)


if __name__ == "__main__":
    main()
