"""Learner: a model, a rule and an optimizer, in three lines of anybody's own training loop."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise import rules
from layerwise.core.blocks import Partition, partition
from layerwise.core.engine import Engine, Execution, Group, NonFinite, Trace, Unit, detach
from layerwise.core.grouping import Grouping
from layerwise.core.optim import OptimizerFactory, Schedule, decay_groups, optimizer_factory
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.rule import BatchContext, Rule, Site, check_words
from layerwise.core.tasks import UNLABELLED, Classification
from layerwise.errors import LayerwiseError, suggestion
from layerwise.learner.checks import Expected, check_parts, check_state
from layerwise.learner.state import without_meta
from layerwise.memory.meter import MemoryMeter, MemoryUse, optimizer_tensors
from layerwise.memory.mmap import release_pages
from layerwise.memory.offload import Offload, Where, check_offload
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass
class Metrics:
    """What one step measured: scalars that stay on the device until `read()`.

    Attributes:
        step: number of the step, from 0.
        samples: size of the batch, the shares of all replicas together.
        blocks: per block name (and `"head"`), the rule's scalars, such as `loss` and `accuracy`.
        skipped: names of the groups whose update was skipped (`nonfinite="skip"`).
    """

    step: int
    samples: int
    blocks: dict[str, dict[str, Tensor]]
    skipped: tuple[str, ...]
    finite: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """Loss at the head: a scalar on the device, in nats."""
        return self.blocks["head"]["loss"]

    @property
    def accuracy(self) -> Tensor:
        """Share of the batch that the head gets right: a scalar on the device."""
        return self.blocks["head"]["accuracy"]

    def read(self) -> dict[str, float]:
        """All scalars as floats, keyed `"head/loss"`; this waits for the device.

        Raises:
            LayerwiseError: a loss or gradient of the step was not finite (on an accelerator it is noticed
                here, because looking earlier would stall the device).
        """
        for name, finite in self.finite.items():
            if not bool(finite):
                raise NonFinite(name, self.step, input_is_finite=True)
        names = [(block, key) for block, found in self.blocks.items() for key in found]
        if not names:
            return {}
        values = torch.stack([self.blocks[block][key].float() for block, key in names]).tolist()
        return {f"{block}/{key}": value for (block, key), value in zip(names, values, strict=True)}


class Learner:
    r"""Train a model with a learning rule, without global backpropagation.

    In place of `loss.backward(); optimizer.step()`:

        learner = Learner(model, "sll", optimizer="adamw", lr=1e-3)
        for x, y in loader:
            learner.step(x, y)
        logits = learner(x)

    Args:
        model: a module, or a `Partition` of one. It is trained in place and stays an ordinary module.
        rule: name of a rule, or a rule.
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, `"rmsprop"`, any class of `torch.optim` or its name, or a
            callable from parameter groups to an optimizer. Every group of blocks gets its own.
        lr: learning rate.
        weight_decay: of weights; norms and biases have none.
        optimizer_options: further arguments of the optimizer's class.
        lr_multipliers: factor of the learning rate per block name.
        schedule: multiplier of the learning rate as a function of the update number.
        clip: largest norm of one group's gradient.
        accumulate: batches per update. Gradients then live from one batch to the next, so that their memory
            grows with depth; activations still do not.
        precision: `"fp32"`, `"bf16"` or `"fp16"` (autocast; fp16 with a gradient scaler per group).
        compile: run every block through `torch.compile`; a string names the backend.
        channels_last: keep images and convolutions in channels-last order.
        nonfinite: `"raise"` stops at a non-finite loss or gradient; `"skip"` leaves that block's update out
            and counts the step in `skipped`.
        label_smoothing: share of the target spread over all classes, in every loss that uses the label.
        seed: of all random draws. A draw depends on (seed, step, block) only; torch's global generators are
            left as they were.
        cuts: where to cut the model, see `partition`.
        blocks: number of blocks, see `partition`.
        example: one batch of inputs; builds everything now instead of at the first step.
        stage: the part of the network that this process runs, as one of several ranks; all of it if not given.
        replicas: the processes that train the same blocks, each on its share of every batch; none if not given. Draws
            then depend on the replica too, but those of the initial weights, which are the first one's. With `Shards`
            each keeps a share of parameters and optimizer state, and all have to predict and evaluate equally often.
        device: where blocks run; where the model's parameters are if not given.
        offload: `"host"` or `"disk"` keeps parameters and optimizer state there, and on the device only those of the
            groups that are about to run; `onload` brings them back. Until then the model's own tensors show nothing.
        offload_folder: for the file of `"disk"`; the system's folder for temporary files if not given.

    Raises:
        LayerwiseError: an unknown rule, cut, optimizer or block name; a value out of range; labels or inputs
            that do not fit the model.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> learner = Learner(model, "sll", lr=0.01)
    >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
    >>> metrics = learner.step(x, y)
    >>> learner(x).shape
    torch.Size([8, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "sll",
        *,
        optimizer: str | type[torch.optim.Optimizer] | OptimizerFactory = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        optimizer_options: Mapping[str, Any] | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        schedule: Callable[[int], float] | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        precision: Precision = "fp32",
        compile: bool | str = False,
        channels_last: bool = False,
        nonfinite: Literal["raise", "skip"] = "raise",
        label_smoothing: float = 0.0,
        seed: int = 0,
        cuts: Sequence[str] | str | None = None,
        blocks: int | None = None,
        example: Tensor | None = None,
        stage: Stage | None = None,
        replicas: Replicas | None = None,
        device: torch.device | str | None = None,
        offload: Where = "none",
        offload_folder: str | Path | None = None,
    ):
        _check_options(clip, accumulate, precision, nonfinite)
        check_offload(offload, stage or replicas, compile)
        if replicas is not None:
            replicas.check(precision=precision, compile=compile, channels_last=channels_last)
        self.rule = rules.create(rule) if isinstance(rule, str) else rule
        check_words(self.rule)
        self.network: Partition = partition(model, cuts, blocks=blocks, example=example)
        names = [block.name for block in [*self.network.blocks, self.network.head]]
        self.lr_multipliers = dict(lr_multipliers or {})
        for name in self.lr_multipliers:
            if name not in names:
                raise LayerwiseError(f"lr_multipliers names no block {name!r}; {suggestion(name, names)}.")
        self.factory = optimizer_factory(optimizer, lr=lr, weight_decay=weight_decay, options=optimizer_options)
        self.device = next(model.parameters()).device if device is None else torch.device(device)
        if device is not None and offload == "none":
            self.network.to(self.device)
        self.channels_last = channels_last
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._compile = compile
        self.schedule = schedule or Schedule()
        self._how: dict[str, Any] = {
            "device": self.device,
            "schedule": self.schedule,
            "autocast": {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
            "clip": clip,
            "accumulate": accumulate,
            "nonfinite": nonfinite,
            # The first replica draws what one process would; the others must not drop the same units as it does.
            "seed": derive_seed(seed, "replica", replicas.rank) if replicas is not None and replicas.rank else seed,
            "replicas": replicas,
        }
        self._seed = seed
        Classification(1, label_smoothing)  # refuses a wrong value now; the number of classes is known later
        self.label_smoothing = label_smoothing
        self.stage, self.replicas = stage, replicas
        self._offload_to: tuple[Where, Path] = offload, Path(offload_folder or tempfile.gettempdir())
        self.offload: Offload | None = None
        self.steps = 0
        self.prepares = type(self.rule).prepare is not Rule.prepare
        self._prepared = False
        self.skipped = 0
        self.auxiliary = nn.ModuleDict()
        self._grouping = self._grouped([])
        self._pending: Mapping[str, Any] | None = None
        if example is not None:
            self.build(example)

    def build(self, x: Tensor) -> None:
        """Make the rule's auxiliary modules and the optimizers; done by the first `step` if not before.

        Args:
            x: one batch of inputs; a single sample of it is run to learn the shapes.

        Raises:
            LayerwiseError: the network does not take such an input, or is not what was partitioned.
        """
        self.network.check_modules()
        blocks = [*self.network.blocks, self.network.head]
        ranges = list(self.rule.groups(len(blocks) - 1))
        ends = [later.start for later in ranges[1:]] + [len(blocks)]
        kind, folder = self._offload_to
        if kind != "none" and self.offload is None:  # an earlier attempt may have failed at the input
            own = [blocks[sites.start : end] for sites, end in zip(ranges, ends, strict=True)]
            self.offload = Offload(kind, folder, self.device, self.rule, own)
        shapes = self._probe(x[:1].to(self.device))
        task = Classification(shapes[-1].shape[-1], self.label_smoothing)
        mine = range(len(ranges))
        if self.stage is not None:
            mine = self.stage.choose(self.rule, self.network, ranges, self._placed(x[:1]))
        sizes = tuple(tuple(out.shape[1:]) for out in shapes)
        units = []
        for i, block in enumerate(blocks):
            site = Site(i, len(blocks) - 1, block.name, sizes, tuple(x.shape[1:]), self.network)
            units.append(Unit(site, block, None))
        self.task = task
        self.engine = Engine(self.rule, Execution(task=task, **self._how), self._resident)
        if self.replicas is not None:
            found = [*self.network.parameters(), *self.network.buffers()]
            self.replicas.copy_from_first(tensor for tensor in found if not tensor.is_meta)
        groups = []
        for i in mine:
            own = units[ranges[i].start : ends[i]]
            with self._resident(own):
                for unit in own:
                    unit.auxiliary = self._auxiliary(unit.site, shapes[unit.site.index])
                if self.replicas is not None:
                    self.replicas.adopt(self.network.model, own)
                group = self._group(own, ahead=units[ends[i] : ranges[i].stop])
                groups.append(group)
                if self.offload is not None:
                    self.offload.add(group)
        self._grouping = self._grouped(groups)
        if self._compile:
            backend = self._compile if isinstance(self._compile, str) else "inductor"
            for block in blocks:
                block.run = torch.compile(_with_own_code(block.run, block.name), backend=backend)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict(pending)

    def _resident(self, units: Sequence[Unit]) -> AbstractContextManager[None]:
        """A context in which the tensors of these units are on the device, and whole."""
        if self.replicas is not None:
            return self.replicas.resident(units)
        return nullcontext() if self.offload is None else self.offload.resident(units)

    def _auxiliary(self, site: Site, h: Tensor) -> nn.Module | None:
        """The rule's module at a site, where it has one."""
        with preserved_generators(self.device):
            seed_generators(derive_seed(self._seed, "auxiliary", site.index), self.device)
            auxiliary = self.rule.auxiliary(site, h, self.task)
        if auxiliary is not None:
            self.auxiliary[str(site.index)] = auxiliary.to(self.device)
        return auxiliary

    def _probe(self, x: Tensor) -> list[Tensor]:
        """A sample of every block's output and of the logits, without touching running statistics."""
        outputs, h = [], x
        with self.evaluating():
            for block in [*self.network.blocks, self.network.head]:
                try:
                    h = block(h)
                except (RuntimeError, ValueError, IndexError) as reason:
                    raise LayerwiseError(
                        f"block {block.name!r} cannot take an input of shape {tuple(h.shape)} and "
                        f"type {str(h.dtype).removeprefix('torch.')}: {str(reason).splitlines()[0]}; "
                        "check the model against the data."
                    ) from reason
                outputs.append(h)
        return outputs

    def _group(self, units: list[Unit], ahead: list[Unit]) -> Group:
        learning = [unit for unit in units if self.rule.trains(unit.site)]
        groups = [
            group
            for unit in learning
            for group in decay_groups(map(self._kept, unit.parameters()), self.lr_multipliers.get(unit.site.name, 1.0))
        ]
        optimizers = [self.factory(groups)] if groups else []
        if self.replicas is not None:
            for optimizer in optimizers:
                self.replicas.check_optimizer(optimizer)
        parameters = [p for group in groups for p in group["params"]]
        return Group(units, ahead, parameters, optimizers, self._scaler())

    def _kept(self, parameter: nn.Parameter) -> nn.Parameter:
        """What learns here of a parameter of the model: all of it, or a share."""
        return parameter if self.replicas is None else self.replicas.shard_of(parameter)

    def _grouped(self, groups: list[Group]) -> Grouping:
        return Grouping(self.rule, groups, len(self.network.blocks), self._how["accumulate"], self._scaler)

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self._how["autocast"] == torch.float16)

    @property
    def groups(self) -> list[Group]:
        """The groups in which the blocks here are updated; none before `build`."""
        return self._grouping.own

    def groups_at(self, step: int) -> list[Group]:
        """The groups in which a training step updates the blocks: `groups`, unless the rule joins or rests some there.

        Raises:
            LayerwiseError: the rule asks for groups that are not neighbours of its own, joined.
        """
        return self._grouping.at(step)

    @torch.no_grad()
    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Show training data to a rule that starts from them; the first `step` shows its own batch if nobody has.

        Args:
            x: inputs `(N, ...)`, as many as fit.
            y: their labels.

        Raises:
            LayerwiseError: labels that do not fit, or data from which the rule cannot start.
        """
        x, y = self._ready(x, y)
        with preserved_generators(self.device):
            seed_generators(derive_seed(self._seed, "prepare"), self.device)
            self.rule.prepare(self.network, x, y)
        if self.replicas is not None:  # each has seen its own share
            self.replicas.copy_from_first(p for p in self.network.parameters() if not p.is_meta)
        self._prepared = True

    def step(self, x: Tensor, y: Tensor) -> Metrics:
        """Train on one batch: every block is updated once, while the batch passes through.

        Args:
            x: inputs `(B, ...)`.
            y: labels `(B,)`, or `(B, T)` for a language model.

        Returns:
            The step's metrics, still on the device.

        Raises:
            LayerwiseError: labels that do not fit, or a non-finite loss or gradient.
        """
        x, y = self._ready(x, y)
        if self.steps == 0 and self.prepares and not self._prepared:
            self.prepare(x, y)
        if not self.network.model.training:  # asked of the model, whose owner may have called eval() on it
            self.network.train()
        self.auxiliary.train()
        step, trace = self.steps, Trace()
        with preserved_generators(self.device):
            seed_generators(derive_seed(self._how["seed"], "begin", step), self.device)
            h, message = self._begin(x, y, self._forward_with_draws)
            h, message = self.engine.step(self.groups_at(step), h, message, y, step, trace)
        self.steps += 1
        self.skipped += self._pass_on(h, message, bool(trace.skipped))
        samples = len(x) * (1 if self.replicas is None else self.replicas.count)
        return Metrics(step, samples, trace.metrics, tuple(trace.skipped), trace.finite)

    def average(self) -> None:
        """Average over the replicas what an unfinished update has accumulated; afterwards all hold the same bits."""
        for group in self.groups:
            if self.replicas is not None and group.parameters:
                running = [buffer for unit in group.units for buffer in unit.running()]
                self.replicas.reduce(group.parameters, running, torch.zeros((), device=self.device))()

    def measured_step(self, x: Tensor, y: Tensor) -> tuple[Metrics, MemoryUse]:
        """One `step` under the memory meter: exact bytes, on the CPU at a few times the step's duration.

        The optimizers' state exists from the first step on, so measure a later one.
        """
        tensors = [*self.network.parameters(), *self.network.buffers()]
        tensors += [*self.auxiliary.parameters(), *self.auxiliary.buffers()]
        if self.replicas is not None:
            tensors += self.replicas.full_of([p for group in self.groups for p in group.parameters])
        optimizers = [optimizer for group in self.groups for optimizer in group.optimizers]
        with MemoryMeter(
            parameters=tensors,
            optimizer_state=lambda: optimizer_tensors(optimizers),
            device=self.device,
        ) as meter:
            metrics = self.step(x, y)
        if self.replicas is not None:
            return metrics, self.replicas.counted(meter.peak, self.groups_at(metrics.step))
        return metrics, meter.peak if self.offload is None else self.offload.counted(meter.peak)

    def evaluate(self, x: Tensor, y: Tensor) -> Metrics:
        """The rule's scalars for one batch in evaluation mode; nothing is updated.

        Args:
            x: inputs `(B, ...)`.
            y: labels as for `step`.
        """
        x, y = self._ready(x, y)
        trace = Trace()
        with self.evaluating():
            h, message = self._begin(x, y, self.network)
            for group in self.groups:
                with self._resident(group.units):
                    _, h, message = self.engine.forward(group, h, message, y, None, trace)
            self._pass_on(h, message, skipped=False)
            apart = not self.rule.predicts_plainly() and not self.rule.predicts_at_head
            if apart and (logits := self._predicted(x)) is not None:
                head = {"loss": self.task.loss(logits, y), "accuracy": self.task.accuracy(logits, y)}
                trace.metrics["head"] = trace.metrics.get("head", {}) | head
        return Metrics(self.steps, len(x), trace.metrics, (), {})

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Logits `(B, ..., K)` for inputs `(B, ...)` in evaluation mode, without gradient."""
        if not self.groups:
            self.build(x)
        with self.evaluating(), self.engine.autocast():
            return self.rule.predict(self.network, self._modules_by_site(), self._placed(x))

    @torch.no_grad()
    def beliefs(self, x: Tensor, threshold: float | None = None) -> list[Tensor]:
        """What the sites believe about `x`, in evaluation mode, for rules that pass beliefs on.

        Args:
            x: inputs `(B, ...)`.
            threshold: stop behind the first site at which every sample's largest probability has reached it, at that
                site or before; run all sites if not given.

        Returns:
            Log-probabilities `(B, ..., K)`: the uniform belief, then one per site that was run.

        Raises:
            LayerwiseError: the rule passes on no beliefs.
        """
        if not self.groups:
            self.build(x)
        found: list[Tensor] = []
        with self.evaluating(), self.engine.autocast():
            passed = torch.zeros((), dtype=torch.bool, device=self.device)
            for belief in self.rule.beliefs(self.network, self._modules_by_site(), self._placed(x)):
                found.append(belief)
                if threshold is not None:
                    passed = passed | (belief.amax(-1).exp() >= threshold)
                    if bool(passed.all()):
                        break
        return found

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which all modules are in evaluation mode, without gradient; every mode is put back after it."""
        modules = [self.network, *self.network.model.modules(), *self.auxiliary.modules()]
        modes = [(module, module.training) for module in modules]
        self.network.eval()
        self.auxiliary.eval()
        try:
            unchanging = nullcontext() if self.offload is None else self.offload.unchanging()
            with torch.no_grad(), unchanging, preserved_generators(self.device):
                # A rule that samples when it predicts (or makes negatives) gives the same answer each time.
                seed_generators(derive_seed(self._how["seed"], "evaluation"), self.device)
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            if self.replicas is not None:
                self.replicas.release()

    def _begin(self, x: Tensor, y: Tensor, forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Any]:
        """Input and message of the first group here: the rule's, or what the rank before has sent."""
        if self.stage is not None and not self.stage.first:
            return self.stage.receive()
        return detach(self.rule.begin(self._start(x, y, forward)))

    def _pass_on(self, h: Tensor, message: Any, skipped: bool) -> bool:
        """Hand the batch to the next rank, if there is one; returns whether any update of it was skipped so far."""
        return skipped if self.stage is None else self.stage.pass_on(h, message, skipped)

    def _predicted(self, x: Tensor) -> Tensor | None:
        """What the rule predicts, with the draws of `__call__`; None where a later rank knows."""
        seed_generators(derive_seed(self._how["seed"], "evaluation"), self.device)
        if self.stage is None:
            return self.rule.predict(self.network, self._modules_by_site(), x)
        h, message = self.rule.ask(x, self._modules_by_site().get(0)) if self.stage.first else self.stage.receive()
        for unit in (unit for group in self.groups for unit in group.units):
            h, message = self.rule.answer(unit.site, unit.block(h), message, unit.auxiliary)
        self.stage.pass_on(h, message, skipped=False)
        return h if self.stage.last else None

    def _start(self, x: Tensor, y: Tensor, forward: Callable[[Tensor], Tensor]) -> BatchContext:
        return BatchContext(x, y, self.task, self.network, self._modules_by_site(), forward)

    def _modules_by_site(self) -> dict[int, nn.Module]:
        return {int(index): module for index, module in self.auxiliary.items()}

    def _forward_with_draws(self, x: Tensor) -> Tensor:
        """The network's logits under this step's own random draws, without gradient."""
        with torch.no_grad():
            for group in self.groups:
                for unit in group.units:
                    x = self.engine.run(unit, x, None, self.steps)
        return x

    def _placed(self, x: Tensor) -> Tensor:
        x = x.to(self.device, non_blocking=True)
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def _ready(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) == 0 or len(x) != len(y):
            raise LayerwiseError(
                f"the batch has {len(x)} inputs and {len(y)} labels; give one label per input, and at "
                "least one of each."
            )
        if not self.groups:
            self.build(x)
        self.check_labels(y)
        return self._placed(x), y.to(self.device, non_blocking=True)

    def check_labels(self, y: Tensor) -> None:
        """Raise LayerwiseError unless all labels `y` are classes of the network, or -100 for a rule that allows it.

        The values are looked at only on the host: on an accelerator the look would wait for the device.
        """
        if not self.rule.unlabelled and y.device.type == "cpu" and bool((y == UNLABELLED).any()):
            able = [name for name in rules.names() if rules.get(name).unlabelled and not rules.get(name).models]
            raise LayerwiseError(
                f"rule {self.rule.name!r} needs a label for every sample, and {int((y == UNLABELLED).sum())} of "
                f"{y.numel()} have none (-100); choose a rule that leaves such samples out: {', '.join(able)}."
            )
        self.task.check(y, self.rule.unlabelled)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters under the model's names, then the rule's under `auxiliary.`."""
        yield from self.network.named_parameters()
        for name, parameter in self.auxiliary.named_parameters():
            yield f"auxiliary.{name}", parameter

    def optimizer_states(self) -> dict[str, dict[str, Any]]:
        """Optimizer state per parameter name, whatever the grouping of the blocks."""
        names: dict[Tensor, str] = {self._kept(parameter): name for name, parameter in self.named_parameters()}
        return {
            names[parameter]: {name: self._stored(parameter, value) for name, value in state.items()}
            for group in self.groups
            for optimizer in group.optimizers
            for parameter, state in optimizer.state.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how training goes on.

        Returns:
            `model`: the model's own `state_dict`; `auxiliary`: the rule's modules; `optimizer`: state per
            parameter name; `gradients`: what has accumulated since the last update; `scaler`: one state
            per group; `rule`, `steps`, `skipped`. Tensors are not copied. A stage's own part, where there is one.
            Offloaded tensors are views of what the host or the file holds, right until the next step.
        """
        offloaded = self.offload is not None
        own = [(name, self._kept(parameter)) for name, parameter in self.named_parameters()]
        state = {
            "model": without_meta(self.network.state_dict(keep_vars=offloaded)),
            "auxiliary": self.auxiliary.state_dict(keep_vars=offloaded),
            "optimizer": self.optimizer_states(),
            "gradients": {n: self._stored(p, p.grad) for n, p in own if p.grad is not None},
            "scaler": self._grouping.scalers(),
            "rule": self.rule.name,
            "steps": self.steps,
            "skipped": self.skipped,
        }
        return state if self.offload is None else self.offload.to_full(state)

    def onload(self) -> None:
        """Bring all offloaded blocks to the device, for good: the model is an ordinary module again."""
        if self.offload is not None:
            self.offload.end()
            self.offload, self._offload_to = None, ("none", self._offload_to[1])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; before the first step it is kept until the shapes are known.

        Raises:
            LayerwiseError: the state is of another rule or another model; nothing is changed then.
        """
        check_parts(state)
        if not self.groups:
            self._pending = state
            return
        auxiliary = state["auxiliary"] if self.stage is None else self.stage.own(state["auxiliary"], self.auxiliary)
        check_state({**state, "auxiliary": auxiliary}, self._expected())
        if self.offload is None:
            self._load(self.groups, state, auxiliary)
        for group in self.groups if self.offload is not None else ():
            with self._resident(group.units):
                self._load([group], state, auxiliary)
            release_pages()
        self._grouping.load_scalers(state["scaler"])
        self.steps, self.skipped = state["steps"], state["skipped"]

    def _expected(self) -> Expected:
        """What a state has to fit."""
        parameters = dict(self.named_parameters())
        updated = {p: optimizer for g in self.groups for optimizer in g.optimizers for p in g.parameters}
        return Expected(
            self.rule.name,
            self.network.state_dict(),
            self.auxiliary.state_dict(),
            parameters,
            {name: updated[kept] for name, p in parameters.items() if (kept := self._kept(p)) in updated},
            tuple(group.name for group in self.groups if group.scaler.is_enabled()),
            whole=self.stage is None,
        )

    def _load(self, groups: Sequence[Group], state: Mapping[str, Any], auxiliary: Mapping[str, Tensor]) -> None:
        """Take over what belongs to these groups, whose tensors are on the device."""
        away = set() if self.offload is None else self.offload.away()
        for module, given in ((self.network, state["model"]), (self.auxiliary, auxiliary)):
            own = without_meta(module.state_dict(keep_vars=True))
            here = {name: self._laid_out(t, given[name]) for name, t in own.items() if id(t) not in away}
            module.load_state_dict(here, strict=False)
        here = {p: name for name, p in self.named_parameters() if not p.is_meta and id(p) not in away}
        names = {self._kept(p): name for p, name in here.items()}
        for group in groups:
            for optimizer in group.optimizers:
                packed = optimizer.state_dict()
                found = [(p, state["optimizer"].get(names[p])) for p in group.parameters]
                packed["state"] = {
                    i: {name: self._laid_out(p, value) for name, value in s.items()}
                    for i, (p, s) in enumerate(found)
                    if s is not None
                }
                optimizer.load_state_dict(copy.deepcopy(packed))  # torch would keep the given tensors
        for parameter, name in names.items():
            gradient = state["gradients"].get(name)
            if gradient is not None:
                own = self._laid_out(parameter, gradient)
                gradient = own.to(parameter.device, parameter.dtype, copy=True)
            parameter.grad = gradient

    def _stored(self, own: Tensor, value: Any) -> Any:
        """What belongs to `own`, as a part of what all ranks hold."""
        if self.replicas is None or not isinstance(value, Tensor):
            return value
        return self.replicas.to_full(own, value)

    def _laid_out(self, own: Tensor, given: Any) -> Any:
        """What a tensor like `own` holds of the whole tensor `given`; other values as they are."""
        if self.replicas is None or not isinstance(given, Tensor):
            return given
        return self.replicas.to_shard(own, given)


def _with_own_code(run: Callable[[Tensor], Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """`run` as a function with a code object of its own.

    Dynamo keeps what it compiled per code object, eight versions at most; blocks that shared one would fall
    back to plain Python from the ninth on, and take each other's shapes for dynamic ones.
    """

    def block(h: Tensor) -> Tensor:
        return run(h)

    block.__code__ = block.__code__.replace(co_name=f"block {name}")
    return block


def _check_options(clip: float | None, accumulate: int, precision: str, nonfinite: str) -> None:
    if clip is not None and not clip > 0:
        raise LayerwiseError(f"clip is {clip}; it is a norm larger than 0, or None for no clipping.")
    if accumulate < 1:
        raise LayerwiseError(f"accumulate is {accumulate}; it is a number of batches, 1 or more.")
    if precision not in ("fp32", "bf16", "fp16"):
        raise LayerwiseError(f"unknown precision {precision!r}; choose fp32, bf16 or fp16.")
    if nonfinite not in ("raise", "skip"):
        raise LayerwiseError(f"nonfinite is {nonfinite!r}; choose 'raise' or 'skip'.")
