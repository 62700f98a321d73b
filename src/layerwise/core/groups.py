"""Groups of blocks that are updated together: a rule's own, and those that it wants in a single update."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from layerwise.core.blocks import Block
from layerwise.core.contract import groups_of, groups_of_update, learns_in_update, sites_in_update
from layerwise.core.modes import scratch_buffers
from layerwise.core.pieces import LearnsInPart
from layerwise.core.rule import Rule, Site
from layerwise.errors import LayerwiseError


@dataclass
class Unit:
    """A site with what runs and learns there."""

    site: Site
    block: Block
    auxiliary: nn.Module | None
    optimizer: torch.optim.Optimizer | None = None
    """Its own, where sites of one group learn in turn (`LearnsInPart`)."""
    followed: list[str] = field(default_factory=list)
    """Names of the tensors of the next block that the module follows (`FollowsNextBlock`)."""

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the block and of the rule's auxiliary module."""
        return self.block.parameters() + list(self.auxiliary.parameters() if self.auxiliary else [])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The block's under the model's names, then those of the auxiliary module under `auxiliary.` and the site."""
        yield from self.block.named_parameters()
        if self.auxiliary is not None:
            yield from self.auxiliary.named_parameters(f"auxiliary.{self.site.index}")

    def modules(self) -> list[nn.Module]:
        """The modules that hold the parameters of both."""
        return [*self.block.modules(), *(self.auxiliary.modules() if self.auxiliary else ())]

    def buffers(self) -> list[Tensor]:
        """Buffers of both."""
        return [buffer for _, buffer in self._named_buffers()]

    def running(self) -> list[Tensor]:
        """Running statistics: the buffers that are called `running_...`, as torch's norms have it."""
        return [registry[name] for registry, name in self._running]

    @cached_property
    def _running(self) -> list[tuple[dict[str, Any], str]]:
        """Where running statistics are held; a module that is replaced later is refused, a tensor is not."""
        own = self.auxiliary.modules() if self.auxiliary is not None else ()
        places = [*self.block.places(), *((module._buffers, name) for module in own for name in module._buffers)]
        found = {(id(registry), name): (registry, name) for registry, name in places if name.startswith("running_")}
        return [(registry, name) for registry, name in found.values() if isinstance(registry[name], Tensor)]

    @contextmanager
    def on_copies(self) -> Iterator[None]:
        """A context in which the unit runs on copies of its buffers: what a pass moves there is forgotten."""
        if self.block.before is not None:
            self.block.before()  # an offloaded block has nothing to copy until it is fetched
        own = self.auxiliary.modules() if self.auxiliary is not None else ()
        with scratch_buffers([*self.block.places(), *((m._buffers, name) for m in own for name in m._buffers)]):
            yield

    def _named_buffers(self) -> list[tuple[str, Tensor]]:
        return [*self.block.named_buffers(), *(self.auxiliary.named_buffers() if self.auxiliary else [])]


