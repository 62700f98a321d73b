"""Tensors that modules follow (`FollowsNextBlock`), if the next block is on another rank."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwise.core.blocks import Partition
from layerwise.core.following import NextBlock
from layerwise.core.pieces import FollowsNextBlock
from layerwise.core.rule import Rule, Site


class NextBlockOnRank(NextBlock):
    """Tensors of the next block, which the next rank sends back once per update, just before it begins.

    So the last group of a rank has the tensors of the previous update, as in one process. They are sent through the
    host: a message against the direction of the batches must not wait for the batches in a device's queue.

    Args:
        receive: returns the next list of tensors from the next rank.
        send: sends a list of tensors to the previous rank.
        rule: whose modules follow.
        network: all blocks.
        own: the sites of this rank.
    """

    def __init__(
        self,
        receive: Callable[[], Any],
        send: Callable[[list[Tensor]], None],
        rule: Rule,
        network: Partition,
        own: range,
    ):
        self.receive, self.send, self.last = receive, send, own.stop - 1
        self.names = followed(rule, network, own.start - 1)
        self.first = network.blocks[own.start] if self.names else None

    def tensors(self, site: Site, names: list[str]) -> list[Tensor]:
        """The next block's tensors: those of this rank, or what the next rank has sent."""
        if site.index < self.last:
            return super().tensors(site, names)
        return self.receive()

    @torch.no_grad()
    def tell(self) -> None:
        """Send the previous rank the tensors that its last module follows."""
        if self.first is not None:
            self.send(self.followed_here())

    def followed_here(self) -> list[Tensor]:
        """The tensors of the first block here that the previous rank follows."""
        assert self.first is not None
        return self.read(self.first, self.names)


def followed(rule: Rule, network: Partition, index: int) -> list[str]:
    """Names of the next block's tensors that the module at a site follows; none if there is no such site."""
    if not isinstance(rule, FollowsNextBlock) or not 0 <= index < len(network.blocks):
        return []
    return rule.followed(Site(index, len(network.blocks), network.blocks[index].name, network=network))


def bytes_followed(rule: Rule, network: Partition, index: int) -> int:
    """Bytes of the next block's tensors that the module at a site follows."""
    names = followed(rule, network, index)
    places = [network.blocks[index + 1].place(name) for name in names]
    return sum(registry[name].numel() * registry[name].element_size() for registry, name in places)
