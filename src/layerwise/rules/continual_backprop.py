"""Continual backpropagation: hidden units that contribute little are born again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.hidden_units import HiddenUnits, hidden_units
from layerwise.core.layers import seeing_layers
from layerwise.core.pieces import RenewsUnits
from layerwise.core.randomness import derive_seed
from layerwise.core.ranges import Fraction, NonNegativeInt, ProperFraction
from layerwise.core.rule import BatchContext, BlockContext, Signal, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.backprop import Backprop


class UnitHistory(nn.Module):
    """Utility and age of a layer's units, and the fraction of a unit that is due to be replaced.

    Args:
        count: number of units.
        seed: decides the new weights.
    """

    def __init__(self, count: int, seed: int):
        super().__init__()
        self.seed = seed
        # Running statistics: averaged over replicas, and put back where an update is skipped.
        self.register_buffer("running_utility", torch.zeros(count, dtype=torch.float32))
        self.register_buffer("running_age", torch.zeros(count, dtype=torch.float32))
        self.register_buffer("running_due", torch.zeros((), dtype=torch.float32))

    running_utility: Tensor
    running_age: Tensor
    running_due: Tensor

    def follow(self, contribution: Tensor, decay: float) -> None:
        """A batch later: every unit is older by 1, and its utility follows its contribution."""
        self.running_age += 1
        self.running_utility.lerp_(contribution.to(self.running_utility.dtype), 1 - decay)

    def utility(self, decay: float) -> Tensor:
        """The running means without their bias towards zero, `(count,)`; arbitrary at the age of 0."""
        return self.running_utility / (1 - decay**self.running_age).clamp_min(1e-12)

    def choose(self, rate: float, maturity: int, decay: float) -> Tensor:
        """Which units are replaced now, `(count,)`: as many as are due, of least utility, all older than `maturity`.

        >>> history = UnitHistory(3, seed=0)
        >>> history.follow(torch.tensor([2.0, 0.1, 1.0]), decay=0.9)
        >>> [history.choose(rate=0.2, maturity=0, decay=0.9).tolist() for _ in range(2)]
        [[False, False, False], [False, True, False]]
        """
        mature = self.running_age > maturity
        self.running_due += rate * mature.sum()
        number = self.running_due.floor()
        self.running_due -= number
        order = self.utility(decay).masked_fill(~mature, torch.inf).argsort(stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return mature & (rank < number)

    def restart(self, chosen: Tensor) -> None:
        """Units that are born again have no utility yet, and the age of 0."""
        self.running_utility.masked_fill_(chosen, 0)
        self.running_age.masked_fill_(chosen, 0)


class Activities:
    """The message of a step: the activity of hidden units, from where it is seen to where it is used."""

    def __init__(self, units: Sequence[HiddenUnits]):
        self.by_reader = {id(own.reader): own for own in units}
        self.seen: dict[int, Tensor] = {}

    def see(self, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        """Note the activity of the units that a layer reads, from its input."""
        own = self.by_reader.get(id(layer))
        if own is not None:
            self.seen[id(layer)] = own.activity(x)


def units_at(network: Partition, site: int) -> list[HiddenUnits]:
    """Hidden units whose reader is at a site."""
    return [units for units in hidden_units(network) if units.site == site]


@dataclass(frozen=True)
class ContinualBackprop(RenewsUnits, Backprop):
    r"""Backpropagation that replaces hidden units of little utility, so that a network keeps its ability to learn.

    A unit j is an output of a linear layer or convolution that one other layer reads, through activations, norms and
    pooling. Its utility is a running mean of what it contributes,

    $$u_j \leftarrow \eta\, u_j + (1 - \eta)\, \langle |h_j| \rangle\, \langle |w_{kj}| \rangle_k$$

    with activity $h_j$ at the input of the reader and outgoing weights $w_{kj}$. After every step the units of a layer
    that are older than `maturity` add $\rho$ each to what is due. For each whole unit that is due, the mature one of
    least $u_j / (1 - \eta^{age})$ is born again: incoming weights uniform in $\pm 1/\sqrt{n}$ for n inputs, bias and
    outgoing weights 0, utility and age 0, and the optimizer's state of all these weights 0.

    With `replacement_rate=0` this is backpropagation, bit for bit.

    >>> ContinualBackprop().groups(blocks=3)
    [range(0, 4)]
    """

    replacement_rate: Fraction = 1e-4
    """Share rho of a layer's mature units that is replaced per step."""
    maturity: NonNegativeInt = 100
    """Batches that a unit sees before it can be replaced."""
    decay: ProperFraction = 0.99
    """Factor eta of the running mean of a unit's contribution."""

    name: ClassVar[str] = "continual_backprop"
    boundary: ClassVar[str] = "activations forward; gradients backward through every block"
    reads_logits: ClassVar[bool] = False
    begins_with_batch: ClassVar[bool] = True
    whole_batch: ClassVar[str] = "measures its units on the whole batch"
    source: ClassVar[str] = (
        "Dohare et al., Loss of plasticity in deep continual learning, Nature 632 (2024); units of any chain of "
        "layers, torch's initial weights: our reading"
    )
    restrictions: ClassVar[str] = (
        "Needs hidden units: layers in a chain of modules, or in modules that torch.fx can trace. The optimizer's "
        "state has to be moments of the gradient, one number per weight."
    )

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """Utilities and ages of the units that are read at the site."""
        assert site.network is not None
        if site.is_head and not hidden_units(site.network):
            raise LayerwiseError(
                "continual_backprop finds no hidden units in the network: no linear layer or convolution is read by "
                "another one alone; wrap the model as nn.Sequential of its parts, or choose backprop."
            )
        units = units_at(site.network, site.index)
        seed = torch.initial_seed()  # that of the learner and the site, the same on every replica
        return nn.ModuleList(UnitHistory(own.count, seed) for own in units) if units else None

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch, and a place for the units' activities."""
        sees = ctx.training and self.replacement_rate > 0
        return ctx.x, Activities(hidden_units(ctx.network)) if sees else None

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block, and look at what its layers read."""
        if not isinstance(message, Activities):
            return block(h)
        with seeing_layers(block, message.see):
            return block(h)

    def signal(self, ctx: BlockContext) -> Signal:
        """The task's loss at the head; utilities follow what the units contribute."""
        site, message = ctx.site, ctx.message
        if isinstance(message, Activities) and isinstance(ctx.auxiliary, nn.ModuleList) and ctx.learns:
            assert site.network is not None
            for history, units in self._histories(site.network, site.index, ctx.auxiliary):
                history.follow(message.seen.pop(id(units.reader)) * units.outgoing(), self.decay)
        return replace(super().signal(ctx), message=None if site.is_head else message)

    def renew(
        self, network: Partition, auxiliary: Mapping[int, nn.Module], step: int
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """Replace the units that are due."""
        renewed: list[tuple[Tensor, Tensor]] = []
        if self.replacement_rate == 0:
            return renewed
        # From the last layer to the first: new incoming weights do not undo outgoing ones that have become zero.
        for site, histories in reversed([*auxiliary.items()]):
            for place, (history, units) in reversed([*enumerate(self._histories(network, site, histories))]):
                chosen = history.choose(self.replacement_rate, self.maturity, self.decay)
                if chosen.device.type == "cpu" and not bool(chosen.any()):
                    continue  # on an accelerator this would wait for it
                draw = torch.Generator(chosen.device).manual_seed(derive_seed(history.seed, "reborn", step, place))
                renewed += units.renew(chosen, draw)
                history.restart(chosen)
        return renewed

    def _histories(self, network: Partition, site: int, histories: Any) -> list[tuple[UnitHistory, HiddenUnits]]:
        """The units at a site whose weights all learn, with their histories."""
        pairs = zip(histories, units_at(network, site), strict=True)
        return [(history, units) for history, units in pairs if all(p.requires_grad for p in units.parameters())]
