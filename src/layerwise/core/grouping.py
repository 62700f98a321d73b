"""Which blocks are updated together in a training step, as the rule wants it there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.amp import GradScaler

from layerwise.core.engine import Group
from layerwise.core.pieces import groups_at, learns_at
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError


class Grouping:
    """The groups of a learner: its own, unless the rule joins some in an update, or lets them rest.

    Args:
        rule: says at which update blocks share a graph (`groups_at`) and learn (`learns_at`).
        own: the groups that are here, each with its optimizers.
        blocks: number of blocks of the network, without the head.
        scaler: makes the gradient scaler of joined groups.
    """

    def __init__(self, rule: Rule, own: list[Group], blocks: int, scaler: Callable[[], GradScaler]):
        self.rule, self.own, self.blocks, self.scaler = rule, own, blocks, scaler
        self._joined: dict[tuple[range, ...], list[Group]] = {}
        self._resting: dict[tuple[tuple[range, ...], tuple[bool, ...]], list[Group]] = {}
        self._scalers: Mapping[str, Any] = {}
        """States for groups that are not joined yet."""

    def at(self, update: int) -> list[Group]:
        """The groups of an update; the same objects whenever the rule asks for the same.

        Raises:
            LayerwiseError: the rule asks for groups that are not neighbours of its own, joined.
        """
        ranges = tuple(groups_at(self.rule, update, self.blocks))
        if ranges not in self._joined:
            self._joined[ranges] = self._join(ranges)
        groups = self._joined[ranges]
        learns = tuple(learns_at(self.rule, update, group.units[0].site) for group in groups)
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
        if list(ranges) == list(self.rule.groups(self.blocks)):
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
        self._joined, self._resting = {}, {}
