"""Shards: each replica keeps a part of every parameter, and gathers those of one group at a time to run it."""

import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.weak import WeakTensorKeyDictionary

from layerwise.core.blocks import Block
from layerwise.core.groups import Group, Unit
from layerwise.errors import LayerwiseError
from layerwise.memory.meter import MemoryUse, tensor_bytes
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.replicas import Replicas

_NAMES = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
ELEMENTWISE = {getattr(torch.optim, name): name for name in _NAMES}
"""Optimizers that update every element on its own, so that the update of a shard is that part of the full update."""

# torch 2.13 has renamed it, and warns about the old name.
scattered_sum: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GroupModule(nn.Module):
    """A group as one module, which torch's `fully_shard` requires; it is never called.

    A group may span several modules, so the whole model is in it, and its other parameters are ignored.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]):
        super().__init__()
        self.model = model
        self.auxiliary = nn.ModuleList(unit.auxiliary for unit in units if unit.auxiliary is not None)


@dataclass(eq=False)
class GatherableGroup:
    """The parameters of a group, which can be gathered."""

    module: FSDPModule
    bytes: int = 0
    """Of the full parameters."""


@dataclass(eq=False)
class ShardedParameter:
    """A parameter of which each rank keeps a shard."""

    sharded: DTensor
    """The model's tensor while nothing is gathered."""
    full: nn.Parameter
    """The model's tensor while the parameter is gathered."""


