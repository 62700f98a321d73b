"""Forward passes: runs groups of blocks and gets the rule's signals; nothing is updated here."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwise.core.chains import is_compiled
from layerwise.core.contract import asking, check_output, check_signal
from layerwise.core.execution import Execution
from layerwise.core.failures import in_a_sentence
from layerwise.core.further import SingleNumbers, warn_of_further_terms
from layerwise.core.groups import Group, Unit
from layerwise.core.output_layer import HeadWithoutOutputs, without_outputs
from layerwise.core.progress import Trace
from layerwise.core.pullback import Pullback, linearized, without_gradient
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.rule import BlockContext, Rule, Signal, leaves_logits
from layerwise.core.tasks import Task

NOTHING = nullcontext()
"""Used instead of a context that is not needed."""
Signals = list[tuple[Signal, Tensor | None]]
"""Each signal with the output that its cotangent belongs to; None without a cotangent."""


class Runner:
    """Runs groups of blocks forward for a rule.

    Args:
        rule: gives a signal at every block.
        task: what the labels mean.
        execution: precision and seed.
    """

    def __init__(self, rule: Rule, task: Task, execution: Execution):
        self.rule, self.task, self.execution = rule, task, execution
        self.told = False
        """Whether a further term of the loss has been found."""

    def forward(
        self,
        group: Group,
        h: Tensor,
        message: Any,
        y: Tensor,
        step: int | None,
        trace: Trace,
        part: int | None = None,
        share: float = 1.0,
        aside: bool = False,
    ) -> tuple[Signals, Tensor, Any]:
        """Run a group's blocks and get the rule's signals.

        Args:
            group: what runs.
            h: input of the group's first block.
            message: of the site before.
            y: labels.
            step: the training step, which decides the random draws; None in evaluation.
            trace: where metrics go.
            part: number of the part of the batch; None for a whole one.
            share: of the batch's labels that are in this part; metrics are weighted by it.
            aside: whether running statistics stay as they are.

        Returns:
            Signals; input and message of the next group.

        Raises:
            LayerwiseError: the rule's answer is not a signal that the engine can use.
        """
        signals: Signals = []
        passed_on = h, message
        units = [*group.units, *(group.ahead if step is not None else [])]
        view = range(units[0].site.index, units[-1].site.index + 1)
        training, learns = step is not None, step is not None and group.learns
        looks, beside, ends = step is not None and self._looks(group), {}, []
        for unit in units:
            own = unit.site.index <= group.units[-1].site.index
            graph = torch.no_grad() if unit.site.index < group.first else NOTHING
            # Running statistics are updated once, in the unit's own group.
            buffers = NOTHING if own and not aside else unit.on_copies()
            with graph, buffers:
                head = self._without_outputs(unit, y)
                ran = unit if head is None else replace(unit, block=head)
                with SingleNumbers() if looks else NOTHING as numbers:
                    out = self.run(ran, h, message, step, part)
                left = None if head is None else head.left(out)
                with self.autocast(), asking(self.rule, f"`signal` at block {unit.site.name!r}"):
                    of_group = (unit.auxiliary, training, learns, view)
                    again = partial(self.run_aside, unit, step=step, part=part)
                    ctx = BlockContext(unit.site, out, h, message, y, self.task, *of_group, left, again)
                    signal = self.rule.signal(ctx)
            check_signal(self.rule, ctx, signal)
            if numbers is not None:
                beside[unit.site.name] = numbers.alive() + list(unit.block.beside)
                ends += [out, *([] if signal.loss is None else [signal.loss])]
            h = out if signal.output is None else signal.output
            message = signal.message
            if signal.loss is not None:
                signal.metrics.setdefault("loss", signal.loss)
            if signal.loss is not None or signal.cotangent is not None or signal.gradients:
                signals.append((signal, None if signal.cotangent is None else out))
            if own:
                passed_on = h, message
                if signal.metrics:
                    trace.add(unit.site.name, signal.metrics, signal.statistics, share)
        if looks:
            group.looked = True
            self.told = warn_of_further_terms(beside, ends)
        return signals, *passed_on

    def _looks(self, group: Group) -> bool:
        """Whether to look for further terms of the loss: once per group, until one is found."""
        if group.looked or self.told or not torch.is_grad_enabled():
            return False
        network = group.units[0].site.network
        # A compiler would compile everything once more outside the mode that looks.
        compiled = any(unit.block.compiled for unit in group.units)
        return not compiled and (network is None or not any(is_compiled(module) for module in network.model.modules()))

    def _without_outputs(self, unit: Unit, y: Tensor) -> HeadWithoutOutputs | None:
        """The head without its output layer, where the loss makes the outputs of a large vocabulary in chunks."""
        large = unit.site.is_head and self.task.chunk(y.numel()) is not None and not y.is_floating_point()
        if not large or unit.site.network is None or not leaves_logits(self.rule):
            return None
        return without_outputs(unit.block, unit.site.network.output_layer)

    def run_aside(self, unit: Unit, h: Tensor, message: Any, step: int | None, part: int | None = None) -> Tensor:
        """Run a block once more, besides the run of its step, for a rule that looks ahead.

        Returns:
            The block's output without gradient. In a training step it is, bit for bit, what the block gives in its own
            group, since mode, draws and (before its update) weights are the same. Buffers and generators stay as they
            are.
        """
        with torch.no_grad(), preserved_generators(self.execution.device), unit.on_copies():
            return self.run(unit, h, message, step, part)

    def linearize_aside(self, unit: Unit, h: Tensor, message: Any, step: int | None) -> tuple[Tensor, Pullback]:
        """Run a block aside, as `run_aside` does, and map cotangents on its output to those on its input.

        Returns:
            The block's output, and the map. Its graph covers this block alone and stores nothing for parameters.
        """
        replicas = self.execution.replicas
        frozen = without_gradient(replicas.full_of([replicas.shard_of(p) for p in unit.parameters()]))
        with preserved_generators(self.execution.device), unit.on_copies(), frozen:
            return linearized(lambda x: self.run(unit, x, message, step), h)

    def run(self, unit: Unit, h: Tensor, message: Any, step: int | None, part: int | None = None) -> Tensor:
        """Run one block under its own random draws of this step, and of this part of the batch."""
        if step is not None:
            place = (step, unit.site.index) if part is None else (step, unit.site.index, part)
            seed = derive_seed(self.execution.seed, "draw", *place)
            seed_generators(seed, self.execution.device)
        with self.autocast(), in_a_sentence(f"block {unit.site.name!r}", "cannot run its input", h):
            out = self.rule.run(unit.block, h, message)
        check_output(self.rule, unit.site, out)
        return out

    def autocast(self) -> Any:
        """The context of the chosen precision."""
        if self.execution.autocast is None:
            return NOTHING
        return torch.autocast(self.execution.device.type, dtype=self.execution.autocast)
