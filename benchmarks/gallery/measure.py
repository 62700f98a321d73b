"""The gallery: every network under every rule.

    python benchmarks/gallery/measure.py [--only gpt2,unet] [--rules sll,sid] [--out FOLDER]

The networks are in `networks.py`. The rows of a library that is not installed stay as they are.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from layerwise import LayerwiseError, Learner
from layerwise.core.pieces import predicts_plainly
from layerwise.core.randomness import derive_seed
from layerwise.core.reading import arguments

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import evidence  # noqa: E402
import recording  # noqa: E402
from entry import Entry, torchvision_here  # noqa: E402
from networks import ENTRIES, Network  # noqa: E402

RULES = ("sll", "sid", "local_ce", "mono_forward", "backprop")
STEPS = 20


def learner_of(entry: Entry, rule: str, model: nn.Module, **options: Any) -> Learner:
    """The learner as a user would create it."""
    return Learner(model, rule, cuts=entry.cuts, task=entry.task, output=entry.output, **options)


def given(batch: Any) -> tuple[Any, Any]:
    """Arguments of `step`."""
    return batch if isinstance(batch, tuple) else (batch, None)


def fresh(about: Network, depth: int) -> Entry:
    """The network and the batch, the same every time."""
    torch.manual_seed(0)
    entry = about.make(depth)
    entry.model.train()
    return entry


def cell(about: Network, rule: str) -> dict:
    """One network under one rule; why it is refused, where it is."""
    entry = fresh(about, about.depths[0])
    before = {name: p.detach().clone() for name, p in entry.model.named_parameters() if not p.requires_grad}
    try:
        learner = learner_of(entry, rule, entry.model, lr=3e-3)
        losses = [float(learner.step(*given(entry.batch)).loss) for _ in range(STEPS)]
    except LayerwiseError as reason:
        return {"rule": rule, "refused": str(reason)}
    found = {
        "rule": rule,
        "first": losses[0],
        "last": losses[-1],
        "falls": statistics.mean(losses[-3:]) < statistics.mean(losses[:2]),
        "blocks": len(learner.network.cuts),
        "same": predicts_as_the_model(learner, entry),
        "frozen": all(torch.equal(p, before[n]) for n, p in entry.model.named_parameters() if n in before),
        "local": is_local(learner, entry),
        "bytes": [memory(about, rule, depth) for depth in about.depths],
    }
    if rule == "backprop":
        found["plain"] = is_the_plain_loop(about)
    return found


def logits(entry: Entry, out: Any) -> Tensor:
    """The logits as the entry defines them."""
    if entry.output is not None:
        return entry.output(out)
    return out["logits"] if isinstance(out, dict) else out


@torch.no_grad()
def predicts_as_the_model(learner: Learner, entry: Entry) -> bool:
    """Whether `learner(x)` has the bits of the model in evaluation mode; the readouts' on its outputs for beliefs."""
    x = given(entry.batch)[0]
    inputs = {name: value for name, value in x.items() if name != "labels"} if isinstance(x, dict) else x
    model = copy.deepcopy(entry.model).eval()
    args, kwargs = arguments(inputs)
    if predicts_plainly(learner.rule):
        return torch.equal(learner(x), logits(entry, model(*args, **kwargs)))
    # Beliefs refine one another, given what the model's own blocks return.
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in learner.network.cuts:
        modules[name].register_forward_hook(lambda m, a, out, name=name: seen.update({name: first(out)}))
    outputs = [logits(entry, model(*args, **kwargs)), *(seen[name] for name in learner.network.cuts)]
    head, *blocks = (_Said(name, out) for name, out in zip(["head", *learner.network.cuts], outputs, strict=True))
    network: Any = SimpleNamespace(blocks=blocks, head=head, sites=[*blocks, head], layouts=learner.network.layouts)
    auxiliary = copy.deepcopy(learner.auxiliary).eval()
    wanted = learner.rule.predict(network, {int(i): module for i, module in auxiliary.items()}, inputs)
    return torch.equal(learner(x), wanted)


