"""The update order, once: forward on the detached input, signal, local backward, step, free, pass on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwise.core.blocks import Block
from layerwise.core.optim import set_learning_rate
from layerwise.core.randomness import derive_seed, seed_generators
from layerwise.core.rule import BlockContext, Rule, Signal, Site
from layerwise.core.tasks import Classification
from layerwise.errors import LayerwiseError


@dataclass
class Unit:
    """A site with what runs and learns there."""

    site: Site
    block: Block
    auxiliary: nn.Module | None

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the block and of the rule's auxiliary module."""
        return self.block.parameters() + list(self.auxiliary.parameters() if self.auxiliary else [])

    def buffers(self) -> list[Tensor]:
        """Buffers of both."""
        return [buffer for _, buffer in self._named_buffers()]

    def running(self) -> list[Tensor]:
        """Running statistics: the buffers that are called `running_...`, as torch's norms have it."""
        named = self._named_buffers()
        return [buffer for name, buffer in named if name.rpartition(".")[2].startswith("running_")]

    def _named_buffers(self) -> list[tuple[str, Tensor]]:
        return [*self.block.named_buffers(), *(self.auxiliary.named_buffers() if self.auxiliary else [])]


@dataclass
class Group:
    """Neighbouring units that share one graph and one backward pass."""

    units: list[Unit]
    ahead: list[Unit]
    """Units behind them, of later groups, through which their signal passes; they lend the graph and do not learn."""
    parameters: list[nn.Parameter]
    """What learns here."""
    optimizers: list[torch.optim.Optimizer]
    """One, or those of the groups that are joined here; none where nothing learns or all rests: no graph then."""
    scaler: torch.amp.GradScaler
    """Scales the signal where gradients are fp16; does nothing otherwise."""
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Running statistics and what they were before the update, to be put back when it is skipped."""

    @property
    def name(self) -> str:
        """Names of the units, joined."""
        first, last = self.units[0].site.name, self.units[-1].site.name
        return first if first == last else f"{first}..{last}"


class Reducer(Protocol):
    """Who averages over the processes that train the same blocks on other samples of the batch."""

    every_batch: bool
    """Whether gradients are averaged behind every batch, not only where an update is due."""

    def full_of(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Those that blocks run with, in place of what is kept of them here."""
        ...

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of the averaged gradients."""
        ...

    def reduce(
        self, parameters: Sequence[nn.Parameter], running: Sequence[Tensor], loss: Tensor
    ) -> Callable[[], Tensor]:
        """Start to average gradients and running statistics.

        Returns:
            A function that waits until the averages are in place, and gives a number that is finite where the loss is
            finite everywhere.
        """
        ...


@dataclass(frozen=True)
class Execution:
    """How blocks are run and updated; the same for every rule."""

    device: torch.device
    task: Classification
    schedule: Callable[[int], float]
    autocast: torch.dtype | None = None
    clip: float | None = None
    accumulate: int = 1
    nonfinite: Literal["raise", "skip"] = "raise"
    seed: int = 0
    replicas: Reducer | None = None


@dataclass
class Trace:
    """What one pass leaves behind: scalars on the device, read when somebody asks."""

    metrics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    finite: dict[str, Tensor] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)


@dataclass
class Trunk:
    """The first group while it waits: its graph is kept until the later groups have sent their gradients back."""

    group: Group
    h: Tensor
    """Its input."""
    signals: list[tuple[Signal, Tensor]]
    out: Tensor
    """Its output, with the graph."""
    gradient: Tensor
    """Sum of what the later groups sent back, of the shape of `out`."""


class NonFinite(LayerwiseError):
    """A signal or a gradient is NaN or infinite."""

    def __init__(self, block: str, step: int, input_is_finite: bool):
        if input_is_finite:
            cause = (
                "lower the learning rate, clip gradients (clip=1.0), or count and skip such steps (nonfinite='skip')"
            )
        else:
            cause = "its input already holds NaN or infinity, so look at the data or the block before it"
        super().__init__(f"block {block!r} has a non-finite loss or gradient at step {step}: {cause}.")


def detach(tree: Any) -> Any:
    """The same tensors without history; every boundary between groups is this call."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


