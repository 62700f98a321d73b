"""Begins a pass, predicts and evaluates; nothing is updated here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise import rules
from layerwise.core import pieces
from layerwise.core.contract import asking, check_begin, check_prediction
from layerwise.core.failures import in_a_sentence
from layerwise.core.progress import Trace
from layerwise.core.pullback import Pullback
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.rule import BatchContext, Rule, metrics_of
from layerwise.core.trees import detach
from layerwise.errors import LayerwiseError
from layerwise.learner.build import Built, Setup
from layerwise.learner.optimizer import EveryOptimizer
from layerwise.memory.offload import NotOffloaded, Offload


@contextmanager
def evaluating(
    setup: Setup, auxiliary: nn.ModuleDict, optimizer: EveryOptimizer, offload: Offload | NotOffloaded
) -> Iterator[None]:
    """A context in which all modules are in evaluation mode, without gradient; it restores every mode."""
    network, device = setup.network, setup.device
    with preserved_generators(device):  # first, so that other threads do not see this mode
        modules = [network, *network.model.modules(), *auxiliary.modules()]
        modes = [(module, module.training) for module in modules]
        training = optimizer.training
        network.eval()
        auxiliary.eval()
        optimizer.eval()
        try:
            with torch.no_grad(), offload.unchanging():
                # A rule that samples when it predicts (or makes negatives) gives the same result each time.
                seed_generators(derive_seed(setup.execution.seed, "evaluation"), device)
                yield
        finally:
            if training:
                optimizer.train()
            for module, mode in modes:
                module.training = mode
            setup.replicas.release()


def begun(built: Built, x: Any, y: Tensor, step: int | None, predict: Callable[[Any], Tensor]) -> tuple[Any, Any]:
    """Input and message of the first group here: from the rule, or from the rank before."""
    built.matrix.begin(step)
    if step is not None:
        built.engine.tell()
    if not built.setup.stage.first:
        return built.setup.stage.receive()
    rule = built.setup.rule
    with asking(rule, "`begin`"):
        start = rule.begin(batch_context(built, x, y, step, predict))
    check_begin(rule, start)
    return detach(start)


def batch_context(built: Built, x: Any, y: Tensor, step: int | None, predict: Callable[[Any], Tensor]) -> BatchContext:
    """The context that a rule gets before the first block runs; `predict` is for one that uses its prediction."""
    network = built.setup.network
    units = {unit.site.index: unit for group in built.groups for unit in group.units}

    def run(index: int, h: Tensor, message: Any = None) -> Tensor:
        return built.engine.run_aside(units[index], h, message, step)

    def forward(h: Tensor) -> Tensor:
        for index in range(len(network.blocks) + 1):
            h = run(index, h)
        return h

    def linearize(index: int, h: Tensor, message: Any = None) -> tuple[Tensor, Pullback]:
        return built.engine.linearize_aside(units[index], h, message, step)

    modules = modules_by_site(built)
    context = BatchContext(x, y, built.task, network, modules, run, forward, linearize, step is not None)
    if isinstance(built.setup.rule, pieces.UsesPrediction):
        return pieces.PredictionContext(**vars(context), predict=predict)
    return context


def evaluated(built: Built, x: Any, y: Tensor, predict: Callable[[Any], Tensor]) -> Trace:
    """The rule's scalars for one batch on the device, in evaluation mode.

    Args:
        built: groups and engine.
        x: inputs.
        y: labels.
        predict: what a rule may ask the network for.
    """
    trace, network, rule, stage = Trace(), built.setup.network, built.setup.rule, built.setup.stage
    built.check()
    with network.passing(x):
        h, message = begun(built, x, y, None, predict)
        for group in built.groups:
            with built.resident(group.units):
                _, h, message = built.engine.forward(group, h, message, y, None, trace)
    stage.pass_on(h, message, skipped=False)
    apart = not pieces.predicts_plainly(rule) and not rule.predicts_at_head
    if apart and (logits := predicted_again(built, x)) is not None:
        metrics, trace.statistics["head"] = metrics_of(built.task, logits, y)
        head = {"loss": built.task.loss(logits, y), **metrics}
        trace.metrics["head"] = trace.metrics.get("head", {}) | head
    return trace


def predicted(built: Built, x: Any) -> Tensor:
    """The rule's prediction for inputs on the device, if the whole network is here."""
    network, rule = built.setup.network, built.setup.rule
    by_rule = not pieces.predicts_plainly(rule)
    who = in_a_sentence("the network", "cannot predict for an input", x, by_rule)
    if not by_rule:
        with who:
            return network(x)
    with asking(rule, "`predict`"), who, network.passing():
        prediction = rule.predict(network, modules_by_site(built), x)
    check_prediction(rule, prediction, built.task, len(x) if isinstance(x, Tensor) else None)
    return prediction


def predicted_again(built: Built, x: Any) -> Tensor | None:
    """The rule's prediction, with the draws of `Learner.__call__`; None if a later rank predicts."""
    setup, rule, stage = built.setup, built.setup.rule, built.setup.stage
    seed_generators(derive_seed(setup.execution.seed, "evaluation"), setup.device)
    if stage.first and stage.last:
        return predicted(built, x)
    first = modules_by_site(built).get(0)
    h, message = pieces.ask(rule, x, first) if stage.first else stage.receive()
    with setup.network.passing(x):
        for unit in (unit for group in built.groups for unit in group.units):
            h, message = pieces.answer(rule, unit.site, unit.block(h), message, unit.auxiliary)
    stage.pass_on(h, message, skipped=False)
    return h if stage.last else None


def check_passes_beliefs(rule: Rule) -> None:
    """Raise LayerwiseError unless the rule has beliefs."""
    if not isinstance(rule, pieces.PassesBeliefs):
        able = [name for name in rules.names() if issubclass(rules.get(name), pieces.PassesBeliefs)]
        raise LayerwiseError(f"rule {rule.name!r} has no beliefs; those that do: {', '.join(able)}.")


def beliefs(x: Any, built: Built, threshold: float | None) -> list[Tensor]:
    """The beliefs of the sites about inputs on the device; see `Learner.beliefs`."""
    setup, rule = built.setup, built.setup.rule
    assert isinstance(rule, pieces.PassesBeliefs)
    per_site: list[Tensor] = []
    passed = torch.zeros((), dtype=torch.bool, device=setup.device)
    who = in_a_sentence("the network", "cannot predict for an input", x)
    with asking(rule, "`beliefs`"), who, built.engine.autocast(), setup.network.passing():
        for belief in rule.beliefs(setup.network, modules_by_site(built), x):
            per_site.append(belief)
            if threshold is not None:
                passed = passed | (belief.amax(-1).exp() >= threshold)
                if bool(passed.all()):
                    break
    return per_site


def modules_by_site(built: Built) -> dict[int, nn.Module]:
    """The rule's modules by index of their site."""
    return {int(index): module for index, module in built.auxiliary.items()}
