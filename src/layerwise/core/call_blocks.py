"""The blocks of a model that is cut at its calls, and copies of their modules with new weights."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.drawing import draw
from layerwise.errors import LayerwiseError


class Calls(Protocol):
    """What a block needs of its network: its forward pass, which pauses after every block."""

    model: nn.Module
    cuts: tuple[str, ...]
    asked_by: str
    beside: Sequence[Tensor]

    def pull(self, index: int, h: Any) -> Tensor:
        """Run block `index` of the open pass."""
        ...

    def call(self, index: int, h: Tensor, module: nn.Module) -> Tensor:
        """Call another module instead of that of block `index`, with the arguments of the open pass."""
        ...

    def skipped(self, index: int) -> bool:
        """Whether the open pass has skipped the block."""
        ...

    def compile(self, index: int, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wrap the module of block `index`."""
        ...


class CallBlock(Block):
    """A part of a model's forward pass between two cuts.

    It can be called only while its partition has an open pass: once and in order, unless blocks are run one by one.
    """

    def __init__(self, name: str, index: int, network: Calls):
        super().__init__(name, network.model, self._pull, set())
        self.index, self._network = index, network

    def __call__(self, h: Any) -> Tensor:
        """Run the model's own forward pass on to the next cut; `h` is the whole batch for the first block.

        Neither is changed, even if the block begins with an in-place operation.
        """
        if self.before is not None:
            self.before()
        return self._unchanged(self.run, h, self._model.training)

    def probed(self, h: Any) -> Tensor:
        """Run the block on an input that it may change."""
        if self.before is not None:
            self.before()
        return self.run(h)

    def _pull(self, h: Any) -> Tensor:
        return self._network.pull(self.index, h)

    def compile(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Wrap the block's own module; code between the cuts does not change."""
        if self.index < len(self._network.cuts):
            self._network.compile(self.index, wrap)

    @property
    def beside(self) -> Sequence[Tensor]:
        """Single numbers with a history that the model has just returned beside its logits."""
        return self._network.beside if self.index == len(self._network.cuts) else ()

    @property
    def ran(self) -> bool:
        """Whether the current pass has called the block's module; a pass may skip one."""
        return not self._network.skipped(self.index)

    def redrawn(self, device: torch.device) -> nn.Sequential:
        """Copy the block's module with new weights; it is called with the arguments of the current pass.

        Raises:
            LayerwiseError: it cannot draw its weights, or is the first block, which is not a single module.
        """
        network = self._network
        made = copy.deepcopy(network.model.get_submodule(self.name)).to_empty(device=device)
        unable = draw(made, network.model)
        if unable is not None or self.index == 0:
            why = "is the first one" if unable is None else f"holds a {unable.__name__} without reset_parameters()"
            raise LayerwiseError(
                f"rule {network.asked_by!r} copies the layers of block {self.name!r}, which {why}; choose a rule such "
                "as local_ce."
            )
        return self.called(made)

    def called(self, module: nn.Module) -> nn.Sequential:
        """A copy of the block's module, made to be called with the arguments that the current pass gives to it."""
        return nn.Sequential(_Copy(module, self._network, self.index))


class _Copy(nn.Module):
    """A copy of a block's module, in any pass of the network that the block is part of."""

    def __init__(self, module: nn.Module, network: Calls, index: int):
        super().__init__()
        self.module, self.index, self._network = module, index, (network,)

    def forward(self, h: Tensor) -> Tensor:
        """What the module returns to read, for the output `h` of the block before."""
        return self._network[0].call(self.index, h, self.module)
