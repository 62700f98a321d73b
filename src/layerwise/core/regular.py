"""Blocks of a regular model run on their own, in any order and more than once.

A model is regular where every call of a cut module gets the output of the call before, and other arguments that depend
on no block (masks, positions). Its forward pass then runs to the first cut, calls stand-ins for the other modules (they
note their arguments), and waits after the last one for its output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.coroutine import Arrival, Pass
from layerwise.core.modes import scratch_buffers
from layerwise.core.randomness import preserved_generators
from layerwise.core.trees import replaced, tensors
from layerwise.errors import LayerwiseError


class BlockByBlock:
    """The passes of one batch through a regular model; takes the place of `Pass`.

    Args:
        cuts: the modules and how to read their outputs, as for `Pass`.
        run: the model's forward pass: from the batch to the logits.
        devices: device types whose autocast is managed.
        device: whose random draws are kept.
        first: the first block.
    """

    severed = None
    skipped: frozenset[int] = frozenset()

    def __init__(
        self,
        cuts: Sequence[tuple[str, nn.Module, Callable[[Any], Tensor]]],
        run: Callable[[Any], Tensor],
        devices: Sequence[str],
        device: torch.device,
        first: Block,
    ):
        self.cuts, self.forward, self.devices, self.device = cuts, run, devices, device
        self.first = first
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        """Arguments of the calls after the first one, with `standin` in place of the output of the call before."""
        self.standin = torch.empty(0, device="cpu")
        self._batch: Any = None
        self._form: Any = None
        """What the first module returned, with `_mark` in place of the teaching tensor."""
        self._mark = torch.empty(0, device="cpu")
        self._pass: Pass | None = None

    def pull(self, index: int, h: Any) -> Tensor:
        """Run block `index`; block 0 takes the whole batch, and the others run with the arguments of the last one.

        Raises:
            LayerwiseError: the model is not regular in this pass.
        """
        if index == 0:
            return self._begin(h)
        if index < len(self.cuts):
            return self.call(index, h, self.cuts[index][1])
        self._collect(h)
        arrived = self._pass if self._pass is not None and self._pass.waits else self._again()
        return arrived.resume(h).out

    def call(self, index: int, h: Tensor, module: nn.Module) -> Tensor:
        """Call a module as that of cut `index` is called, with `h` for the output of the block before."""
        self._collect(h)
        args, kwargs = replaced(self.calls[index], self.standin, h, detach=False)
        return self.cuts[index][2](module(*args, **kwargs))

    def close(self) -> None:
        """End what waits; the model is left as it was."""
        if self._pass is not None:
            self._pass.close()
        self._pass, self._batch, self._form, self.calls = None, None, None, {}

    def _begin(self, batch: Any) -> Tensor:
        self.close()
        self._batch = batch
        self._pass = Pass(self.cuts, self.forward, self.devices, False, self._stand_in, range(1, len(self.cuts)))
        arrived = self._pass.begin(batch)
        self._check(arrived, 0)
        self._form = replaced(arrived.whole, arrived.out, self._mark, detach=True)
        return arrived.out

    def _collect(self, h: Tensor) -> None:
        """Let the pass call the other modules, while something stands in for them, to see with which arguments."""
        last = len(self.cuts) - 1
        if self._pass is None:
            raise LayerwiseError(
                f"block {self.cuts[0][0]!r} has to run before others do; run the network from its start."
            )
        if self.calls or last == 0:
            return
        self.standin = h.detach()
        with preserved_generators(self.device):
            self._check(self._pass.resume(self.standin), last)
        for i in range(1, last + 1):
            self._check(Arrival(i if i in self.calls else -1, None), i)

    def _stand_in(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = tensors((args, kwargs))
        if not any(t is self.standin for t in given):
            raise _irregular(self.cuts[index][0], "does not get the output of the call before as it is")
        if any(t.grad_fn is not None for t in given):
            raise _irregular(self.cuts[index][0], "gets an argument that depends on parameters outside it")
        if index in self.calls:
            raise _irregular(self.cuts[index][0], "is called twice")
        self.calls[index] = args, kwargs
        h = self.standin
        if index == len(self.cuts) - 1:
            assert self._pass is not None
            h = self._pass.pause(index, self.standin)
        return replaced(self._form, self._mark, h, detach=False)

    def _again(self) -> Pass:
        """A pass that waits after the last cut, as the one of the batch has been there already."""
        last = len(self.cuts) - 1

        def stand_in(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            h = self.standin if index < last else found.pause(index, self.standin)
            return replaced(self._form, self._mark, h, detach=False)

        if self._pass is not None:
            self._pass.close()
        found = self._pass = Pass(self.cuts, self.forward, self.devices, False, stand_in, range(last + 1))
        if self.first.before is not None:
            self.first.before()
        # What comes before the last cut has run in this step: it draws and moves nothing now.
        with torch.no_grad(), preserved_generators(self.device), scratch_buffers(self.first.places()):
            self._check(found.begin(self._batch), last)
        return found

    def _check(self, arrived: Arrival, wanted: int) -> None:
        if arrived.index != wanted:
            raise _irregular(self.cuts[wanted][0], "is left out, or called out of order")


def _irregular(name: str, how: str) -> LayerwiseError:
    return LayerwiseError(
        f"block {name!r} {how}, so that the blocks cannot be run on their own; choose a rule such as local_ce."
    )
