"""From a model, a rule and an example to groups of blocks with optimizers."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerwise.core import trees
from layerwise.core.blocks import Block, Partition
from layerwise.core.contract import asking, groups_of
from layerwise.core.engine import Engine
from layerwise.core.groups import Group, Grouping, Unit
from layerwise.core.keeping import put_back
from layerwise.core.optim import decay_groups, sparse_gradients, without_decay
from layerwise.core.output_layer import watching_linear_layers
from layerwise.core.param_groups import begin_schedule
from layerwise.core.pieces import (
    FollowsNextBlock,
    LearnsInPart,
    MovesActivations,
    ReadsOutputMatrix,
    RenewsUnits,
    RepeatsBatch,
    StepsByParameter,
)
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.core.rule import Site
from layerwise.errors import LayerwiseError
from layerwise.learner.adapters import warn_of_adapters
from layerwise.learner.arguments import READOUTS, check_micro, check_multipliers
from layerwise.learner.output_copy import output_copy
from layerwise.learner.setup import ONE_PROCESS, Setup
from layerwise.learner.watch import Watch
from layerwise.memory.activations import ActivationOffload, NotMoved
from layerwise.memory.offload import NotOffloaded, Offload
from layerwise.parallel.alone import WholeNetwork
from layerwise.parallel.following import followed
from layerwise.rules.ahead import head_of

WORTH_A_WARNING = 100_000
"""Below this many parameters in readouts there is no warning."""


class Built:
    """The groups of a learner, with the engine that updates them.

    Args:
        setup: the learner's parts.
        x: one batch of inputs on the device; two samples of it are run to find shapes and layouts, or the whole batch
            if it is not a tensor.
        evaluating: opens a context in which modules are in evaluation mode.

    Raises:
        LayerwiseError: the network does not take such an input, or was changed after `partition`.
    """

    def __init__(self, setup: Setup, x: Any, evaluating: Callable[[], AbstractContextManager[None]]):
        self.compared = self.looked = False
        check_alone(setup)
        check_by_parameter(setup)
        check_looks(setup)
        setup.network.check_modules()
        self.setup = setup
        self.auxiliary = nn.ModuleDict()
        with evaluating(), put_back(setup.network.model):
            setup.network.arrange(x[:2] if isinstance(x, Tensor) else x)
        blocks = setup.blocks
        names = [block.name for block in blocks]
        check_multipliers(setup.lr_multipliers, names)  # a cut that turned out to be the head is no block
        ranges = groups_of(setup.rule, names)
        ends = [later.start for later in ranges[1:]] + [len(blocks)]
        parts = [blocks[s.start : end] for s, end in zip(ranges, ends, strict=True)]
        # Which blocks are here, and what belongs to them, may be known only after the network has run.
        known = setup.stage.whole and not setup.network.owns_by_use
        self.offload: Offload | NotOffloaded = NotOffloaded()
        if known:
            self._settle(parts, 0)
        else:
            setup.late.make(setup.network.outside())
            setup.late.follow(blocks)
        if any(t.is_complex() for t in trees.tensors(x)):
            raise LayerwiseError(
                "the inputs are complex numbers, which no rule can read; give torch.view_as_real(x) or their absolute "
                "values."
            )
        model = setup.network.model
        with evaluating(), put_back(model), watching_linear_layers(model) as watched:
            outputs = setup.network.probe(x[:2] if isinstance(x, Tensor) else x)
        self.activations = NotMoved()
        if isinstance(setup.rule, MovesActivations):
            self.activations = ActivationOffload(setup.rule.activations_to(), setup.offload_folder, setup.device)
        self.task = setup.task.fitted(outputs[-1])
        layer = watched.output_layer(setup.network, self.task.outputs)
        setup.network.__dict__.update(output_layer=layer)  # the module is registered in the model only once
        self.matrix = output_copy(setup, layer)  # before the layer's weights may move to another rank
        self.engine = Engine(setup.rule, self.task, setup.execution, self.resident)
        mine = setup.stage.choose(setup.rule, setup.network, ranges, x[:1] if isinstance(x, Tensor) else x)
        if not known:
            self._settle([parts[i] for i in mine], ranges[mine.start].start)
        setup.late.make(setup.stage.borrowed)
        tensors = [*setup.network.parameters(), *setup.network.buffers()]
        setup.replicas.copy_from_first((tensor for tensor in tensors if not tensor.is_meta), setup.facts)
        sizes = tuple(tuple(out.shape[1:]) for out in outputs)
        inputs, layouts = (
            tuple(x.shape[1:]) if isinstance(x, Tensor) else (),
            (setup.network.layouts, setup.network.input_layout),
        )
        sites = [Site(i, len(blocks) - 1, b.name, sizes, inputs, *layouts, setup.network) for i, b in enumerate(blocks)]
        units = [Unit(site, block, None) for site, block in zip(sites, blocks, strict=True)]
        groups = []
        for i in mine:
            own = units[ranges[i].start : ends[i]]
            with self.resident(own):
                for unit in own:
                    unit.auxiliary = self._auxiliary(unit.site, outputs[unit.site.index])
                    if unit.auxiliary is not None and isinstance(setup.rule, FollowsNextBlock):
                        unit.followed = setup.rule.followed(unit.site)
                setup.replicas.adopt(setup.network.model, own)
                group = self._group(own, ahead=units[ends[i] : ranges[i].stop])
                groups.append(group)
                self.offload.add(group)
        setup.stage.give_back(setup.network.model)
        setup.factory.check_names([name for name, _ in self.named_parameters()])
        if setup.execution.micro > 1:
            known = dict(zip(names, setup.network.layouts, strict=True))
            check_micro(
                setup.rule,
                [unit for group in groups for unit in group.units],
                {"the input": setup.network.input_layout, **known},
                setup.network.keeps if len(groups) > 1 else (),
            )
        self.grouping = Grouping(setup.rule, groups, names, self._scaler)
        self.engine.next_block = setup.stage.next_block(setup.rule, setup.network, self._sites())
        if setup.compile:
            compile_blocks(blocks, setup.compile)
        self._warn_of_readouts(units)
        warn_of_adapters(setup.network.model)
        self.watch = Watch(setup.network.model, parameters=not setup.replicas.shares_parameters)

    def check(self) -> None:
        """Raise LayerwiseError where the owner has changed the model in a way that nobody follows."""
        self.watch.check()
        self.offload.check()

    def _sites(self) -> range:
        """The sites on this rank."""
        units = [unit for group in self.groups for unit in group.units]
        return range(units[0].site.index, units[-1].site.index + 1)

    def _settle(self, parts: Sequence[Sequence[Block]], first: int) -> None:
        """Create the weights of these groups' blocks, and offload them if required; `first` numbers the first."""
        self.offload = self.setup.make_offload(parts, first)
        self.setup.late.make_rest([block for part in parts for block in part])

    @property
    def groups(self) -> list[Group]:
        """The groups in which the blocks on this rank are updated."""
        return self.grouping.own

    def groups_at(self, update: int) -> list[Group]:
        """The groups of an update, joined or skipped as the rule says."""
        return self.grouping.at(update)

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return self.engine.accumulation.updates

    @property
    def accumulated(self) -> int:
        """Number of batches accumulated for the current update."""
        return self.engine.accumulation.batches

    def optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizers of all groups here."""
        return (optimizer for group in self.groups for optimizer in group.optimizers)

    def pass_on(self, h: Any, message: Any, skipped: bool, steps: int) -> bool:
        """Finish a step, the last of `steps`, and return whether any of its updates was skipped."""
        skipped = self.setup.stage.pass_on(h, message, skipped)
        self.matrix.end(steps)
        return skipped

    def resident(self, units: Sequence[Unit]) -> AbstractContextManager[Any]:
        """A context in which the tensors of these units are on the device, and whole."""
        contexts = (self.setup.replicas.resident(units), self.offload.resident(units), self.activations.kept(units))
        needed = [context for context in contexts if not isinstance(context, nullcontext)]
        return _nested(needed) if needed else nullcontext()

    def _auxiliary(self, site: Site, h: Tensor) -> nn.Module | None:
        """The rule's module at a site, if there is one."""
        with preserved_generators(self.setup.device):
            seed_generators(derive_seed(self.setup.seed, "auxiliary", site.index), self.setup.device)
            # On the host, whatever the default device is, so that it draws the same there.
            with torch.device("cpu"), asking(self.setup.rule, f"`auxiliary` at block {site.name!r}"):
                auxiliary = self.setup.rule.auxiliary(site, h, self.task)
        if auxiliary is not None and not isinstance(auxiliary, nn.Module):
            raise LayerwiseError(
                f"rule {self.setup.rule.name!r} gave block {site.name!r} an auxiliary module of type "
                f"{type(auxiliary).__name__}; return a torch.nn.Module, or None."
            )
        if auxiliary is not None:
            self.auxiliary[str(site.index)] = auxiliary.to(self.setup.device)
        return auxiliary

    def _group(self, units: list[Unit], ahead: list[Unit]) -> Group:
        setup = self.setup
        learning = [unit for unit in units if setup.rule.trains(unit.site)]
        shard_of = setup.replicas.shard_of
        names = {id(shard_of(parameter)): name for unit in learning for name, parameter in unit.named_parameters()}
        modules = [module for unit in learning for module in unit.modules()]
        exempt = without_decay(modules)
        exempt |= {id(shard_of(p)) for unit in learning for p in unit.parameters() if id(p) in exempt}
        of_units = [
            [
                group
                for parameters, multiplier in self._with_multipliers(unit)
                for group in decay_groups(map(shard_of, parameters), multiplier, exempt, names)
            ]
            for unit in learning
        ]
        groups = [group for own in of_units for group in own]
        sparse = sparse_gradients(modules)
        for group in groups:
            if any(id(p) in sparse for p in group["params"]):
                group["fused"] = False  # the fused kernels take only dense gradients
        if isinstance(setup.rule, StepsByParameter):
            of_optimizers = [[_alone(group, place)] for group in groups for place in range(len(group["params"]))]
        elif isinstance(setup.rule, LearnsInPart):
            of_optimizers = [own for own in of_units if own]
        else:
            of_optimizers = [groups] if groups else []
        made = [setup.factory(own) for own in of_optimizers]
        optimizers = [optimizer for several in made for optimizer in several]
        if isinstance(setup.rule, LearnsInPart) and len(optimizers) > len(made):
            raise LayerwiseError(
                f"rule {setup.rule.name!r} takes one optimizer for each block, and this choice gives several; name one."
            )
        for optimizer in optimizers:
            begin_schedule(optimizer)
            if callable(mode := getattr(optimizer, "train", None)):
                mode()  # schedule-free ones refuse to step otherwise
                if isinstance(setup.rule, RenewsUnits):
                    raise LayerwiseError(
                        f"rule {setup.rule.name!r} sets the optimizer's state of some weights to zero, and that of "
                        f"{type(optimizer).__name__} holds weights; choose another, such as adamw."
                    )
            setup.replicas.check_optimizer(optimizer)
        if isinstance(setup.rule, LearnsInPart):
            with_parameters = [unit for unit, own in zip(learning, of_units, strict=True) if own]
            for unit, optimizer in zip(with_parameters, optimizers, strict=True):
                unit.optimizer = optimizer
        return Group(units, ahead, [p for group in groups for p in group["params"]], optimizers, self._scaler())

    def _with_multipliers(self, unit: Unit) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters of a unit by the factor of their learning rate: one factor, unless readouts have their own."""
        factors = self.setup.lr_multipliers
        of_block = factors.get(unit.site.name, 1.0)
        if READOUTS not in factors or unit.auxiliary is None:
            return [(unit.parameters(), of_block)]
        return [
            (unit.block.parameters(), of_block),
            (list(unit.auxiliary.parameters()), of_block * factors[READOUTS]),
        ]

    def _warn_of_readouts(self, units: Sequence[Unit]) -> None:
        """Warn if private readouts have more parameters than the blocks, or than the adapters of frozen blocks.

        There is no warning about small ones, whose cost does not matter.
        """
        rule, blocks = self.setup.rule, [unit for unit in units if not unit.site.is_head]
        if isinstance(rule, ReadsOutputMatrix) and rule.readout == "private":
            heads = [head_of(u.auxiliary) for u in blocks if u.auxiliary]
            made = [t for head in heads for t in (*head.parameters(), *head.buffers())]
            readouts, own = sum(t.numel() for t in made), sum(p.numel() for u in blocks for p in u.block.parameters())
            if readouts > max(own, WORTH_A_WARNING):
                warnings.warn(
                    f"the readouts of rule {rule.name!r} have {readouts:,} numbers and the blocks {own:,}; "
                    f'readout="shared" reads the matrix of the network\'s output layer in their place.',
                    stacklevel=2,
                )
                return
        larger = []
        for unit in units:
            own = list(unit.block.parameters())
            trained = sum(p.numel() for p in own if p.requires_grad)
            readout = sum(p.numel() for p in unit.auxiliary.parameters() if p.requires_grad) if unit.auxiliary else 0
            if 0 < trained < readout and trained < sum(p.numel() for p in own):
                larger.append(f"{unit.site.name} ({readout:,} against {trained:,})")
        if larger:
            warnings.warn(
                f"rule {self.setup.rule.name!r} adds readouts that have more parameters than what the blocks train: "
                f"{', '.join(larger[:3])}{', ...' if len(larger) > 3 else ''}; 'sll' has none that are trained.",
                stacklevel=2,
            )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters under the model's names, then the rule's under `auxiliary.`."""
        return named_parameters(self.setup.network, self.auxiliary)

    def _scaler(self) -> torch.amp.GradScaler:
        execution = self.setup.execution
        return torch.amp.GradScaler(execution.device.type, enabled=execution.autocast == torch.float16)


