"""Learner: a model, a rule and an optimizer, in three lines of your own training loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise import rules
from layerwise.core import pieces
from layerwise.core.blocks import Block
from layerwise.core.contract import asking, check_rule
from layerwise.core.engine import Engine
from layerwise.core.groups import Group
from layerwise.core.optim import OptimizerChoice
from layerwise.core.ownership import Tied
from layerwise.core.progress import Trace
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators, takes_turns
from layerwise.core.ranges import Where
from layerwise.core.reading import Output, Read
from layerwise.core.rule import Rule
from layerwise.core.tasks import Task, of_one_batch
from layerwise.core.trees import mapped
from layerwise.errors import LayerwiseError
from layerwise.learner import prediction
from layerwise.learner import state as states
from layerwise.learner.arguments import check_arguments, check_labels_of
from layerwise.learner.batches import check_input, check_label_tensor, labelled, ordinary, placed, with_labels
from layerwise.learner.build import Built, NotBuilt, named_parameters
from layerwise.learner.checks import check_parts
from layerwise.learner.metering import meter_of
from layerwise.learner.metrics import Metrics
from layerwise.learner.network import check_reads
from layerwise.learner.optimizer import EveryOptimizer
from layerwise.learner.own_loss import compare_own_loss
from layerwise.learner.pickled import check_can_be_pickled, group_options, restored
from layerwise.learner.rounds import train_on
from layerwise.learner.setup import DONE_ONCE, make_setup
from layerwise.learner.weights import Weights, save_blocks
from layerwise.memory.meter import MemoryUse
from layerwise.memory.offload import NotOffloaded, Offload
from layerwise.parallel.alone import OneProcess, WholeNetwork
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.stage import Stage


@takes_turns("build average measured_step state_dict load_state_dict optimizer_states save_weights onload")
class Learner:
    r"""Train a model with a learning rule, without global backpropagation.

    It replaces `loss.backward(); optimizer.step()`:

        learner = Learner(model, "sll", optimizer="adamw", lr=1e-3)
        for x, y in loader:
            learner.step(x, y)
        logits = learner(x)

    Args:
        model: a module, or a `Partition` of one. It is trained in place and stays an ordinary module.
        rule: name of a rule, or a rule.
        optimizer: `"adamw"`, `"adam"`, `"sgd"` (Nesterov momentum 0.9), `"rmsprop"`, any class of `torch.optim` or its
            name, the dotted path of another package's class, a callable from parameter groups to an optimizer or
            several, or a mapping from patterns of parameter names to options (`{"*.lora_*": {"lr": 1e-3}}`, including
            `optimizer` if it is not AdamW). Every group gets its own; `learner.optimizer` presents them as one.
        lr: learning rate.
        weight_decay: of weights; norms and biases have none.
        optimizer_options: further arguments of the optimizer's class.
        lr_multipliers: factor of the learning rate per block name; `readouts` is for the modules that a rule adds.
        schedule: multiplier of the learning rate as a function of the update number.
        clip: largest norm of one group's gradient.
        accumulate: batches per update. Gradients are then kept from one batch to the next, so their memory
            grows with depth; activations still do not. Batches are weighted by their number of valid labels, and
            `flush` makes the last update with the batches so far.
        micro: parts in which every group runs its batch, one after the other, before it steps once. Then only the
            activations of one part of one block are in memory. Draws also depend on the part, and batch statistics are
            those of a part. Rules whose signal compares samples are refused.
        precision: `"fp32"`, `"bf16"` or `"fp16"` (autocast; fp16 with a gradient scaler per group).
        compile: run every block through `torch.compile`; a string names the backend.
        channels_last: keep images and convolutions in channels-last order.
        nonfinite: `"raise"` stops at a non-finite loss or gradient; `"skip"` skips that block's update
            and counts the step in `skipped`.
        label_smoothing: share of the target spread over all classes, in every loss that uses the label.
        seed: of all random draws. A draw depends on (seed, step, block) only; the global generators of torch, Python
            and NumPy are left as they were.
        cuts: where to cut the model, see `partition`. A pattern (`"model.layers.*"`) or `"auto"`, the default but
            for chains, cuts it at its calls, see `cut_at_calls`; so do `output`, `read`, `tied` and a batch of several.
        blocks: number of blocks, see `partition`.
        output: where the logits are in the model's output, see `cut_at_calls`.
        read: which tensor of a cut module's output the rule uses, see `cut_at_calls`.
        tied: which block trains a parameter that several blocks use: the `"last"` or `"first"`, or none (`"frozen"`).
        task: what the labels mean, if not classes: `Regression()`, `MultiLabel()`, `Segmentation()`, `LanguageModel()`,
            `Loss(fn)`, `Classification(weights=...)`, or the name of its kind, such as `"regression"`.
        example: one batch of inputs; builds everything now instead of at the first step.
        layout: where outputs have batch, channels and positions, if the layers do not show it, see `partition`.
        stage: the part of the network that this process runs, as one of several ranks (default: all of it).
        replicas: the processes that train the same blocks, each on its share of every batch (default: none). Draws
            then depend on the replica too, except the initial weights, which come from the first one. With `Shards`
            each keeps a shard of parameters and optimizer state, and all have to predict and evaluate equally often.
            If `torch.distributed` runs in several processes, `OneProcess()` says that this one trains alone.
        device: where blocks run (default: the device of the model's parameters).
        offload: `"host"` or `"disk"` keeps parameters and optimizer state there, and on the device only those of the
            groups that run now or next; `onload` brings all back. Until then the model's own tensors are placeholders.
        offload_folder: for the file of `"disk"` (default: the system's folder for temporary files).
        weights: for a model made on the meta device (`with torch.device("meta")`), whose blocks are made one by
            one when each is first needed: a safetensors file or folder, or a function of a module's name and the module
            that fills the module's own tensors. By default each module draws its own, by `reset_parameters` or the
            model's `_init_weights`; the draws depend on the seed and the module's name.

    You may change the model's mode (`train()`, `eval()`, also of single modules), freeze and unfreeze parameters, and
    set rates in `learner.optimizer.param_groups`. A module or parameter that is
    replaced, cast or moved after the first step is refused. A learner can be pickled and copied, unless it is
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
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
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
        stage: Stage | WholeNetwork | None = None,
        replicas: Replicas | OneProcess | None = None,
        device: torch.device | str | None = None,
        offload: Where = "none",
        offload_folder: str | Path | None = None,
        weights: Weights = None,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "model", "rule")}
        check_arguments(given)
        self.rule = rules.create(rule) if isinstance(rule, str) else rule
        check_rule(self.rule)
        self._setup = make_setup(model, self.rule, given, self._moved_by)
        self._arguments = given | dict.fromkeys(DONE_ONCE)
        self._offload_to: tuple[Where, Path] = offload, self._setup.offload_folder
        self.offload: Offload | NotOffloaded = NotOffloaded()
        self.network, self.device, self.channels_last = self._setup.network, self._setup.device, channels_last
        self.stage, self.replicas = self._setup.stage, self._setup.replicas
        self.schedule, self.steps, self.skipped = self._setup.execution.schedule, 0, 0
        self.optimizer = EveryOptimizer(lambda: self._built.optimizers())
        self._prepared = not isinstance(self.rule, pieces.StartsFromData)
        self._built: Built | NotBuilt = NotBuilt()
        self._example: Any = None
        self._pending: Mapping[str, Any] | None = None
        if example is not None:
            self.build(example)

    # Building.

    def build(self, x: Any) -> None:
        """Make the rule's auxiliary modules and the optimizers; by default the first `step` does this.

        Args:
            x: one batch of inputs; two samples of it are run to find the shapes, or all of it if it is not a tensor.

        Raises:
            LayerwiseError: the network does not take such an input, or was changed after `partition`.
        """
        check_input(self.network, x)
        check_reads(self.rule, x)
        x = self._placed(labelled(x, None)[0])
        with torch.inference_mode(False):  # the modules made here must be trainable, whatever the grad mode is
            self._built = Built(self._setup, mapped(x, ordinary), self.evaluating)
            self._example = x[:1].clone() if isinstance(x, Tensor) else mapped(x, torch.clone)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict(pending)

    def _moved_by(self, blocks: Sequence[Sequence[Block]], first: int) -> Offload | NotOffloaded:
        """The offloader of these groups; the same one again if an earlier attempt has failed at the input."""
        kind, folder = self._offload_to
        if kind != "none" and not self.offload.active:
            total, make = len(self._setup.blocks), self._setup.late.make_rest
            self.offload = Offload(kind, folder, self.device, self.rule, blocks, first, total, make)
        return self.offload

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
        """The engine that updates the groups."""
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
        """The groups in which the blocks on this rank are updated; none before `build`."""
        return self._built.groups

    def groups_at(self, update: int) -> list[Group]:
        """The groups of an update: `groups`, unless the rule joins or skips some in it.

        Raises:
            LayerwiseError: the rule returns groups that are not joined neighbours of its own.
        """
        return self._built.groups_at(update)

    @property
    def updates(self) -> int:
        """Number of updates so far; each takes `accumulate` batches."""
        return self._built.updates

    @property
    def accumulated(self) -> int:
        """Number of batches accumulated for the current update."""
        return self._built.accumulated

    # Training.

    @property
    def prepares(self) -> bool:
        """Whether the rule starts from training data."""
        return isinstance(self.rule, pieces.StartsFromData)

    @torch.no_grad()
    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Show training data to a rule that starts from them; by default the first `step` shows its batch.

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

        The model runs in its present mode (`train()` or `eval()`).

        Args:
            x: inputs `(B, ...)`; for a model that is cut at its calls also a tuple of arguments, or a mapping of
                keywords.
            y: labels of the task: classes `(B,)`, `(B, T)` for a language model, numbers `(B, D)`, `(B, H, W)`
                for segmentation (default: the entry `labels` of a mapping).

        Returns:
            The step's metrics, still on the device.

        Raises:
            LayerwiseError: labels that do not fit, a model that was changed since the first step, a signal that
                reaches nothing, or a non-finite loss or gradient.
        """
        if torch.is_inference_mode_enabled():
            raise LayerwiseError("a training step cannot run inside torch.inference_mode(); call it outside.")
        with preserved_generators(self.device, self._setup.others[self.network.model.training]):
            x, y = self._ready(x, y)
            if not self._prepared:
                self.prepare(x, y)
            built = self.built
            built.check()
            training = self.network.model.training
            if any(module.training != training for module in built.auxiliary.modules()):
                built.auxiliary.train(training)
            step, trace, updates = self.steps, Trace(), self.updates
            seed_generators(derive_seed(self._setup.execution.seed, "begin", step), self.device)
            with self.network.passing(x):
                out = train_on(built, x, y, step, self.__call__, self.groups_at(updates), trace)
            self.steps += 1
            self._count(updates)
            self.skipped += built.pass_on(*out, bool(trace.skipped), self.steps)
        return Metrics(step, len(y), trace.metrics, tuple(trace.skipped), trace.finite, trace.statistics)

    def flush(self) -> bool:
        """Make the current update with the batches so far, at the end of the training; returns whether it had any."""
        if isinstance(self._built, NotBuilt):
            return False
        with preserved_generators(self.device):
            self._built.check()
            trace, updates = Trace(), self.updates
            done = self._built.engine.flush(self.groups_at(updates), self.steps - 1, trace)
            self._count(updates)
            self.skipped += bool(trace.skipped)
        return done

    def _count(self, before: int) -> None:
        """Count an update in `optimizer`, as its schedulers require."""
        if self.updates > before:
            self.optimizer.count_update()

    def average(self) -> None:
        """Average an unfinished update's gradients over the replicas; afterwards all hold the same bits."""
        self.built.engine.average(self.groups_at(self.updates))

    def measured_step(self, x: Any, y: Tensor | None = None) -> tuple[Metrics, MemoryUse]:
        """One `step` under the memory meter: exact bytes, on the CPU at a few times the step's duration.

        Optimizers create their state in the first update, so measure a later step.
        """
        groups = self.groups_at(self.updates)
        with meter_of(self.network, self.auxiliary, self.groups, self.replicas, self.device) as meter:
            metrics = self.step(x, y)
        return metrics, self.replicas.counted(self.offload.counted(meter.peak), groups)

    # Evaluation and prediction.

    def evaluate(self, x: Any, y: Tensor | None = None) -> Metrics:
        """The rule's scalars for one batch in evaluation mode; nothing is updated.

        Args:
            x: inputs as for `step`.
            y: labels as for `step`.
        """
        with self.evaluating():
            x, y = self._ready(x, y)
            trace = prediction.evaluated(self.built, x, y, self.__call__)
        return Metrics(self.steps, len(y), trace.metrics, (), {}, trace.statistics)

    @torch.no_grad()
    def __call__(self, x: Any) -> Tensor:
        """Logits `(B, ..., K)` for inputs, as `step` takes them, in evaluation mode, without gradient."""
        with self.evaluating():
            x = self._input(x)
            self.built.check()
            with self.engine.autocast():
                return prediction.predicted(self.built, x)

    @torch.no_grad()
    def beliefs(self, x: Any, threshold: float | None = None) -> list[Tensor]:
        """What the sites believe about `x`, in evaluation mode, for rules that pass beliefs on.

        Args:
            x: inputs as for `step`.
            threshold: stop after the first site by which every sample's largest probability has reached it (default:
                run all sites).

        Returns:
            Log-probabilities `(B, ..., K)`: the uniform belief, then one per site that was run.

        Raises:
            LayerwiseError: the rule has no beliefs.
        """
        prediction.check_passes_beliefs(self.rule)
        with self.evaluating():
            return prediction.beliefs(self._input(x), self.built, threshold)

    def evaluating(self) -> AbstractContextManager[None]:
        """A context in which all modules are in evaluation mode, without gradient; it restores every mode."""
        return prediction.evaluating(self._setup, self.auxiliary, self.optimizer, self.offload)

    # Batches.

    def _placed(self, x: Any) -> Any:
        return placed(x, self.device, self.channels_last)

    def _input(self, x: Any) -> Any:
        """Check inputs and move them to the device; build the learner if necessary."""
        check_input(self.network, x)
        if isinstance(self._built, NotBuilt):
            self.build(x)
        return self._placed(labelled(x, None)[0])

    def _ready(self, x: Any, y: Tensor | None) -> tuple[Any, Tensor]:
        """Check inputs and labels and move them to the device; build the learner if necessary."""
        check_input(self.network, x)
        x, labels = with_labels(x, y, self._setup.task.wanted)
        if isinstance(self._built, NotBuilt):
            self.build(x)
        self.check_labels(labels)
        x, labels = self._placed(x), of_one_batch(placed(labels, self.device))
        compare_own_loss(self.built, x, labels, apart=y is not None)
        return x, labels

    def check_labels(self, y: Tensor) -> None:
        """Raise LayerwiseError unless all labels `y` fit the task, or are -100 for a rule that allows it.

        The values are checked only on the host: on an accelerator the check would wait for the device.
        """
        check_labels_of(self.rule, self.task, check_label_tensor(y, self.task.wanted))

    # State.

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters under the model's names, then the rule's under `auxiliary.`."""
        return named_parameters(self.network, self.auxiliary)

    def optimizer_states(self) -> dict[str, dict[str, Any]]:
        """Optimizer state per parameter name, whatever the grouping of the blocks."""
        return states.optimizer_states(self.built)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that training needs to continue.

        Returns:
            `model`: the model's own `state_dict`; `auxiliary`: the rule's modules; `optimizer`: state per parameter;
            `stateless`: parameters without state; `gradients`: those accumulated since the last update;
            `accumulation`: how much; `scaler`: one state per group; `rates`, `settings`: values set in parameter
            groups; `rule`, `steps`, `skipped`. As in `nn.Module.state_dict`, tensors are the learner's own, or views of
            offloaded ones until the next step: copy.deepcopy keeps their values. A stage returns only its own part.

        Raises:
            LayerwiseError: nothing is built yet.
        """
        self.built.check()
        return states.state_of(self.built, self.skipped, self.steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; before the first step a copy is kept until the shapes are known.

        Raises:
            LayerwiseError: the state is damaged, or of another rule or model; then nothing is changed.
        """
        check_parts(state)
        if isinstance(self._built, NotBuilt):
            self._pending = states.set_aside(state, self.network)
            return
        states.load_state(self._built, state)
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._prepared = self._prepared or self.steps > 0

    def save_weights(self, folder: str | Path) -> None:
        """Write the network's weights, a safetensors file per block and an index, as `transformers` reads them.

        At most one additional tensor is in memory. Each of several ranks writes its own blocks.

        Args:
            folder: created if it is missing; files of the same names are replaced.

        Raises:
            LayerwiseError: nothing is built yet, or the folder cannot be written to.
        """
        save_blocks(self.network, self.built.offload, folder, index=self.stage.first)

    def onload(self) -> None:
        """Bring all offloaded blocks to the device permanently: the model is an ordinary module again."""
        self.offload.end()
        self.offload, self._offload_to = NotOffloaded(), ("none", self._offload_to[1])
        self._built.offload = self.offload

    def __reduce__(self) -> tuple[Any, ...]:
        check_can_be_pickled(self.stage, self.replicas, self.offload)
        state = self._pending if isinstance(self._built, NotBuilt) else self.state_dict()
        made_of = type(self), self.network, self.rule, self._arguments, self._example
        return restored, (*made_of, state, self._prepared, group_options(self.groups))
