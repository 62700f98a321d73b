"""The update order, once: forward on the detached input, signal, local backward, step, free, pass on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.arrival import as_gradients_arrive
from layerwise.core.contract import asking, check_sent_back
from layerwise.core.execution import Execution
from layerwise.core.failures import NonFinite, in_a_sentence
from layerwise.core.finite import FiniteCheck
from layerwise.core.following import NextBlock
from layerwise.core.functional import wide
from layerwise.core.given import add_given, give
from layerwise.core.groups import Group, Unit, parameters_of
from layerwise.core.param_groups import set_learning_rate
from layerwise.core.parts import JoinedParts, Labelled, labelled_parts
from layerwise.core.perturbation import Estimate
from layerwise.core.pieces import (
    FollowsNextBlock,
    HasTrunk,
    PerturbsWeights,
    RenewsUnits,
    StepsByParameter,
    has_trunk,
)
from layerwise.core.progress import Accumulation, Trace, WaitingTrunk
from layerwise.core.pullback import without_gradient
from layerwise.core.randomness import derive_seed
from layerwise.core.reached import check_reached, check_still_reached
from layerwise.core.renewal import renew
from layerwise.core.rule import Rule, Signal
from layerwise.core.runner import NOTHING, Runner, Signals
from layerwise.core.stepping import explained_step, take_step
from layerwise.core.tasks import Task
from layerwise.core.trees import all_finite, detach
from layerwise.errors import LayerwiseError


def _are_one(*factors: float | Tensor) -> bool:
    """Whether factors are known to be 1; nothing waits for a device to find out."""
    return all(isinstance(factor, float) and factor == 1 for factor in factors)


def _sum(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0] if len(scalars) == 1 else torch.stack(list(scalars)).sum()


class Engine(Runner):
    """Updates groups of blocks for a rule. Nothing else in the library knows the update order.

    Attributes:
        resident: the context in which units run; offloaded ones are on the device inside.
        accumulation: the current update.
        next_block: where modules that follow the next block get its tensors.
    """

    def __init__(
        self,
        rule: Rule,
        task: Task,
        execution: Execution,
        resident: Callable[[Sequence[Unit]], AbstractContextManager[None]] = nullcontext,
    ):
        super().__init__(rule, task, execution)
        self.resident = resident
        self.finite = FiniteCheck(execution)
        self.accumulation = Accumulation()
        self.next_block = NextBlock()
        self._perturbs = rule if isinstance(rule, PerturbsWeights) else None
        self._weight: float | Tensor = 1.0
        """Of the current batch, or of this process's share of it."""
        self._parts: list[Labelled] = []
        """Of the current batch."""
        self._stepped: set[int] = set()
        """Parameters that have stepped in the backward pass under way."""
        self._reduced: Callable[[], Any] | None = None
        """The step of the group whose gradients are being averaged over the replicas."""

    def step(
        self, groups: Sequence[Group], h: Tensor, message: Any, y: Tensor, step: int, trace: Trace
    ) -> tuple[Tensor, Any]:
        """Update all groups in order, while one batch passes through; a trunk waits and is updated last.

        Args:
            groups: in the order of the network.
            h: detached input of the first; the whole batch where the model is cut at its calls.
            message: the first message, detached.
            y: labels.
            step: number of the training step.
            trace: where metrics go.

        Returns:
            Output and message of the last, detached: what a pipeline's next rank gets.

        Raises:
            LayerwiseError: a block that cannot run, a signal that cannot be used, a loss that is not finite. The
                current update is then abandoned with all its batches; groups before the one that failed may have
                been updated.
        """
        with self._abandoned_on_error(groups):
            self.take(y)
            waiting, trunk = list(groups), None
            if has_trunk(self.rule) and groups[0].learns:
                first = waiting.pop(0)
                with self.resident(first.units):
                    signals, out, message = self._with_graph(first, h, message, y, step, trace)
                trunk = WaitingTrunk(first, h, signals, out, gradient=torch.zeros_like(out))
                h, message = detach(out), detach(message)
            for group in waiting:
                with self.resident([*group.units, *group.ahead]):
                    h, message = self.update(group, h, message, y, step, trace, trunk)
                    if self._due:
                        self._follow(group, trace)
            if trunk is not None:
                sent_back = (Signal(cotangent=trunk.gradient), trunk.out)
                with self.resident(trunk.group.units):
                    loss = self._add(trunk.group, trunk.h, [*trunk.signals, sent_back], step)
                    self._learn(trunk.group, trunk.h, loss, step, trace)
            self._step_reduced()
            if self._due:
                self.accumulation.next()
        return h, message

    def _follow(self, group: Group, trace: Trace) -> None:
        """Modules of the group that follow the next block look at it: its own update comes after this group's.

        Not where the group's step is skipped, which is known when the replicas' averages have come.
        """
        rule = self.rule
        units = [unit for unit in group.units if unit.followed and unit.auxiliary is not None]
        if not units or not isinstance(rule, FollowsNextBlock):
            return
        tensors = [self.next_block.tensors(unit.site, unit.followed) for unit in units]  # sent by ranks in any case
        step, self._reduced = self._reduced, None

        @torch.no_grad()
        def follow() -> None:
            if step is not None:
                step()
            if group.name in trace.skipped or group.broken:
                return
            for unit, of_next in zip(units, tensors, strict=True):
                assert unit.auxiliary is not None
                with asking(rule, f"`follow` at block {unit.site.name!r}"):
                    rule.follow(unit.auxiliary, of_next)

        self._finish(follow)

    def tell(self) -> None:
        """Before a batch that completes an update: send what modules of other ranks follow of the blocks here."""
        if self.accumulation.batches + 1 == self.execution.accumulate:
            self.next_block.tell()

    def take(self, y: Tensor) -> None:
        """Take a batch with these labels into the current update; `step` does so for every batch."""
        replicas, counted = self.execution.replicas, self.task.counted(y, self.rule.unlabelled)
        # Of a share, where replicas share the batch; it weighs as much in their mean as it has of the batch's labels.
        self._weight = self.accumulation.add(counted * replicas.count, replicas.total(counted))
        self._parts = labelled_parts(y, self.execution.micro, self.task, self.rule.unlabelled)

    @property
    def _due(self) -> bool:
        """Whether the current update has all its batches."""
        return self.accumulation.batches == self.execution.accumulate

    @contextmanager
    def _abandoned_on_error(self, groups: Sequence[Group]) -> Iterator[None]:
        """A context in which an error abandons the current update: its gradients are freed, its batches forgotten."""
        try:
            yield
        except BaseException:  # also for an interrupt: the next update must not see anything of this one
            self._reduced = None
            self.accumulation.restart()
            for group in groups:
                group.abandon()
            raise

    def flush(self, groups: Sequence[Group], step: int, trace: Trace) -> bool:
        """Do the current update with the batches that it has; returns whether there were any.

        Raises:
            LayerwiseError: as `step` does, and the current update is then abandoned too.
        """
        if self.accumulation.batches == 0:
            return False
        self.next_block.tell()
        with self._abandoned_on_error(groups):
            for group in groups:
                with self.resident(group.units):
                    self._flush(group, step, trace)
                    self._follow(group, trace)
            self._step_reduced()
            self.accumulation.next()
        return True

    def _flush(self, group: Group, step: int, trace: Trace) -> None:
        replicas, loss = self.execution.replicas, self.finite.verdict(group)
        if group.learns:
            if not replicas.every_batch:
                loss = replicas.reduce(group.parameters, group.running(), loss)()
            self._step(group, None, loss, step, trace)
        elif not replicas.every_batch:
            self._average(group)

    def update(
        self,
        group: Group,
        h: Tensor,
        message: Any,
        y: Tensor,
        step: int,
        trace: Trace,
        trunk: WaitingTrunk | None = None,
    ) -> tuple[Tensor, Any]:
        """One group's whole update; returns the detached input and message of the next group.

        With `micro` parts the batch comes through in so many, each forward, signal and backward; the gradients of this
        group add up to those of the mean over the counted labels, and it steps once. Of the activations one part's are
        alive at a time.

        Where there is a trunk, the gradient on the group's input goes back to it, as the rule says.
        """
        if self._perturbs is not None and group.learns:
            return self._perturbed(group, h, message, y, step, trace, *self._perturbs.perturbations())
        if trunk is not None and group.learns:
            h = h.detach().requires_grad_()
        outputs = JoinedParts(group.name)
        losses = [self._run_part(group, labelled, h, message, step, trace, outputs) for labelled in self._parts]
        h_out, message_out = outputs.tree
        for name in [unit.site.name for unit in group.units] if trace.statistics else ():
            sums = trace.statistics.pop(name, None)  # of every block they would grow with depth
            if sums is not None and self.execution.micro > 1:  # metrics that are no means over the parts
                trace.metrics[name] |= self.task.measures(sums)
        scale = group.scaler.get_scale() if trunk is not None else 1.0  # the step below may change it
        if group.learns:
            self._learn(group, h, _sum(losses), step, trace)
        else:
            self.finite.judge_resting(group, h_out)
            if self._due or self.execution.replicas.every_batch:
                self._average(group)
        if trunk is not None and h.grad is not None:
            assert isinstance(self.rule, HasTrunk)
            # In the units of the loss.
            gradient = h.grad if _are_one(self._weight, scale) else h.grad / (self._weight * scale)
            site = group.units[0].site
            with asking(self.rule, f"`to_trunk` at block {site.name!r}"):
                sent_back = self.rule.to_trunk(site, gradient, self.task)
            check_sent_back(self.rule, site, sent_back, trunk.out)
            if sent_back is not None:
                trunk.gradient += sent_back
        return h_out, message_out

    def _run_part(
        self, group: Group, labelled: Labelled, h: Tensor, message: Any, step: int, trace: Trace, outputs: JoinedParts
    ) -> Tensor:
        """Forward, signal and backward of a part of the batch; `outputs` gets its output and message.

        Returns:
            The loss, as the part's share of the batch's.
        """
        part, share = labelled.part, labelled.share
        network = group.units[0].site.network
        if network is not None:
            network.turn_to(part)
        h, message = part.of(h), part.of(message)
        signals, out, message = self._with_graph(group, h, message, labelled.y, step, trace, part.index, share)
        outputs.add(part, detach((out, message)))
        device = out.device
        del out, message  # those of a part have been copied, and would stay in memory during its backward pass
        return self._add(group, h, signals, step, share) if group.learns and share else torch.zeros((), device=device)

    def _with_graph(
        self,
        group: Group,
        h: Tensor,
        message: Any,
        y: Tensor,
        step: int,
        trace: Trace,
        part: int | None = None,
        share: float = 1.0,
    ) -> tuple[Signals, Tensor, Any]:
        """The forward pass of an update: with a graph where something learns, unless the rule needs none."""
        first = self.accumulation.batches <= 1 and not part
        if first:  # gradients that the user has computed are not part of the update
            group.free()
            for optimizer in group.resting:
                optimizer.state.clear()
        if self.accumulation.batches == 1 and first:
            self.finite.begin(group)
        learns = group.learns and self.rule.builds_graph
        graph = NOTHING if torch.is_grad_enabled() == learns else torch.set_grad_enabled(learns)
        with graph, self._frozen(group) if group.resting else NOTHING:
            return self.forward(group, h, message, y, step, trace, part, share)

    def _frozen(self, group: Group) -> AbstractContextManager[None]:
        """A context in which parameters at rest want no gradient, so that the graph keeps nothing for them."""
        return without_gradient(self.execution.replicas.full_of(parameters_of(group.resting)))

    def _add(self, group: Group, h: Tensor, signals: Signals, step: int, share: float = 1.0) -> Tensor:
        """Add the gradients of signals to those that the group has; returns the loss, as its share of the batch's.

        With replicas the group before steps now at the latest, so that only one group's gradients are in memory.
        """
        self._step_reduced()
        if not isinstance(self.rule, StepsByParameter):
            return self._backward(group, h, signals, share)
        norms: list[Tensor] = []
        self._stepped = set()

        def arrived(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
            norms.append(self._step_parameter(group, optimizer, parameter, h, step))

        with as_gradients_arrive(group.optimizers, arrived):
            loss = self._backward(group, h, signals, share)
        return sum((0 * norm for norm in norms), loss)  # finite where loss and gradients are

    def _learn(self, group: Group, h: Tensor, loss: Tensor, step: int, trace: Trace) -> None:
        """The optimizer's step where enough batches have accumulated.

        With replicas the step comes when their gradients have, while the next group runs forward.
        """
        replicas = self.execution.replicas
        if not self._due:
            self.finite.note(group, h, loss, step, trace)
        if group.broken:
            loss = torch.full_like(loss, torch.nan)
        if not (self._due or replicas.every_batch):
            return
        arrived = replicas.reduce(group.parameters, group.running(), loss)
        if self._due:
            self._finish(lambda: self._step(group, h, arrived(), step, trace))
        else:
            self._finish(lambda: self.finite.heed(group, arrived()))

    def _finish(self, step: Callable[[], Any]) -> None:
        """Do what waits for averages: at once, or while the next group runs."""
        if self.execution.replicas.deferred:
            self._reduced = step
        else:
            step()

    def _step_reduced(self) -> None:
        """The step of the group whose gradients are on their way, if there is one."""
        waiting, self._reduced = self._reduced, None
        if waiting is not None:
            waiting()

    def _average(self, group: Group) -> None:
        """Average the running statistics of a group that does not learn over the replicas, or put all of them back."""
        self._step_reduced()
        if self.execution.replicas.count == 1:
            return
        arrived = self.execution.replicas.reduce([], group.running(), self.finite.verdict(group))
        self._finish(lambda: self.finite.heed(group, arrived()))

    def average(self, groups: Sequence[Group]) -> None:
        """Average over the replicas what an unfinished update has accumulated."""
        for group in groups:
            verdict = self.finite.verdict(group)
            self.finite.heed(group, self.execution.replicas.reduce(group.parameters, group.running(), verdict)())

    def _backward(self, group: Group, h: Tensor, signals: Signals, share: float) -> Tensor:
        """Backward inside the group only, down to its input for a trunk; returns the summed loss, without history.

        Gradients and loss are weighed by the share of the batch's labels.
        """
        losses = [signal.loss for signal, _ in signals if signal.loss is not None]
        weighed = self.execution.accumulate > 1 or self.execution.replicas.count > 1 or share != 1
        plain = not weighed and not group.scaler.is_enabled()  # then None is a loss's own gradient of 1
        roots: list[tuple[Tensor, Any]] = [(loss, None if plain else torch.ones_like(loss)) for loss in losses]
        roots += [(out, s.cotangent) for s, out in signals if out is not None]
        # A root without a history is a signal that reaches nothing that learns.
        roots = [(root, cotangent) for root, cotangent in roots if root.requires_grad]
        own = self.execution.replicas.full_of(group.parameters)
        wanted = [p for p in own if p.requires_grad]
        if roots:
            cotangents = [cotangent for _, cotangent in roots]
            if weighed:
                factor = self._weight if share == 1 else self._weight * share
                cotangents = [cotangent * factor for cotangent in cotangents]
            # Gradients for this group's parameters alone: what extends its graph, or does not learn, gets none.
            inputs = [*wanted, *([h] if has_trunk(self.rule) and h.requires_grad else [])]
            with in_a_sentence(f"block {group.name!r}", "cannot be run backward", h):
                ends = [root for root, _ in roots]
                torch.autograd.backward(ends, list(group.scaler.scale(cotangents)), inputs=inputs)
        given = [pair for signal, _ in signals for pair in signal.gradients.items()]
        if given:
            add_given(self.rule, group, given, own, self._weight * share)
        taught = any(s.loss is not None or s.cotangent is not None or s.gradients for s, _ in signals)
        if not group.checked and all(unit.block.ran for unit in group.units):
            group.checked = True
            reached = self._stepped | {id(p) for p in wanted if p.grad is not None}
            check_reached(self.rule, group, own, reached, taught)
        elif taught and not group.resting and not self.execution.replicas.shares_parameters:
            check_still_reached(group, lambda p: p.grad is not None or id(p) in self._stepped)
        loss = _sum([wide(loss.detach()) for loss in losses] or [torch.zeros((), device=self.execution.device)])
        return loss if share == 1 else loss * share

    def _step(self, group: Group, h: Tensor | None, loss: Tensor, step: int, trace: Trace) -> None:
        """Check, clip, step, free the gradients."""
        for parameter in group.parameters:
            if not parameter.requires_grad:  # frozen since an earlier batch of the update
                parameter.grad = None
        # A scaler refuses an optimizer all of whose parameters are frozen.
        learning = (
            group.optimizers if not group.scaler.is_enabled() else [o for o in group.optimizers if _has_gradient(o)]
        )
        for optimizer in learning:
            group.scaler.unscale_(optimizer)
        if self.execution.accumulate > 1:
            gradients = [p.grad for p in group.parameters if p.grad is not None]
            if gradients:
                torch._foreach_div_(gradients, self.accumulation.weight)  # pyright: ignore[reportPrivateImportUsage]
        clips, replicas = self.execution.clip is not None, self.execution.replicas
        norm = replicas.norm(group.parameters) if clips else replicas.sum(group.parameters)
        may_step = self.finite.may_step(group, h, loss, norm, step, trace)
        if may_step and not isinstance(self.rule, StepsByParameter):
            if self.execution.clip is not None:
                assert isinstance(norm, Tensor)
                nn.utils.clip_grads_with_norm_(group.parameters, self.execution.clip, norm)
            for optimizer in learning:
                self._step_optimizer(group, optimizer)
            if isinstance(self.rule, RenewsUnits):
                renew(self.rule, group, step)
        group.scaler.update()
        group.broken = False
        group.free()

    def _step_optimizer(self, group: Group, optimizer: torch.optim.Optimizer) -> None:
        set_learning_rate(optimizer, self._factor())
        with explained_step(optimizer, group.name):
            if group.scaler.is_enabled():
                group.scaler.step(optimizer)
            else:
                take_step(optimizer)

    def _step_parameter(
        self, group: Group, optimizer: torch.optim.Optimizer, parameter: Any, h: Any, step: int
    ) -> Tensor:
        """One parameter's update; frees its gradient and returns the norm that it had."""
        norm = self.execution.replicas.norm([parameter])
        if norm.device.type == "cpu" and not bool(torch.isfinite(norm)):
            raise NonFinite(group.name, step, input_is_finite=all_finite(h))
        self._step_optimizer(group, optimizer)
        parameter.grad = None
        self._stepped.add(id(parameter))
        return norm

    @torch.no_grad()
    def _perturbed(
        self, group: Group, h: Tensor, message: Any, y: Tensor, step: int, trace: Trace, eps: float, directions: int
    ) -> tuple[Tensor, Any]:
        """One group's update by `PerturbsWeights`: forward passes, then one parameter's gradient after the other."""
        of = [(optimizer, p) for optimizer in group.optimizers for p in parameters_of([optimizer]) if p.requires_grad]
        seeds = [derive_seed(self.execution.seed, "direction", step, number) for number in range(directions)]
        estimate = Estimate([p for _, p in of], seeds)
        passed_on: list[Any] = []

        def loss() -> Tensor:
            again = bool(passed_on)
            signals, *out = self.forward(group, h, message, y, step, Trace() if again else trace, aside=again)
            passed_on[:] = passed_on or [detach(part) for part in out]
            losses = [signal.loss for signal, _ in signals if signal.loss is not None]
            wide = (loss.to(torch.promote_types(loss.dtype, torch.float32)) for loss in losses)
            return sum(wide, torch.zeros((), device=self.execution.device))

        total = estimate.measure(eps, loss)
        if self.finite.may_step(group, h, total, 0 * total, step, trace):
            for place, (optimizer, parameter) in enumerate(of):
                give(parameter, estimate.gradient(place))
                self._step_optimizer(group, optimizer)
                parameter.grad = None
        return passed_on[0], passed_on[1]

    def _factor(self) -> float:
        """What the schedule says of this update."""
        update = self.accumulation.updates
        try:
            return float(self.execution.schedule(update))
        except Exception as reason:  # a user's function may raise anything
            raise LayerwiseError(
                f"the schedule gives no number for update {update} ({str(reason) or type(reason).__name__}); let it "
                "return a factor of the learning rate."
            ) from reason


def _has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
