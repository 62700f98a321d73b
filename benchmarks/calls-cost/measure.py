"""Time per step of a model that is cut at its calls, against a loop of the same mathematics written by hand.

    python benchmarks/calls-cost/measure.py [--widths 96,128,192,384] [--rounds 40] [--out FOLDER]

A transformer of 12 blocks learns under `local_ce`. Three contenders take steps in turn, in an order that changes from
round to round, on one thread: the loop by hand, the learner that cuts at calls, and the learner that cuts the same
`nn.Sequential` into functions. Time is the processor's, of this process alone. Each figure is a ratio within a round.
After the last round all three must hold the same weights.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import Learner, cut_at_calls, keep_freed_memory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import evidence  # noqa: E402
import recording  # noqa: E402

DEPTH, BATCH, TOKENS, FEATURES, CLASSES = 12, 32, 32, 16, 10
Step = Callable[[Tensor, Tensor], object]


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, h: Tensor) -> Tensor:
        """`(B, L, C)` to `(B, C)`."""
        return h.mean(1)


def network(width: int) -> nn.Sequential:
    """Embedding, 12 blocks, mean over tokens, classes."""
    blocks = [nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(DEPTH)]
    return nn.Sequential(nn.Linear(FEATURES, width), *blocks, Mean(), nn.Linear(width, CLASSES))


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The learner's optimizer: decay for matrices, fused."""
    matrices, vectors = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01, fused=True)


def by_hand(model: nn.Sequential, readouts: list[nn.Linear]) -> Step:
    """What `local_ce` does, by hand: the first block has the embedding, the last one learns through the head."""
    first, layers, head = model[0], model[1 : DEPTH + 1], model[DEPTH + 1 :]
    blocks = [nn.Sequential(first, layers[0]), *layers[1:-1], nn.Sequential(layers[-1], *head)]
    optimizers = [adamw(list(b.parameters()) + list(r.parameters())) for b, r in zip(blocks, readouts, strict=False)]
    optimizers.append(adamw(list(blocks[-1].parameters())))

    def step(x: Tensor, y: Tensor) -> Tensor:
        for block, readout, optimizer in zip(blocks, [*readouts, None], optimizers, strict=True):
            x = block(x.detach())
            loss = F.cross_entropy(x if readout is None else readout(x.mean(1)), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def measure(width: int, rounds: int, warmup: int = 3) -> dict:
    """Ratios of processor time to the loop by hand."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, TOKENS, FEATURES), torch.randint(CLASSES, (BATCH,))
    models = {"hand": network(width)}
    models |= {name: copy.deepcopy(models["hand"]) for name in ("calls", "functions")}
    cuts = [str(i + 1) for i in range(DEPTH)]
    calls = Learner(cut_at_calls(models["calls"], cuts), "local_ce", example=x)
    functions = Learner(models["functions"], "local_ce", cuts=cuts, example=x)
    readouts = [copy.deepcopy(calls.auxiliary[str(i)]) for i in range(DEPTH - 1)]
    steps: dict[str, Step] = {
        "hand": by_hand(models["hand"], readouts),
        "calls": calls.step,
        "functions": functions.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(warmup + rounds):
        for name in names[i % 3 :] + names[: i % 3]:
            begun = time.process_time()
            steps[name](x, y)
            if i >= warmup:
                seconds[name].append(time.process_time() - begun)
    first, *others = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models.values())
    apart = max(float((first - other).abs().max() / first.abs().max()) for other in others)
    if apart > 1e-3:
        raise SystemExit(f"the contenders do not compute the same: their weights are {apart} apart")
    found: dict = {"width": width, "rounds": rounds, "apart": apart, "seconds": statistics.median(seconds["hand"])}
    for name in ("calls", "functions"):
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["hand"], strict=True))
        found[name] = [statistics.median(ratios), ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]]
        off = round(0.98 * len(ratios) ** 0.5)  # ranks that contain the median with 95 % (binomial)
        found[f"{name}_median"] = [
            ratios[max(0, len(ratios) // 2 - off)],
            ratios[min(len(ratios) // 2 + off, rounds - 1)],
        ]
        extra = [a - b for a, b in zip(seconds[name], seconds["hand"], strict=True)]
        found[f"{name}_extra"] = statistics.median(extra)
    words = {
        name: "{:.3f} ({:.3f} .. {:.3f})".format(found[name][0], *found[f"{name}_median"])
        for name in ("calls", "functions")
    }
    print(width, f"{1000 * found['seconds']:.1f} ms", words, f"{1000 * found['calls_extra']:.2f} ms more", flush=True)
    return found


def main() -> None:
    """Measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="96,128,192,384")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # otherwise the system clears its pages again and again, a random number of them
    rows = [measure(int(width), options.rounds) for width in options.widths.split(",")]
    command = recording.command_of(__file__)
    options.out.mkdir(parents=True, exist_ok=True)
    evidence.keep(options.out, "cost", rows, command)


if __name__ == "__main__":
    main()
