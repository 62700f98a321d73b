"""Backpropagation to a few blocks at a time, which take turns."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from layerwise.core.pieces import LearnsInPart
from layerwise.core.ranges import PositiveInt
from layerwise.core.rule import Locality
from layerwise.rules.backprop import Backprop


@dataclass(frozen=True)
class BlockRota(LearnsInPart, Backprop):
    r"""Backpropagation to one block at a time: the others rest, and keep neither gradients nor optimizer state.

    For `period` updates the blocks of a turn learn from the gradient of the network's loss,

    $$\theta_b \leftarrow \theta_b - \eta\, \mathrm{optimizer}\big(\nabla_{\theta_b} \mathrm{CE}(f(x), y)\big),
      \qquad b \in B_t$$

    then the next ones. With `order="random"` each round of turns is a new permutation of the blocks. When a block's
    turn ends, its optimizer's state is dropped. Blocks before the deepest one of the turn run without a graph.

    >>> rule = BlockRota(period=2, order="up")
    >>> [sorted(rule.sites_at(update, blocks=2)) for update in range(5)]
    [[0, 2], [0, 2], [1, 2], [1, 2], [0, 2]]
    """

    period: PositiveInt = 50
    """Updates of a turn."""
    order: Literal["random", "down", "up"] = "random"
    """Order of the blocks in a round: random | down (from the head) | up."""
    at_once: PositiveInt = 1
    """Blocks that learn in a turn."""
    head: Literal["always", "turn"] = "always"
    """Whether the head learns in every turn, or has a turn of its own."""

    name: ClassVar[str] = "block_rota"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "activations forward; gradients backward down to the block that learns"
    source: ClassVar[str] = (
        "Luo et al., BAdam, arXiv 2404.02827 (2024): head='turn'; Pan et al., LISA, arXiv 2403.17919 (2024): "
        "head='always', at_once=2"
    )
    restrictions: ClassVar[str] = (
        "Memory of a turn grows with the number of blocks after the deepest one that learns. A run should be several "
        "rounds long: period times the number of blocks."
    )

    def sites_at(self, update: int, blocks: int) -> Collection[int]:
        """The blocks of this turn, and the head."""
        sites = list(range(blocks if self.head == "always" else blocks + 1))
        turns = -(-len(sites) // self.at_once)
        round_, turn = divmod(update // self.period, turns)
        if self.order == "down":
            sites.reverse()
        elif self.order == "random":
            drawn = torch.randperm(len(sites), generator=torch.Generator().manual_seed(round_), device="cpu")
            sites = [sites[int(i)] for i in drawn]
        learning = sites[turn * self.at_once : (turn + 1) * self.at_once]
        return [*learning, blocks] if self.head == "always" else learning