class Engine:
    """Runs groups of blocks for a rule. Nothing else in the library knows the update order.

    Attributes:
        resident: the context in which units run; offloaded ones are on the device inside.
    """

    def __init__(
        self,
        rule: Rule,
        execution: Execution,
        resident: Callable[[Sequence[Unit]], AbstractContextManager[None]] = lambda units: nullcontext(),
    ):
        self.rule = rule
        self.how = execution
        self._reduced: Callable[[], Any] | None = None
        """The step of the group whose gradients are being averaged over the replicas."""
        self.resident = resident

    def forward(
        self, group: Group, h: Tensor, message: Any, y: Tensor, step: int | None, trace: Trace
    ) -> tuple[list[tuple[Signal, Tensor]], Tensor, Any]:
        """Run a group's blocks and ask the rule for its signals.

        Args:
            h: input of the group's first block.
            message: of the site before.
            step: the training step, which decides the random draws; None in evaluation.

        Returns:
            Signals with the output that each one belongs to; input and message of the next group.
        """
        signals: list[tuple[Signal, Tensor]] = []
        passed_on = h, message
        units = [*group.units, *(group.ahead if step is not None else [])]
        view = range(units[0].site.index, units[-1].site.index + 1)
        for unit in units:
            out = self.run(unit, h, message, step)
            with self.autocast():
                training, learns = step is not None, step is not None and bool(group.optimizers)
                moment = BlockContext(
                    unit.site, out, h, message, y, self.how.task, unit.auxiliary, training, learns, view
                )
                signal = self.rule.signal(moment)
            h = out if signal.output is None else signal.output
            message = signal.message
            if signal.loss is not None:
                signal.metrics.setdefault("loss", signal.loss)
            signals.append((signal, out))
            if unit.site.index <= group.units[-1].site.index:
                passed_on = h, message
                if signal.metrics:
                    trace.metrics[unit.site.name] = detach(signal.metrics)
        return signals, *passed_on

    def step(
        self, groups: Sequence[Group], h: Tensor, message: Any, y: Tensor, step: int, trace: Trace
    ) -> tuple[Tensor, Any]:
        """Update all groups in order, while one batch passes through; a trunk waits and is updated last.

        Args:
            groups: in the order of the network.
            h: detached input of the first.
            message: the first message, detached.
            y: labels.
            step: number of the training step.
            trace: where metrics go.

        Returns:
            Output and message of the last, detached: what a pipeline's next rank gets.
        """
        waiting, trunk = list(groups), None
        if self.rule.has_trunk() and groups[0].optimizers:
            first = waiting.pop(0)
            with self.resident(first.units):
                signals, out, message = self._with_graph(first, h, message, y, step, trace)
            trunk = Trunk(first, h, signals, out, gradient=torch.zeros_like(out))
            h, message = detach(out), detach(message)
        for group in waiting:
            with self.resident([*group.units, *group.ahead]):
                h, message = self.update(group, h, message, y, step, trace, trunk)
        if trunk is not None:
            sent_back = (Signal(cotangent=trunk.gradient), trunk.out)
            with self.resident(trunk.group.units):
                self._learn(trunk.group, trunk.h, [*trunk.signals, sent_back], step, trace)
        self._step_reduced()
        return h, message

    def update(
        self,
        group: Group,
        h: Tensor,
        message: Any,
        y: Tensor,
        step: int,
        trace: Trace,
        trunk: Trunk | None = None,
    ) -> tuple[Tensor, Any]:
        """One group's whole update; returns the detached input and message of the next group.

        Where there is a trunk, the gradient on the group's input goes back to it, as the rule says.
        """
        if trunk is not None and group.optimizers:
            h = h.detach().requires_grad_()
        signals, h_out, message_out = self._with_graph(group, h, message, y, step, trace)
        scale = group.scaler.get_scale() if trunk is not None else 1.0  # the step below may change it
        if group.optimizers:
            self._learn(group, h, signals, step, trace)
        if trunk is not None and h.grad is not None:
            gradient = h.grad * (self.how.accumulate / scale)  # in the units of the loss
            sent_back = self.rule.to_trunk(group.units[0].site, gradient, self.how.task)
            if sent_back is not None:
                trunk.gradient += sent_back
        return detach(h_out), detach(message_out)

    def _with_graph(
        self, group: Group, h: Tensor, message: Any, y: Tensor, step: int, trace: Trace
    ) -> tuple[list[tuple[Signal, Tensor]], Tensor, Any]:
        """The forward pass of an update: with a graph where something learns."""
        if self.how.nonfinite == "skip" and group.optimizers and step % self.how.accumulate == 0:
            group.buffers = [(b, b.clone()) for unit in group.units for b in unit.buffers()]
        with torch.set_grad_enabled(bool(group.optimizers)):
            return self.forward(group, h, message, y, step, trace)

    def _learn(self, group: Group, h: Tensor, signals: list[tuple[Signal, Tensor]], step: int, trace: Trace) -> None:
        """Backward, and the optimizer's step where enough batches have accumulated.

        With replicas the step comes when their gradients have, while the next group runs forward; before its backward
        pass at the latest, so that never more than one group's gradients are alive.
        """
        self._step_reduced()
        loss = self._backward(group, h, signals)
        due = (step + 1) % self.how.accumulate == 0
        if self.how.replicas is None:
            if due:
                self._step(group, h, loss, step, trace)
        elif due or self.how.replicas.every_batch:
            running = [buffer for unit in group.units for buffer in unit.running()]
            arrived = self.how.replicas.reduce(group.parameters, running, loss)
            self._reduced = (lambda: self._step(group, h, arrived(), step, trace)) if due else arrived

    def _step_reduced(self) -> None:
        """The step of the group whose gradients are on their way, if there is one."""
        waiting, self._reduced = self._reduced, None
        if waiting is not None:
            waiting()

    def run(self, unit: Unit, h: Tensor, message: Any, step: int | None) -> Tensor:
        """Run one block under its own random draws of this step."""
        if step is not None:
            seed = derive_seed(self.how.seed, "draw", step, unit.site.index)
            seed_generators(seed, self.how.device)
        with self.autocast():
            return self.rule.run(unit.block, h, message)

    def autocast(self) -> Any:
        """The context of the chosen precision."""
        if self.how.autocast is None:
            return nullcontext()
        return torch.autocast(self.how.device.type, dtype=self.how.autocast)

    def _backward(self, group: Group, h: Tensor, signals: list[tuple[Signal, Tensor]]) -> Tensor:
        """Backward inside the group only, down to its input for a trunk; returns the summed loss, without history."""
        losses = [signal.loss for signal, _ in signals if signal.loss is not None]
        roots = [(loss, torch.ones_like(loss)) for loss in losses]
        roots += [(out, s.cotangent) for s, out in signals if s.cotangent is not None]
        if roots:
            cotangents = [cotangent for _, cotangent in roots]
            if self.how.accumulate > 1:
                cotangents = [cotangent / self.how.accumulate for cotangent in cotangents]
            # Gradients for this group's parameters alone: what lends its graph, or does not learn, gets none.
            own = group.parameters if self.how.replicas is None else self.how.replicas.full_of(group.parameters)
            wanted = [*own, *([h] if self.rule.has_trunk() and h.requires_grad else [])]
            torch.autograd.backward([root for root, _ in roots], list(group.scaler.scale(cotangents)), inputs=wanted)
        return torch.stack([loss.detach().float() for loss in losses or [torch.zeros(())]]).sum()

    def _step(self, group: Group, h: Tensor, loss: Tensor, step: int, trace: Trace) -> None:
        """Check, clip, step, free the gradients."""
        for optimizer in group.optimizers:
            group.scaler.unscale_(optimizer)
        if self.how.replicas is None:
            grads = [p.grad for p in group.parameters if p.grad is not None]
            norm = nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in grads])
        else:
            norm = self.how.replicas.norm(group.parameters)
        if self._may_step(group, h, loss, norm, step, trace):
            if self.how.clip is not None:
                nn.utils.clip_grads_with_norm_(group.parameters, self.how.clip, norm)
            for optimizer in group.optimizers:
                set_learning_rate(optimizer, self.how.schedule(step // self.how.accumulate))
                try:
                    group.scaler.step(optimizer)
                except RuntimeError as reason:
                    if "sparse" not in str(reason).lower():
                        raise
                    raise LayerwiseError(
                        f"{type(optimizer).__name__} cannot use the gradients of {group.name!r} ({reason}); sparse "
                        "gradients need sgd with momentum 0 or adagrad, both with weight_decay=0, or sparse=False in "
                        "the embedding."
                    ) from reason
        group.scaler.update()
        self._free(group)

    def _free(self, group: Group) -> None:
        for optimizer in group.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _may_step(self, group: Group, h: Tensor, loss: Tensor, norm: Tensor, step: int, trace: Trace) -> bool:
        """Whether signal and gradient are finite; an overflow of scaled gradients is the scaler's own affair."""
        finite = torch.isfinite(loss if group.scaler.is_enabled() else loss + norm)
        if self.how.nonfinite == "raise" and self.how.device.type != "cpu":
            # Reading the flag here would wait for the device: it is read with the metrics.
            trace.finite[group.name] = finite
            return True
        if bool(finite):
            return True
        if self.how.nonfinite == "skip":
            trace.skipped.add(group.name)
            for buffer, before in group.buffers:
                buffer.copy_(before)
            return False
        self._free(group)
        raise NonFinite(group.name, step, input_is_finite=bool(torch.isfinite(h).all()))
