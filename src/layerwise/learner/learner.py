"""Learner: a model, a rule and an optimizer, in three lines of anybody's own training loop."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise import rules
from layerwise.core import pieces
from layerwise.core.blocks import Block, Partition
from layerwise.core.calls import CallPartition
from layerwise.core.contract import asking, check_begin, check_prediction, check_rule
from layerwise.core.devices import check_precision, usable_device
from layerwise.core.engine import Engine
from layerwise.core.execution import Execution
from layerwise.core.failures import in_a_sentence
from layerwise.core.groups import Group
from layerwise.core.optim import OptimizerChoice, Schedule, optimizer_factory
from layerwise.core.ownership import Tied
from layerwise.core.progress import Trace
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.ranges import check_ranges
from layerwise.core.reading import Output, Read
from layerwise.core.rule import BatchContext, Rule, metrics_of
from layerwise.core.tasks import Task
from layerwise.core.trees import detach, mapped, tensors
from layerwise.errors import LayerwiseError, suggestion
from layerwise.learner import state as states
from layerwise.learner.arguments import (
    check_can,
    check_labels_of,
    check_options,
    check_types,
    usable_task,
)
from layerwise.learner.build import ONE_PROCESS, Built, NotBuilt, Setup
from layerwise.learner.checks import check_parts
from layerwise.learner.metrics import Metrics
from layerwise.learner.network import check_reads, check_serves, cut, labelled
from layerwise.learner.optimizer import EveryOptimizer
from layerwise.learner.weights import Weights, late_weights, save_blocks
from layerwise.memory.meter import MemoryMeter, MemoryUse, optimizer_tensors
from layerwise.memory.offload import NotOffloaded, Offload, Where, check_offload
from layerwise.parallel.alone import OneProcess, WholeNetwork
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage

Precision = Literal["fp32", "bf16", "fp16"]


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
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, `"rmsprop"`, any class of `torch.optim` or its name, the dotted path
            of another package's class, a callable from parameter groups to an optimizer or several, or a mapping from
            patterns of parameter names to options (`{"*.lora_*": {"lr": 1e-3}}`, with `optimizer` among them where it
            is not AdamW). Every group of blocks gets its own; `learner.optimizer` shows them as one.
        lr: learning rate.
        weight_decay: of weights; norms and biases have none.
        optimizer_options: further arguments of the optimizer's class.
        lr_multipliers: factor of the learning rate per block name.
        schedule: multiplier of the learning rate as a function of the update number.
        clip: largest norm of one group's gradient.
        accumulate: batches per update. Gradients then live from one batch to the next, so that their memory
            grows with depth; activations still do not. A batch weighs as much as it has labels that count, and
            `flush` does the last update with the batches that it has.
        micro: parts in which every group runs its batch, one after the other, before it steps once: of the activations
            one part of one block is alive at a time. Draws then depend on the part, too, and layers with batch
            statistics take those of a part. Rules whose signal compares samples are refused.
        precision: `"fp32"`, `"bf16"` or `"fp16"` (autocast; fp16 with a gradient scaler per group).
        compile: run every block through `torch.compile`; a string names the backend.
        channels_last: keep images and convolutions in channels-last order.
        nonfinite: `"raise"` stops at a non-finite loss or gradient; `"skip"` leaves that block's update out
            and counts the step in `skipped`.
        label_smoothing: share of the target spread over all classes, in every loss that uses the label.
        seed: of all random draws. A draw depends on (seed, step, block) only; torch's global generators are
            left as they were.
        cuts: where to cut the model, see `partition`. A pattern (`"model.layers.*"`) or `"auto"` cuts it at the calls
            of its own modules, see `cut_at_calls`; so do `output`, `read`, `tied` and an example that is no tensor.
        blocks: number of blocks, see `partition`.
        output: where the logits are in the model's output, see `cut_at_calls`.
        read: where the teaching tensor is in a cut module's output, see `cut_at_calls`.
        tied: who trains a parameter that several blocks use: `"last"` of them, `"first"` or `"frozen"`.
        task: what the labels mean, if not classes: `Regression()`, `MultiLabel()`, `Segmentation()`, `LanguageModel()`,
            `Loss(fn)`, `Classification(weights=...)`, or the name of its kind, such as `"regression"`.
        example: one batch of inputs; builds everything now instead of at the first step.
        layout: where outputs have batch, channels and positions, if the layers do not show it, see `partition`.
        stage: the part of the network that this process runs, as one of several ranks; all of it if not given.
        replicas: the processes that train the same blocks, each on its share of every batch; none if not given. Draws
            then depend on the replica too, but those of the initial weights, which are the first one's. With `Shards`
            each keeps a share of parameters and optimizer state, and all have to predict and evaluate equally often.
            Where `torch.distributed` runs in several processes, `OneProcess()` says that this one trains alone.
        device: where blocks run; where the model's parameters are if not given.
        offload: `"host"` or `"disk"` keeps parameters and optimizer state there, and on the device only those of the
            groups that are about to run; `onload` brings them back. Until then the model's own tensors show nothing.
        offload_folder: for the file of `"disk"`; the system's folder for temporary files if not given.
        weights: of a model that was made on the meta device (`with torch.device("meta")`), whose blocks are made one by
            one when each is first needed: a safetensors file or folder, or a function of a module's name and the module
            that fills what the module itself holds. Each module draws its own, by `reset_parameters` or the model's
            `_init_weights`, if not given; the draws depend on the seed and the module's name.

    What the owner does to the model is followed: its mode (`train()`, `eval()`, of single modules too), parameters
    that are frozen or thawed, rates that are set in `learner.optimizer.param_groups`. A module or parameter that is
    replaced, cast or moved after the first step is refused. A learner can be pickled and copied, but not one that is
    offloaded or one of several ranks. Learners in several threads take turns.

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
        optimizer: OptimizerChoice = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        optimizer_options: Mapping[str, Any] | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        schedule: Callable[[int], float] | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        micro: int = 1,
        precision: Precision = "fp32",
        compile: bool | str = False,
        channels_last: bool = False,
        nonfinite: Literal["raise", "skip"] = "raise",
        label_smoothing: float = 0.0,
        seed: int = 0,
        cuts: Sequence[str] | str | None = None,
        blocks: int | None = None,
        output: Output = None,
        read: Read = None,
        tied: Tied | None = None,
        task: Task | str | None = None,
        example: Any = None,
        layout: Mapping[str, str] | str | None = None,
        stage: Stage | None = None,
        replicas: Replicas | OneProcess | None = None,
        device: torch.device | str | None = None,
        offload: Where = "none",
        offload_folder: str | Path | None = None,
        weights: Weights = None,
    ):
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "model", "rule")}
        self._arguments |= {"example": None, "weights": None}  # a batch is not kept, and weights are made once
        check_types(lr_multipliers, channels_last, stage, replicas, cuts, layout)
        check_ranges(
            clip=clip, accumulate=accumulate, micro=micro, label_smoothing=label_smoothing, seed=seed, blocks=blocks
        )
        check_ranges(lr=lr, weight_decay=weight_decay, lr_multipliers=lr_multipliers or {})
        check_options(precision, nonfinite)
        check_offload(offload, isinstance(replicas, Replicas), compile)
        replicas = replicas or ONE_PROCESS
        replicas.check(precision=precision, compile=compile, channels_last=channels_last)
        self.rule = rules.create(rule) if isinstance(rule, str) else rule
        check_rule(self.rule)
        late = late_weights(model, weights, seed, device)
        self.network: Partition = cut(model, cuts, blocks, output, read, tied, example, layout)
        self._arguments |= {"cuts": None, "blocks": None, "output": None, "read": None, "tied": None}  # done
        if isinstance(self.network, CallPartition):
            check_serves(self.network, self.rule, micro)
        names = [block.name for block in [*self.network.blocks, self.network.head]]
        for name in lr_multipliers or {}:
            if name not in names:
                raise LayerwiseError(f"lr_multipliers names no block {name!r}; {suggestion(name, names)}.")
        self.device = next(model.parameters()).device if device is None else usable_device(device)
        check_precision(precision, self.device)
        if device is not None and offload == "none":
            self.network.to(self.device)
        self.channels_last = channels_last
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if schedule is not None and not callable(schedule):
            raise LayerwiseError(
                f"the schedule is of type {type(schedule).__name__}; give a function from the update number to a "
                "factor, or hold a scheduler of torch by learner.optimizer."
            )
        task = usable_task(task, label_smoothing)
        check_can(self.rule, task)
        self.schedule = schedule or Schedule()
        self._offload_to: tuple[Where, Path] = offload, Path(offload_folder or tempfile.gettempdir())
        self.offload: Offload | NotOffloaded = NotOffloaded()
        self._setup = Setup(
            self.network,
            self.rule,
            optimizer_factory(optimizer, lr=lr, weight_decay=weight_decay, options=optimizer_options),
            dict(lr_multipliers or {}),
            Execution(
                device=self.device,
                schedule=self.schedule,
                autocast={"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
                clip=clip,
                accumulate=accumulate,
                micro=micro,
                nonfinite=nonfinite,
                # The first replica draws what one process would; the others must not drop the same units as it does.
                seed=derive_seed(seed, "replica", replicas.rank) if replicas.rank else seed,
                replicas=replicas,
            ),
            stage or WholeNetwork(),
            replicas,
            self._moved_by,
            self._offload_to[1],
            late,
            seed,
            task,
            compile,
            self._facts(),
        )
        self.stage, self.replicas = self._setup.stage, replicas
        self.steps = 0
        self.skipped = 0
        self.optimizer = EveryOptimizer(self._optimizers)
        self._prepared = not isinstance(self.rule, pieces.StartsFromData)
        self._built: Built | NotBuilt = NotBuilt()
        self._example: Any = None
        self._pending: Mapping[str, Any] | None = None
        if example is not None:
            self.build(example)

    # Building.

    def _facts(self) -> dict[str, Any]:
        """What must be the same on all replicas."""
        own = ("stage", "replicas", "device", "offload", "offload_folder", "compile", "example")
        options = {name: value for name, value in self._arguments.items() if name not in own}
        parts = {f"the rule's {name}": value for name, value in vars(self.rule).items()}
        return {"the rule": self.rule.name, **options, "cuts": self.network.cuts, **parts}

    def build(self, x: Any) -> None:
        """Make the rule's auxiliary modules and the optimizers; done by the first `step` if not before.

        Args:
            x: one batch of inputs; two samples of it are run to learn the shapes, or all of a batch that is no tensor.

        Raises:
            LayerwiseError: the network does not take such an input, or is not what was partitioned.
        """
        self._check_input(x)
        check_reads(self.rule, x)
        x = self._placed(labelled(x, None)[0])
        with torch.inference_mode(False):  # what is made here has to learn, wherever it is made
            self._built = Built(self._setup, mapped(x, _ordinary), self.evaluating)
            self._example = x[:1].clone() if isinstance(x, Tensor) else mapped(x, torch.clone)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict(pending)

    def _build_at_first(self, x: Any) -> None:
        if isinstance(self._built, NotBuilt):
            self.build(x)

    def _moved_by(self, blocks: Sequence[Sequence[Block]], first: int) -> Offload | NotOffloaded:
        """What moves the blocks of these groups; the same again where an earlier attempt has failed at the input."""
        kind, folder = self._offload_to
        if kind != "none" and not self.offload.active:
            total, make = len(self._setup.blocks), self._setup.late.make_rest
            self.offload = Offload(kind, folder, self.device, self.rule, blocks, first, total, make)
        return self.offload

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        return self._built.optimizers()

    @property
    def built(self) -> Built:
        """Groups and engine.

        Raises:
            LayerwiseError: nothing is built yet.
        """
        if isinstance(self._built, NotBuilt):
            raise LayerwiseError("the learner is not built yet; take a step, give it an example, or call build(x).")
        return self._built

    @property
    def engine(self) -> Engine:
        """What updates the groups."""
        return self.built.engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self.built.engine = engine

    @property
    def task(self) -> Task:
        """What the labels mean."""
        return self.built.task

    @property
    def auxiliary(self) -> nn.ModuleDict:
        """The rule's modules by index of their site; none before `build`."""
        return self._built.auxiliary

    @property
    def groups(self) -> list[Group]:
        """The groups in which the blocks here are updated; none before `build`."""
        return self._built.groups

    def groups_at(self, update: int) -> list[Group]:
        """The groups of an update: `groups`, unless the rule joins some there or lets some rest.

        Raises:
            LayerwiseError: the rule asks for groups that are not neighbours of its own, joined.
        """
        return self._built.groups_at(update)

    @property
    def updates(self) -> int:
        """Number of updates so far; with `accumulate` batches for each."""
        return self._built.updates

    @property
    def accumulated(self) -> int:
        """Batches that have been added to the update under way."""
        return self._built.accumulated

    # Training.

    @property
    def prepares(self) -> bool:
        """Whether the rule starts from training data."""
        return isinstance(self.rule, pieces.StartsFromData)

    @torch.no_grad()
    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Show training data to a rule that starts from them; the first `step` shows its own batch if nobody has.

        Args:
            x: inputs `(N, ...)`, as many as fit.
            y: their labels.

        Raises:
            LayerwiseError: labels that do not fit, or data from which the rule cannot start.
        """
        with preserved_generators(self.device):
            x, y = self._ready(x, y)
            seed_generators(derive_seed(self._setup.seed, "prepare"), self.device)
            if isinstance(self.rule, pieces.StartsFromData):
                with asking(self.rule, "`prepare`"):
                    self.rule.prepare(self.network, x, y)
            # Each replica has seen its own share.
            self.replicas.copy_from_first(p for p in self.network.parameters() if not p.is_meta)
            self._prepared = True

    def step(self, x: Any, y: Tensor | None = None) -> Metrics:
        """Train on one batch: every block is updated once, while the batch passes through.

        The model is run in the mode in which its owner has put it.

        Args:
            x: inputs `(B, ...)`; for a model that is cut at its calls also a tuple of arguments, or a mapping of
                keywords.
            y: labels as the task has them: classes `(B,)`, `(B, T)` for a language model, numbers `(B, D)`, `(B, H, W)`
                for segmentation; the entry `labels` of a mapping if not given.

        Returns:
            The step's metrics, still on the device.

        Raises:
            LayerwiseError: labels that do not fit, a model that was changed since the first step, a signal that
                reaches nothing, or a non-finite loss or gradient.
        """
        if torch.is_inference_mode_enabled():
            raise LayerwiseError("a training step cannot run inside torch.inference_mode(); call it outside.")
        with preserved_generators(self.device):
            x, y = self._ready(x, y)
            if not self._prepared:
                self.prepare(x, y)
            built = self.built
            built.watch.check()
            built.auxiliary.train(self.network.model.training)
            step, trace, updates = self.steps, Trace(), self.updates
            seed_generators(derive_seed(self._setup.execution.seed, "begin", step), self.device)
            with self.network.passing(x):
                h, message = self._begin(x, y, step)
                h, message = built.engine.step(self.groups_at(updates), h, message, y, step, trace)
            self.steps += 1
            self._count(updates)
            self.skipped += self.stage.pass_on(h, message, bool(trace.skipped))
        return Metrics(step, len(y), trace.metrics, tuple(trace.skipped), trace.finite, trace.statistics)

    def flush(self) -> bool:
        """Do the update under way with the batches that it has; with `accumulate`, at the end of the training.

        Returns:
            Whether there were any.
        """
        if isinstance(self._built, NotBuilt):
            return False
        with preserved_generators(self.device):
            self._built.watch.check()
            trace, updates = Trace(), self.updates
            done = self._built.engine.flush(self.groups_at(updates), self.steps - 1, trace)
            self._count(updates)
            self.skipped += bool(trace.skipped)
        return done

    def _count(self, before: int) -> None:
        """Count an update in `optimizer`, as schedulers that hold it require."""
        if self.updates > before:
            self.optimizer.count_update()

    def average(self) -> None:
        """Average over the replicas what an unfinished update has accumulated; afterwards all hold the same bits."""
        for group in self.groups:
            self.replicas.reduce(group.parameters, group.running(), torch.zeros((), device=self.device))()

    def measured_step(self, x: Any, y: Tensor | None = None) -> tuple[Metrics, MemoryUse]:
        """One `step` under the memory meter: exact bytes, on the CPU at a few times the step's duration.

        The optimizers' state exists from the first update on, so measure a later step.
        """
        auxiliary = self.auxiliary
        tensors = [*self.network.parameters(), *self.network.buffers(), *auxiliary.parameters(), *auxiliary.buffers()]
        parameters = [p for group in self.groups for p in group.parameters]
        tensors += [p for p in self.replicas.full_of(parameters) if not any(p is t for t in parameters)]
        optimizers = list(self._optimizers())
        updates = self.updates
        with MemoryMeter(
            parameters=tensors,
            optimizer_state=lambda: optimizer_tensors(optimizers),
            device=self.device,
        ) as meter:
            metrics = self.step(x, y)
        use = self.offload.counted(meter.peak)
        return metrics, self.replicas.counted(use, self.groups_at(updates))

    def _begin(self, x: Any, y: Tensor, step: int | None) -> tuple[Any, Any]:
        """Input and message of the first group here: the rule's, or what the rank before has sent."""
        if not self.stage.first:
            return self.stage.receive()
        units = {unit.site.index: unit for group in self.groups for unit in group.units}

        def run(index: int, h: Tensor, message: Any = None) -> Tensor:
            return self.engine.run_aside(units[index], h, message, step)

        def forward(h: Tensor) -> Tensor:
            for index in range(len(self.network.blocks) + 1):
                h = run(index, h)
            return h

        ctx = BatchContext(x, y, self.task, self.network, self._modules_by_site(), run, forward, self.__call__)
        with asking(self.rule, "`begin`"):
            begun = self.rule.begin(ctx)
        check_begin(self.rule, begun)
        return detach(begun)

    # Evaluation and prediction.

    def evaluate(self, x: Any, y: Tensor | None = None) -> Metrics:
        """The rule's scalars for one batch in evaluation mode; nothing is updated.

        Args:
            x: inputs as for `step`.
            y: labels as for `step`.
        """
        trace = Trace()
        with self.evaluating():
            x, y = self._ready(x, y)
            built = self.built
            built.watch.check()
            with self.network.passing(x):
                h, message = self._begin(x, y, None)
                for group in built.groups:
                    with built.resident(group.units):
                        _, h, message = built.engine.forward(group, h, message, y, None, trace)
            self.stage.pass_on(h, message, skipped=False)
            apart = not self.rule.predicts_plainly() and not self.rule.predicts_at_head
            if apart and (logits := self._predicted_again(x)) is not None:
                metrics, trace.statistics["head"] = metrics_of(self.task, logits, y)
                head = {"loss": self.task.loss(logits, y), **metrics}
                trace.metrics["head"] = trace.metrics.get("head", {}) | head
        return Metrics(self.steps, len(y), trace.metrics, (), {}, trace.statistics)

    @torch.no_grad()
    def __call__(self, x: Any) -> Tensor:
        """Logits `(B, ..., K)` for inputs, as `step` takes them, in evaluation mode, without gradient."""
        with self.evaluating():
            self._check_input(x)
            self._build_at_first(x)
            self.built.watch.check()
            x, _ = labelled(x, None)
            with self.engine.autocast():
                return self._predicted(self._placed(x))

    @torch.no_grad()
    def beliefs(self, x: Any, threshold: float | None = None) -> list[Tensor]:
        """What the sites believe about `x`, in evaluation mode, for rules that pass beliefs on.

        Args:
            x: inputs as for `step`.
            threshold: stop after the first site at which every sample's largest probability has reached it, at that
                site or before; run all sites if not given.

        Returns:
            Log-probabilities `(B, ..., K)`: the uniform belief, then one per site that was run.

        Raises:
            LayerwiseError: the rule passes on no beliefs.
        """
        if not isinstance(self.rule, pieces.PassesBeliefs):
            able = [name for name in rules.names() if issubclass(rules.get(name), pieces.PassesBeliefs)]
            raise LayerwiseError(f"rule {self.rule.name!r} passes on no beliefs; those that do: {', '.join(able)}.")
        found: list[Tensor] = []
        with self.evaluating():
            self._check_input(x)
            self._build_at_first(x)
            passed = torch.zeros((), dtype=torch.bool, device=self.device)
            x, _ = labelled(x, None)
            who = in_a_sentence("the network", "cannot predict for an input", x)
            with asking(self.rule, "`beliefs`"), who, self.engine.autocast(), self.network.passing():
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
        with preserved_generators(self.device):  # first, so that other threads see no mode but their own
            modules = [self.network, *self.network.model.modules(), *self.auxiliary.modules()]
            modes = [(module, module.training) for module in modules]
            training = self.optimizer.training
            self.network.eval()
            self.auxiliary.eval()
            self.optimizer.eval()
            try:
                with torch.no_grad(), self.offload.unchanging():
                    # A rule that samples when it predicts (or makes negatives) gives the same answer each time.
                    seed_generators(derive_seed(self._setup.execution.seed, "evaluation"), self.device)
                    yield
            finally:
                if training:
                    self.optimizer.train()
                for module, mode in modes:
                    module.training = mode
                self.replicas.release()

    def _predicted(self, x: Any) -> Tensor:
        """What the rule predicts for inputs that are placed, where the whole network is here."""
        who = in_a_sentence("the network", "cannot predict for an input", x)
        if self.rule.predicts_plainly():
            with who:
                return self.network(x)
        with asking(self.rule, "`predict`"), who, self.network.passing():
            found = self.rule.predict(self.network, self._modules_by_site(), x)
        check_prediction(self.rule, found, self.task, len(x) if isinstance(x, Tensor) else None)
        return found

    def _predicted_again(self, x: Any) -> Tensor | None:
        """What the rule predicts, with the draws of `__call__`; None where a later rank knows."""
        seed_generators(derive_seed(self._setup.execution.seed, "evaluation"), self.device)
        if self.stage.first and self.stage.last:
            return self._predicted(x)
        first = self._modules_by_site().get(0)
        h, message = pieces.ask(self.rule, x, first) if self.stage.first else self.stage.receive()
        with self.network.passing(x):
            for unit in (unit for group in self.groups for unit in group.units):
                h, message = pieces.answer(self.rule, unit.site, unit.block(h), message, unit.auxiliary)
        self.stage.pass_on(h, message, skipped=False)
        return h if self.stage.last else None

    def _modules_by_site(self) -> dict[int, nn.Module]:
        return {int(index): module for index, module in self.auxiliary.items()}

    # Batches.

    def _placed(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return mapped(x, self._placed)
        x = x.to(self.device, non_blocking=True)
        if x.is_inference() and not torch.is_inference_mode_enabled():
            x = x.clone()  # what inference mode made cannot enter a graph
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def _ready(self, x: Any, y: Tensor | None) -> tuple[Any, Tensor]:
        self._check_input(x)
        x, y = labelled(x, y)
        if not isinstance(y, Tensor):
            raise LayerwiseError(f"the labels are of type {type(y).__name__}; give a tensor{self._setup.task.wanted}.")
        samples = len(x) if isinstance(x, Tensor) else max(1, y.dim() and len(y))
        if y.dim() == 0 or samples == 0 or samples != len(y):
            labels = "one number" if y.dim() == 0 else f"{len(y)}"
            raise LayerwiseError(
                f"the batch has {samples} inputs and {labels} labels; give one label per input, and at least one of "
                "each."
            )
        self._build_at_first(x)
        self.check_labels(y)
        y = y.to(self.device, non_blocking=True)
        return self._placed(x), y.clone() if y.is_inference() and not torch.is_inference_mode_enabled() else y

    def _check_input(self, x: Any) -> None:
        if isinstance(self.network, CallPartition) and isinstance(x, (tuple, Mapping)):
            if not tensors(x):
                raise LayerwiseError("the batch holds no tensor; give what the model's forward takes.")
            return
        if isinstance(x, (tuple, Mapping)):
            raise LayerwiseError(
                f"the inputs are of type {type(x).__name__}, and this model was cut into functions of one tensor; cut "
                'it at its calls: cuts="auto", a pattern such as "layers.*", or cut_at_calls(model, [...]).'
            )
        if not isinstance(x, Tensor):
            hint = {"ndarray": "torch.from_numpy(x)", "list": "torch.tensor(x)"}.get(type(x).__name__, "one tensor")
            raise LayerwiseError(f"the inputs are of type {type(x).__name__}; give {hint}, of shape (B, ...).")
        if x.dim() == 0:
            raise LayerwiseError("the input is a single number; give a batch of shape (B, ...).")

    def check_labels(self, y: Tensor) -> None:
        """Raise LayerwiseError unless all labels `y` are of the task, or -100 for a rule that allows it.

        The values are looked at only on the host: on an accelerator the look would wait for the device.
        """
        check_labels_of(self.rule, self.task, y)

    # State.

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters under the model's names, then the rule's under `auxiliary.`."""
        yield from self.network.named_parameters()
        for name, parameter in self.auxiliary.named_parameters():
            yield f"auxiliary.{name}", parameter

    def optimizer_states(self) -> dict[str, dict[str, Any]]:
        """Optimizer state per parameter name, whatever the grouping of the blocks."""
        return states.optimizer_states(self.built)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how training continues.

        Returns:
            `model`: the model's own `state_dict`; `auxiliary`: the rule's modules; `optimizer`: state per
            parameter name; `gradients`: what has accumulated since the last update; `accumulation`: how much; `scaler`:
            one state per group; `rates`: base rates that were set from outside; `rule`, `steps`, `skipped`. Tensors are
            not copied. A stage's own part, where there is one. Offloaded tensors are views of what the host or the file
            holds, right until the next step.

        Raises:
            LayerwiseError: nothing is built yet.
        """
        self.built.watch.check()
        return states.state_of(self.built, self.skipped, self.steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; before the first step it is kept until the shapes are known.

        Raises:
            LayerwiseError: the state is damaged, or of another rule or model; nothing is changed then.
        """
        check_parts(state)
        if isinstance(self._built, NotBuilt):
            self._pending = state
            return
        states.load_state(self._built, state)
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._prepared = self._prepared or self.steps > 0

    def save_weights(self, folder: str | Path) -> None:
        """Write the network's weights, a safetensors file per block and an index, as `transformers` reads them.

        Never more than one tensor is held beside what the learner holds. Each of several ranks writes its own blocks.

        Args:
            folder: made if it is not there; files of the same names are replaced.

        Raises:
            LayerwiseError: nothing is built yet, or the folder cannot be written to.
        """
        save_blocks(self.built, Path(folder))

    def onload(self) -> None:
        """Bring all offloaded blocks to the device, for good: the model is an ordinary module again."""
        self.offload.end()
        self.offload, self._offload_to = NotOffloaded(), ("none", self._offload_to[1])
        self._built.offload = self.offload

    def __reduce__(self) -> tuple[Any, ...]:
        if self.offload.active or not isinstance(self.stage, WholeNetwork) or type(self.replicas) is not OneProcess:
            raise LayerwiseError(
                "a learner whose blocks are offloaded or on several ranks can be neither pickled nor copied; use "
                "state_dict(), or call onload() first."
            )
        state = self._pending if isinstance(self._built, NotBuilt) else self.state_dict()
        set_by_hand = [
            {name: value for name, value in group.items() if name != "params"}
            for optimizer in self._optimizers()
            for group in optimizer.param_groups
        ]
        made_of = (self.network, self.rule, self._arguments, self._example)
        return _restored, (*made_of, state, set_by_hand, self._prepared)


def _restored(
    network: Partition,
    rule: Rule,
    arguments: dict[str, Any],
    example: Any,
    state: Mapping[str, Any] | None,
    set_by_hand: Sequence[Mapping[str, Any]],
    prepared: bool,
) -> Learner:
    """A learner out of its pickle."""
    learner = Learner(network, rule, **arguments)
    if example is not None:
        learner.build(example)
    if state is not None:
        learner.load_state_dict(state)
    own = [group for optimizer in learner._optimizers() for group in optimizer.param_groups]
    for group, found in zip(own, set_by_hand, strict=True):
        group.update(found)
    learner._prepared = prepared
    return learner


def _ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one of inference mode, which autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor
