"""Null objects for a learner without replicas or stages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.execution import Alone
from layerwise.core.following import NextBlock
from layerwise.core.groups import Group, Unit
from layerwise.core.rule import Rule
from layerwise.memory.meter import MemoryUse


class OneProcess(Alone):
    """Replaces `Replicas` if only this process trains its blocks, with full parameters.

    Give it to a `Learner` to train alone although `torch.distributed` runs in several processes.
    """

    rank, count = 0, 1

    def check(self, **options: Any) -> None:
        """Accept every option."""

    def check_optimizer(self, optimizer: Any) -> None:
        """Accept every optimizer."""

    def copy_from_first(self, tensors: Iterable[Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Leave the tensors as they are: this process is the first."""

    def adopt(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Leave the units as they are."""

    def resident(self, units: Sequence[Unit]) -> AbstractContextManager[None]:
        """A context in which units can run: always."""
        return nullcontext()

    def release(self) -> None:
        """Nothing is gathered."""

    def to_shard(self, own: Tensor, given: Tensor) -> Tensor:
        """The part of the full tensor `given` that belongs to `own`: all of it."""
        return given

    def to_full(self, own: Tensor, tensor: Tensor) -> Tensor:
        """A tensor that belongs to `own`, in the form in which it is stored."""
        return tensor

    def counted(self, use: MemoryUse, groups: Sequence[Group]) -> MemoryUse:
        """A measured step as it is."""
        return use

    def largest(self, value: int) -> Callable[[], int]:
        """A function that returns the number: there is no other."""
        return lambda: value

    def gather(self, value: Any) -> list[Any]:
        """The value, in a list."""
        return [value]


class WholeNetwork:
    """Replaces a `Stage` if all groups are here, from the images to the head."""

    whole = first = last = True
    borrowed: tuple[str, ...] = ()
    """Names of tensors of other ranks that are needed until the modules of the rule are made: none."""

    def choose(self, rule: Rule, network: Partition, groups: Sequence[range], example: Any) -> range:
        """The groups of this process: all."""
        return range(len(groups))

    def give_back(self, model: nn.Module) -> None:
        """Release borrowed tensors: none."""

    def next_block(self, rule: Rule, network: Partition, sites: range) -> NextBlock:
        """Where modules that follow the next block get its tensors: here."""
        return NextBlock()

    def own(self, tensors: Mapping[str, Tensor], auxiliary: nn.ModuleDict) -> Mapping[str, Tensor]:
        """Those of all tensors that belong to the auxiliary modules here: all."""
        return tensors

    def receive(self) -> tuple[Tensor, Any]:
        """Never called: there is no rank before this one."""
        raise AssertionError("a network that is whole receives nothing")

    def receive_matrix(self) -> Tensor:
        """Never called: the output layer is here."""
        raise AssertionError("a network that is whole receives nothing")

    def send_matrix(self, matrix: Tensor) -> None:
        """Never called: no other rank reads it."""
        raise AssertionError("a network that is whole sends nothing")

    def pass_on(self, h: Any, message: Any, skipped: bool) -> bool:
        """Whether any update of this batch was skipped; there is no rank after this one."""
        return skipped