class Shards(Replicas):
    r"""Replicas of which each keeps the N-th part of every parameter, gradient and optimizer state.

    The parameters of a group are gathered before it runs. Once per batch is enough, because the group's backward pass
    directly follows its forward pass; global backpropagation gathers them for each of the two passes. After the
    backward pass the full parameters are freed, and each rank gets its shard of the mean gradient,

    $$g_r = \Big[\frac1N \sum_{q=1}^{N} \nabla_q\Big]_{\text{shard } r},$$

    with which its optimizer steps while the next group runs forward. Sharding and gathering are torch's `fully_shard`.

    Args:
        ranks: the processes of the job.
    """

    shares_parameters = True
    every_batch = (
        True  # otherwise the full gradients of every group would be kept from one batch of an update to the next
    )

    def __init__(self, ranks: Ranks):
        super().__init__(ranks)
        self.mesh = ranks.collectively(
            lambda: init_device_mesh(ranks.device.type, (self.count,), mesh_dim_names=("data",))
        )
        self._parts: WeakKeyDictionary[Block, GatherableGroup] = WeakKeyDictionary()
        self._shared: MutableMapping[Tensor, ShardedParameter] = WeakTensorKeyDictionary()
        """Keyed by this rank's shard, an ordinary tensor, for optimizers that do not support sharding."""
        self._kept: MutableMapping[Tensor, nn.Parameter] = WeakTensorKeyDictionary()
        """This rank's shard of each parameter of the model."""
        self._open: list[GatherableGroup] = []
        self._running = False

    def check(self, **options: Any) -> None:
        """Raise LayerwiseError for what `fully_shard` does not support.

        Args:
            options: of the learner: `precision`, `compile`, `channels_last`.
        """
        for name, refused, instead in (
            ("precision", options["precision"] == "fp16", "use bf16 or fp32"),
            ("compile", options["compile"], "leave it out"),
            ("channels_last", options["channels_last"], "leave it out"),
        ):
            if refused:
                raise LayerwiseError(f"sharded parameters cannot be trained with {name}={options[name]}; {instead}.")

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise LayerwiseError unless the optimizer updates every element on its own."""
        if type(optimizer) not in ELEMENTWISE:
            raise LayerwiseError(
                f"{type(optimizer).__name__} may look at whole tensors, and a rank has a shard of each; choose one of "
                f"{', '.join(_NAMES)}, or --parallel data."
            )

    def adopt(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Shard the parameters of a group."""
        own = {unit.site.index for unit in units}
        for name, users in ((name, users) for unit in units for name, users in unit.block.users.items()):
            if not users <= own and any(name == other for unit in units for other, _ in unit.block.named_parameters()):
                raise LayerwiseError(
                    f"{name!r} is used by several groups of blocks, and would be gathered with one of them alone; give "
                    "--parallel data, or a model in which it is not shared."
                )
        super().adopt(model, units)
        found = [p for unit in units for p in unit.parameters()]
        for parameter in found:
            if parameter.dim() == 0:
                raise LayerwiseError(
                    f"a parameter of group {units[0].site.name!r} is a single number, which cannot be sharded; give "
                    "it the shape (1,), or use --parallel data."
                )
        part = GroupModule(model, units)
        own = set(found)
        others = {p for p in part.parameters() if p not in own}
        fully_shard(part, mesh=self.mesh, ignored_params=others, shard_placement_fn=self._placement)
        assert isinstance(part, FSDPModule)
        sharded = [p for unit in units for p in unit.parameters()]
        gatherable = GatherableGroup(part)
        self._gather(gatherable)
        full = [p for unit in units for p in unit.parameters()]
        gatherable.bytes = tensor_bytes(full)
        self.release()
        for before, after in zip(sharded, full, strict=True):
            assert isinstance(before, DTensor)
            own = self._kept[before] = nn.Parameter(before.to_local().detach(), before.requires_grad)
            self._shared[own] = ShardedParameter(before, after)
        need = functools.partial(self._need, gatherable)
        for unit in units:
            self._parts[unit.block] = gatherable
            unit.block.before = need
            for module in unit.auxiliary.modules() if unit.auxiliary is not None else ():
                module.register_forward_pre_hook(lambda *_, need=need: need())

    def _placement(self, parameter: nn.Parameter) -> Shard | None:
        """Shards by rows; if there are too few, by another dimension that divides evenly."""
        if parameter.shape[0] >= self.count:
            return None
        return next((Shard(i) for i, size in enumerate(parameter.shape) if size and size % self.count == 0), None)

    # Gathering.

    def shard_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """The shard of a parameter of the model that this rank keeps, and whose updates the model sees."""
        return self._kept.get(parameter, parameter)

    def full_of(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """The full parameters that blocks use; they have memory while they are gathered."""
        return [self._shared[p].full if p in self._shared else p for p in parameters]

    @contextmanager
    def resident(self, units: Sequence[Unit]) -> Iterator[None]:
        """A context in which the parameters of these units are gathered."""
        self.release()
        self._running = True
        try:
            for unit in units:
                if unit.block in self._parts:  # not while it is being built
                    self._gather(self._parts[unit.block])
            yield
        finally:
            self._running = False
            self.release()

    def release(self) -> None:
        """Free all full parameters."""
        while self._open:
            self._open.pop().module.reshard()

    def _need(self, part: GatherableGroup) -> None:
        """Gather a block that runs outside its group; without gradients, one group at a time."""
        if part not in self._open and not self._running and not torch.is_grad_enabled():
            self.release()
        self._gather(part)

    def _gather(self, part: GatherableGroup) -> None:
        if part not in self._open:
            with self.heartbeat.watching():
                part.module.unshard()
            self._open.append(part)

    # Gradients.

    def reduce(
        self, parameters: Sequence[nn.Parameter], running: Sequence[Tensor], loss: Tensor
    ) -> Callable[[], Tensor]:
        """Start to average gradients, of which each rank gets its shard, and running statistics.

        Args:
            parameters: this rank's shards of those whose gradients are averaged.
            running: as in `Replicas`.
            loss: as in `Replicas`.
        """
        others = super().reduce([], running, loss)
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, full in zip(parameters, self.full_of(parameters), strict=True):
            if full.grad is not None:
                by_type.setdefault(full.dtype, []).append(parameter)
        sent = []
        for dtype, learned in by_type.items():
            # Row r of the bucket goes to rank r. The first chunk is the largest; there may be fewer chunks than ranks.
            chunks = [self._chunks(parameter) for parameter in learned]
            widths = [found[0].numel() for found in chunks]
            bucket = torch.zeros(self.count, sum(widths), dtype=dtype, device=loss.device)
            for columns, found in zip(bucket.split(widths, dim=1), chunks, strict=True):
                for row, chunk in zip(columns, found, strict=False):
                    row[: chunk.numel()].view(chunk.shape).copy_(chunk)
            for full in self.full_of(learned):
                full.grad = None
            bucket /= self.count
            own = torch.empty_like(bucket[0])
            with self.heartbeat.watching():
                sent.append((scattered_sum(own, bucket.view(-1), async_op=True), own.split(widths), learned))

        def arrived() -> Tensor:
            flag = others()
            for work, found, learned in sent:
                self._wait(work, found[0])
                for parameter, row in zip(learned, found, strict=True):
                    gradient = row[: parameter.numel()].view(parameter.shape)
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            return flag

        return arrived

    def _chunks(self, parameter: nn.Parameter) -> Sequence[Tensor]:
        """The full gradient, cut as the parameter is."""
        about = self._shared[parameter]
        (placement,) = about.sharded.placements
        assert isinstance(placement, Shard)
        assert about.full.grad is not None
        return about.full.grad.chunk(self.count, placement.dim)

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Norm of the averaged gradients: the root of the sum of the squares over all shards."""
        square = (
            super().norm(parameters).to(self.ranks.device, torch.float64).square()
        )  # float64, so that it does not overflow
        with self.heartbeat.watching():
            work = dist.all_reduce(square, async_op=True)
        self._wait(work, square)
        return square.sqrt().float()

    def sum(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm, the same on all ranks: the sum of one shard would not cover the others."""
        return self.norm(parameters)

    # States.

    def to_shard(self, own: Tensor, given: Tensor) -> Tensor:
        """The part of the full tensor `given` that belongs to a parameter of the model or to its shard here."""
        sharded = self._shared[own].sharded if own in self._shared else own
        if not isinstance(sharded, DTensor) or sharded.shape != given.shape:
            return given
        found = distribute_tensor(given.to(own.device), self.mesh, sharded.placements, src_data_rank=None)
        return found if own is sharded else found.to_local()

    def to_full(self, own: Tensor, tensor: Tensor) -> Tensor:
        """A tensor that belongs to this rank's shard of a parameter, as a shard of the full one."""
        if own not in self._shared or tensor.shape != own.shape:
            return tensor
        full = self._shared[own].sharded
        shape, stride = full.shape, full.stride()
        return DTensor.from_local(tensor, self.mesh, full.placements, run_check=False, shape=shape, stride=stride)

    def counted(self, use: MemoryUse, groups: Sequence[Group]) -> MemoryUse:
        """The memory of a measured step: the parameters count with the largest group gathered."""
        views = [{self._parts[unit.block] for unit in (*group.units, *group.ahead)} for group in groups]
        gathered = max(sum(part.bytes for part in parts) for parts in views)
        return replace(use, parameters=use.parameters + gathered, peak=use.peak + gathered)