class _Said:
    """A block whose output is known."""

    def __init__(self, name: str, out: Tensor):
        self.name, self.out = name, out

    def __call__(self, h: Any) -> Tensor:
        return self.out


def first(out: Any) -> Tensor:
    """The first tensor of a module's output."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values() if isinstance(out, dict) else out))
    return out


def is_local(learner: Learner, entry: Entry) -> bool:
    """Whether no path of a group's graph leads to a parameter that is another group's alone."""
    reached: list[set[int]] = []
    backward = torch.autograd.backward

    def walked(roots: Any, *args: Any, **kwargs: Any) -> None:
        waiting, seen, leaves = [root.grad_fn for root in roots], set(), set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            waiting += [parent for parent, _ in node.next_functions]
        reached.append(leaves)
        backward(roots, *args, **kwargs)

    with mock.patch("torch.autograd.backward", walked):
        learner.step(*given(entry.batch))
    named = dict(entry.model.named_parameters())
    shared = {id(named[name]) for name in learner.network.shared if name in named}  # pyright: ignore
    groups = [group for group in learner.groups if group.learns]
    owns = [{id(p) for unit in group.units for p in unit.parameters()} for group in groups]
    return len(reached) == len(groups) and all(
        leaves - shared <= own for leaves, own in zip(reached, owns, strict=True)
    )


def memory(about: Network, rule: str, depth: int) -> int:
    """Bytes of activations and gradients in a step."""
    entry = fresh(about, depth)
    learner = learner_of(entry, rule, entry.model)
    learner.step(*given(entry.batch))
    _, use = learner.measured_step(*given(entry.batch))
    return use.activations + use.gradients


def is_the_plain_loop(about: Network) -> bool:
    """Whether three steps of `backprop` have the bits of an ordinary loop with the same random draws."""
    one, two = fresh(about, about.depths[0]), fresh(about, about.depths[0])

    def adamw(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0)

    learner = learner_of(one, "backprop", one.model, optimizer=adamw)
    optimizer = adamw([p for p in two.model.parameters() if p.requires_grad])
    for step in range(3):
        learner.step(*given(one.batch))
        with drawn(two.model, learner.network.cuts, step):
            two.plain(two.model, two.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = dict(one.model.named_parameters())
    buffers = dict(one.model.named_buffers())
    same = all(torch.equal(p, names[name]) for name, p in two.model.named_parameters())
    return same and all(torch.equal(b, buffers[name]) for name, b in two.model.named_buffers())


@contextlib.contextmanager
def drawn(model: nn.Module, cuts: tuple[str, ...], step: int) -> Iterator[None]:
    """Random draws of a plain loop that depend on step and block alone, as the learner's do."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def seed(index: int) -> None:
        torch.manual_seed(derive_seed(0, "draw", step, index))

    handles = [modules[name].register_forward_hook(lambda *_, i=i: seed(i + 1)) for i, name in enumerate(cuts)]
    seed(0)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    """Measure, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of networks, with commas")
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    torchvision_here()
    for name in (options.only or ",".join(ENTRIES)).split(","):
        about, begun = ENTRIES[name], time.monotonic()
        try:
            version = importlib.metadata.version(about.library)
            fresh(about, about.depths[0])
        except ImportError as reason:
            print(f"{name}: left out ({reason})", flush=True)
            continue
        rows = []
        for rule in options.rules.split(","):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                row = cell(about, rule) | {"warned": sorted({str(w.message) for w in said})}
            rows.append(row)
            shown = {key: value for key, value in row.items() if key not in ("rule",)}
            print(f"{name:<22}{rule:<14}{shown}", flush=True)
        found = {"rows": rows, "library": about.library, "version": version, "title": about.title}
        found |= {"depths": about.depths, "equal": about.equal, "seconds": time.monotonic() - begun}
        command = recording.command_of(__file__, ["--only", name])
        evidence.keep(options.out, name, found, command, [about.library])


if __name__ == "__main__":
    main()