def named_parameters(network: Partition, auxiliary: nn.ModuleDict) -> Iterator[tuple[str, nn.Parameter]]:
    """The network's parameters under the model's names, then the rule's under `auxiliary.`."""
    yield from network.named_parameters()
    for name, parameter in auxiliary.named_parameters():
        yield f"auxiliary.{name}", parameter


class NotBuilt:
    """Replaces `Built` until the shapes are known: no groups and no updates."""

    updates = accumulated = 0

    def __init__(self) -> None:
        self.auxiliary = nn.ModuleDict()
        self.groups: list[Group] = []
        self.offload: Offload | NotOffloaded = NotOffloaded()

    def groups_at(self, update: int) -> list[Group]:
        """The groups of an update: none."""
        return []

    def optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizers of all groups: none."""
        return iter(())


def check_alone(setup: Setup) -> None:
    """Raise LayerwiseError if `torch.distributed` runs in several processes, and the learner was given no replicas."""
    alone = type(setup.stage) is WholeNetwork and setup.replicas is ONE_PROCESS
    if alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise LayerwiseError(
            f"torch.distributed runs in {dist.get_world_size()} processes, and this learner would train in each of "
            "them alone; give it replicas=..., or replicas=layerwise.learner.OneProcess() if that is meant."
        )


def check_looks(setup: Setup) -> None:
    """Raise LayerwiseError if a rule needs whole parameters at a time when they are sharded."""
    rule = setup.rule
    if isinstance(rule, RenewsUnits) and setup.replicas.shares_parameters:
        raise LayerwiseError(
            f"rule {rule.name!r} writes into whole weights, and with --parallel sharded a rank has a share of them; "
            "choose --parallel data."
        )
    follows = any(followed(rule, setup.network, index) for index in range(len(setup.network.blocks)))
    if follows and setup.replicas.shares_parameters:
        raise LayerwiseError(
            f"the heads of rule {rule.name!r} follow the next block, and with --parallel sharded a rank has a share of "
            "it; choose --parallel data, or ahead='learned'."
        )


def check_by_parameter(setup: Setup) -> None:
    """Raise LayerwiseError if an option needs all gradients at once, and the rule has one at a time."""
    execution = setup.execution
    needs = {
        "clip": execution.clip is not None,
        "accumulate": execution.accumulate > 1,
        "nonfinite='skip'": execution.nonfinite == "skip",
        "precision='fp16'": execution.autocast == torch.float16,
        "replicas": setup.replicas is not ONE_PROCESS and setup.replicas.count > 1,
    }
    if execution.accumulate > 1 and isinstance(setup.rule, RepeatsBatch) and setup.rule.rounds() > 1:
        raise LayerwiseError(
            f"rule {setup.rule.name!r} makes several updates with one batch, so batches cannot accumulate; leave "
            "accumulate out."
        )
    for option, wanted in needs.items():
        if wanted and isinstance(setup.rule, StepsByParameter):
            raise LayerwiseError(
                f"rule {setup.rule.name!r} updates one parameter at a time, and {option} needs all gradients at once; "
                "leave it out, or choose a rule such as backprop."
            )


@contextmanager
def _nested(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    """A context in which all of these are open, the first one outermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def compile_blocks(blocks: Sequence[Block], backend: bool | str) -> None:
    """Run every block through `torch.compile`; a string names the backend."""
    for block in blocks:
        name, kind = block.name, backend if isinstance(backend, str) else "inductor"
        block.compile(lambda run, name=name, kind=kind: torch.compile(_with_own_code(run, name), backend=kind))
        block.compiled = True


def _with_own_code(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Copy `run` with its own code object.

    Dynamo caches compiled code per code object, at most eight versions. Blocks that share one would fall
    back to plain Python from the ninth on, and treat each other's shapes as dynamic.
    """

    def block(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    block.__code__ = block.__code__.replace(co_name=f"block {name}")
    return block


def _alone(group: dict[str, Any], place: int) -> dict[str, Any]:
    """A parameter group with only one of its parameters."""
    return group | {name: [group[name][place]] for name in ("params", "names")}