@dataclass(eq=False)
class Group:
    """Neighbouring units that share one graph and one backward pass."""

    units: list[Unit]
    ahead: list[Unit]
    """Units of later groups that extend this group's graph; they are not updated here."""
    parameters: list[nn.Parameter]
    """What may learn here; a parameter that is frozen (`requires_grad` is False) does not, as long as it is."""
    optimizers: list[torch.optim.Optimizer]
    """One, or those of the groups that are joined here; none where nothing learns or all rests: no graph then."""
    scaler: GradScaler
    """Scales the signal where gradients are fp16; does nothing otherwise."""
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Running statistics and what they were before the update, to be put back when it is skipped."""
    checked: bool = False
    """Whether a first update has shown that the signal reaches the blocks."""
    looked: bool = False
    """Whether a first pass has been searched for further terms of a loss."""
    reached: dict[int, nn.Parameter | None] = field(default_factory=dict)
    """By the number of a site, a parameter of its block that gradients reach; none if it was not looked for."""
    broken: bool = False
    """Whether a batch of the current update was not finite; the update is skipped then."""
    resting: list[torch.optim.Optimizer] = field(default_factory=list)
    """Optimizers of parameters that rest while others of the group learn; their state is dropped."""
    first: int = 0
    """The first site that learns, where others rest; those before it run without a graph."""

    @cached_property
    def name(self) -> str:
        """Names of the units, joined."""
        first, last = self.units[0].site.name, self.units[-1].site.name
        return first if first == last else f"{first}..{last}"

    def running(self) -> list[Tensor]:
        """Running statistics of the units."""
        return [buffer for unit in self.units for buffer in unit.running()]

    def free(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def abandon(self) -> None:
        """Forget an update that has failed: its gradients, and that the scaler has seen them."""
        self.broken = False
        self.free()
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()  # otherwise it refuses the next update

    @property
    def learns(self) -> bool:
        """Whether anything learns here now."""
        return bool(self.optimizers) and any(map(_wants_gradient, self.parameters))


_wants_gradient = attrgetter("requires_grad")


class Grouping:
    """The groups of a learner: its own, unless the rule joins some in an update, or lets them rest.

    Args:
        rule: says at which update blocks share a graph (`groups_at`) and learn (`learns_at`).
        own: the groups that are here, each with its optimizers.
        names: of all blocks of the network, the head last.
        scaler: makes the gradient scaler of joined groups.
    """

    def __init__(self, rule: Rule, own: list[Group], names: Sequence[str], scaler: Callable[[], GradScaler]):
        self.rule, self.own, self.names, self.scaler = rule, own, names, scaler
        self._joined: dict[tuple[range, ...], list[Group]] = {}
        self._resting: dict[tuple[tuple[range, ...], tuple[bool, ...]], list[Group]] = {}
        self._parts: dict[frozenset[int], list[Group]] = {}
        self._scalers: Mapping[str, Any] = {}
        """States for groups that are not joined yet."""

    def at(self, update: int) -> list[Group]:
        """The groups of an update; the same objects whenever the rule asks for the same.

        Raises:
            LayerwiseError: the rule asks for groups that are not neighbours of its own, joined, or gives no ranges.
        """
        if isinstance(self.rule, LearnsInPart):
            sites = sites_in_update(self.rule, update, self.names)
            if sites not in self._parts:
                self._parts[sites] = [_in_part(group, sites) for group in self.own]
            return self._parts[sites]
        ranges = tuple(groups_of_update(self.rule, update, self.names))
        if ranges not in self._joined:
            self._joined[ranges] = self._join(ranges)
        groups = self._joined[ranges]
        learns = tuple(learns_in_update(self.rule, update, group.units[0].site) for group in groups)
        if all(learns):
            return groups
        if (ranges, learns) not in self._resting:
            self._resting[ranges, learns] = [
                group if wanted else replace(group, parameters=[], optimizers=[], checked=True)
                for group, wanted in zip(groups, learns, strict=True)
            ]
        return self._resting[ranges, learns]

    def _join(self, ranges: Sequence[range]) -> list[Group]:
        """The groups, put together so that each begins where one of `ranges` does; optimizers stay what they are."""
        if list(ranges) == groups_of(self.rule, self.names):
            return self.own
        units = [unit for group in self.own for unit in group.units]
        starts = [wanted.start for wanted in ranges]
        own = [group.units[0].site.index for group in self.own]
        if not set(starts) <= set(own):
            raise LayerwiseError(f"rule {self.rule.name!r} parts a group in some steps; it can only join neighbours.")
        made = []
        for wanted, stop in zip(ranges, [*starts[1:], len(units)], strict=True):
            parts = [group for group, start in zip(self.own, own, strict=True) if wanted.start <= start < stop]
            group = Group(
                units[wanted.start : stop],
                ahead=units[stop : wanted.stop],
                parameters=[p for part in parts for p in part.parameters],
                optimizers=[optimizer for part in parts for optimizer in part.optimizers],
                scaler=self.scaler(),
            )
            if group.scaler.is_enabled() and group.name in self._scalers:
                group.scaler.load_state_dict(self._scalers[group.name])
            made.append(group)
        return made

    def scalers(self) -> dict[str, Any]:
        """State of the gradient scaler per group."""
        return {group.name: group.scaler.state_dict() for made in (self.own, *self._joined.values()) for group in made}

    def load_scalers(self, states: Mapping[str, Any]) -> None:
        """Continue from `scalers()`."""
        for group in self.own:
            if group.scaler.is_enabled():
                group.scaler.load_state_dict(states[group.name])
        self._scalers = states
        self._joined, self._resting, self._parts = {}, {}, {}


def parameters_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """The parameters that these optimizers update, in their order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def _in_part(group: Group, sites: frozenset[int]) -> Group:
    """The group when the optimizers of these sites alone step; each is of one unit that learns."""
    learning = [u.optimizer for u in group.units if u.optimizer is not None and u.site.index in sites]
    return replace(
        group,
        parameters=parameters_of(learning),
        optimizers=learning,
        resting=[o for o in group.optimizers if o not in learning],
        first=min(sites),
        reached={},  # its own: other sites learn in other turns
    )
