"""Checks of a rule's declared properties on this machine, and of the files of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from layerwise import models, rules
from layerwise.core.blocks import Block
from layerwise.errors import LayerwiseError, short, why
from layerwise.files import check_regular, kind_of, shown
from layerwise.learner import Learner
from layerwise.measure.bench_memory import memory_of
from layerwise.report.finished import check_finished
from layerwise.report.reading import read_metrics, read_result
from layerwise.runs import checkpoint
from layerwise.runs.building import check_run_state
from layerwise.runs.folders import check_unchanged, read_options
from layerwise.runs.layout import check_run
from layerwise.runs.log import FILE
from layerwise.runs.options import TrainOptions

ADVICE = "resume the run, which writes it again"


def rule_findings(rule: str, model: str) -> list[tuple[bool, str]]:
    """Check the declared properties of `rule` on `model`: pairs of whether one holds, and the property.

    Raises:
        LayerwiseError: an unknown rule or model.
    """
    declared = rules.get(rule)
    make = _maker(model)
    x, y = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    findings = [_computes_the_same(make, x), _repeats(make, rule, x, y)]
    learner = Learner(make(), rule, example=x)
    layouts = learner.network.layouts
    found = ", ".join(f"{b.name} {layout or 'unknown'}" for b, layout in zip(blocks_of(learner), layouts, strict=True))
    findings.append((None not in layouts, f"the layers tell where channels are (B batch, C channels): {found}"))
    if len(learner.groups) > 1:
        findings.append(_isolated(learner, x, y))
    elif declared.locality == "global":
        findings.append((True, "the rule is global: one group, gradients reach every block"))
    if declared.flat_memory:
        few, many = (
            memory_of(rule, model, depth, shape=(1, 16, 16), batch_size=8, **SMALL[model]) for depth in (6, 24)
        )
        ratio = (many["activations"] + many["gradients"]) / (few["activations"] + few["gradients"])
        findings.append((ratio <= 1.01, f"activations + gradients at 24 blocks are {ratio:.3f} x those at 6"))
    if rule == "local_ce":
        findings.append(_one_block_is_backprop(make, x, y))
    return findings


SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"width": 32},
    "vgg": {"width": 8},
    "resnet": {"width": 8},
    "vit": {"width": 24},
    "sid_cascade": {"width": 16},
    "noprop": {"width": 4},
    "noprop_ct": {"width": 4},
    "noprop_fm": {"width": 4},
}


def _maker(model: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            dials: dict[str, Any] = {name: int(value) for name, value in SMALL[model].items()}
            return models.create(model, (1, 8, 8), 10, depth=3, **dials)

    return make


def blocks_of(learner: Learner) -> list[Block]:
    """The blocks and the head."""
    return learner.network.sites


def _weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in learner.named_parameters()]


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _computes_the_same(make: Callable[[], nn.Module], x: torch.Tensor) -> tuple[bool, str]:
    model = make().eval()
    with torch.no_grad():
        same = torch.equal(Learner(model, "backprop").network(x), model(x))
    return same, "the partitioned model computes what the model computes, bit for bit"


def _repeats(make: Callable[[], nn.Module], rule: str, x: torch.Tensor, y: torch.Tensor) -> tuple[bool, str]:
    results = []
    for disturb in (0, 1):
        learner = Learner(make(), rule)
        for _ in range(3):
            torch.rand(disturb)  # the global generator must have no effect
            learner.step(x, y)
        results.append(_weights(learner))
    return _equal(*results), "three steps from the same seed give the same bits"


def _isolated(learner: Learner, x: torch.Tensor, y: torch.Tensor) -> tuple[bool, str]:
    """Run one step; whenever a group steps, record which parameters hold a gradient."""
    leaks = []
    everything = dict(learner.named_parameters())
    for group in learner.groups:
        for optimizer in group.optimizers:
            own = {id(p) for p in group.parameters}

            def look(*_: object, own: set[int] = own, name: str = group.name) -> None:
                strangers = [n for n, p in everything.items() if p.grad is not None and id(p) not in own]
                leaks.extend(f"{name} -> {n}" for n in strangers)

            optimizer.register_step_pre_hook(look)
    learner.step(x, y)
    detail = f" (not so: {leaks[0]})" if leaks else ""
    return not leaks, f"no group's signal leaves a gradient in another group's parameters{detail}"


def _one_block_is_backprop(make: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor) -> tuple[bool, str]:
    results = []
    for rule in ("local_ce", "backprop"):
        learner = Learner(make(), rule, blocks=1)
        for _ in range(3):
            learner.step(x, y)
        results.append(_weights(learner))
    return _equal(*results), "with one block the rule is backprop, bit for bit"


def run_findings(folder: Path) -> list[tuple[bool, str]]:
    """Check that the files of the run in `folder` are undamaged and belong to this run.

    Raises:
        LayerwiseError: there is no run in the folder.
    """
    check_run(folder)
    findings: list[tuple[bool, str]] = []

    def check(words: str, work: Callable[[], Any]) -> Any:
        try:
            found = work()
        except LayerwiseError as reason:
            findings.append((False, str(reason)))
            return None
        findings.append((True, words))
        return found

    options = check("config.json names known options", lambda: read_options(folder))
    newest = None
    for path in check("checkpoints/ can be listed", lambda: checkpoint.complete(folder / "checkpoints")) or []:
        newest = check(
            f"{path.name} matches its digest and config.json", lambda path=path: _of_run(path, options, folder)
        )
    check("metrics.jsonl can be read", lambda: read_metrics(folder, FILE))
    if kind_of(folder / "result.json") is None:
        findings.append((True, f"the run is not finished; --resume {shown(folder)} continues it"))
        return findings
    result = check("result.json can be read: the run is finished", lambda: read_result(folder, "result.json"))
    if result is not None:
        words = "config.json, metrics.jsonl and test_correct.npy are of the run of result.json"
        check(words, lambda: check_finished(folder))
    if newest is not None and options is not None:
        check(
            "model.safetensors has the weights of the newest checkpoint",
            lambda: _check_weights(folder, newest, options),
        )
    return findings


def _of_run(path: Path, options: TrainOptions | None, folder: Path) -> dict[str, Any]:
    """Load a checkpoint, checked against its digest and the options of the run."""
    state = checkpoint.load(path)
    check_run_state(state, folder)
    if options is not None:
        check_unchanged(options, state["options"], folder)
    return state


def _check_weights(folder: Path, state: dict[str, Any], options: TrainOptions) -> None:
    file, model = folder / "model.safetensors", state["learner"]["model"]
    check_regular(file, ADVICE)
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as reason:
        raise LayerwiseError(f"{shown(file)} cannot be read ({why(reason)}); {ADVICE}.") from reason
    kept_by_optimizer = "." in options.optimizer  # some optimizers of other packages keep the weights for prediction
    for name, tensor in found.items():
        if not (kept_by_optimizer or (name in model and _same_bits(tensor, model[name]))):
            raise LayerwiseError(
                f"{shown(file)} has other weights than the newest checkpoint ({short(name)}); {ADVICE}."
            )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
