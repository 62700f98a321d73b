"""A model seen as gradient-isolated blocks and a head; what it computes stays the same."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.tracing import Chain, cut_graph, cut_sequential, expanded, is_sequential, legal_cuts, listed
from layerwise.errors import LayerwiseError


class Block:
    """A contiguous part of a model: what runs between two cuts.

    A block owns no module. It holds the names of its parameters and buffers inside the model and looks
    them up when asked, so that it stays right when the model is moved, cast, compiled or sharded.

    Attributes:
        name: the cut behind the block (`"head"` for the part behind the last cut).
        run: the function from the block's input tensor to its output tensor.
        before: called before every run, if anything; an offloaded block has to be fetched.
    """

    def __init__(self, name: str, model: nn.Module, run: Callable[[Tensor], Any], names: set[str]):
        self.name = name
        self.run = run
        self.before: Callable[[], None] | None = None
        self._model = model
        self._names = names

    def __call__(self, h: Tensor) -> Tensor:
        """Run the block. Raises LayerwiseError when it returns anything but one tensor."""
        if self.before is not None:
            self.before()
        out = self.run(h)
        if not isinstance(out, Tensor):
            raise LayerwiseError(
                f"block {self.name!r} returns {type(out).__name__}, not one tensor, so nothing can be "
                f"passed on; cut elsewhere: {listed(legal_cuts(self._model))}."
            )
        return out

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Pairs of the parameter's name in the model and the parameter."""
        return (item for item in self._model.named_parameters() if item[0] in self._names)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of the buffer's name in the model and the buffer."""
        return (item for item in self._model.named_buffers() if item[0] in self._names)

    def parameters(self) -> list[nn.Parameter]:
        """The block's parameters, in the model's order."""
        return [parameter for _, parameter in self.named_parameters()]

    def tensor(self, name: str) -> Tensor:
        """The block's parameter or buffer `name` (its name in the model), on the device.

        Raises:
            LayerwiseError: the block has none of that name.
        """
        if self.before is not None:
            self.before()
        for found, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if found == name:
                return tensor
        raise LayerwiseError(f"block {self.name!r} has no tensor {name!r}.")

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where the block's parameters and buffers are held: a module's registry, and the name in it."""
        found = []
        for name in sorted(self._names):
            path, _, last = name.rpartition(".")
            module = self._model.get_submodule(path)
            found.append((module._parameters if last in module._parameters else module._buffers, last))
        return found

    def redrawn(self, device: torch.device) -> nn.Sequential:
        """A module of the block's layers and sizes with weights of its own, drawn by each layer's `reset_parameters`.

        Args:
            device: where it lives; the block itself may be on another one, or on none (`meta`).

        Raises:
            LayerwiseError: the block was traced out of a model, so there is no chain of modules to copy, or a module
                of it holds parameters and cannot draw them anew.

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> Partition(net, ["1", "3"]).blocks[1].redrawn(torch.device("cpu"))
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
        )
        """
        if not isinstance(self.run, Chain):
            raise LayerwiseError(
                f"block {self.name!r} was traced out of {type(self._model).__name__}, so no module can be copied with "
                "new weights; wrap the model as nn.Sequential of its parts."
            )
        made = copy.deepcopy(nn.Sequential(*self.run.modules)).to_empty(device=device)
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                raise LayerwiseError(
                    f"block {self.name!r} holds a {type(module).__name__}, which has no reset_parameters(), so it "
                    "cannot be copied with new weights; give it that method."
                )
        return made

    def __repr__(self) -> str:
        return f"Block({self.name!r}, {sum(p.numel() for p in self.parameters())} parameters)"


class Partition(nn.Module):
    """A model seen as `blocks` and a `head`; it computes exactly what the model computes.

    It shares the model's own registries, so parameter names, `state_dict()` keys, `.to()`, `.train()` and
    hooks are the model's. A pickle holds the model and the names of the cuts, no code.

    Attributes:
        model: the model that was cut.
        cuts: names of the modules behind which the model is cut.
        blocks: the blocks, in the order in which they run.
        head: what runs behind the last cut; it maps the last block's output to logits.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[str]):
        super().__init__()
        # One set of dictionaries for both: whatever replaces a child or a parameter in the one does in the other.
        self._modules, self._parameters, self._buffers = (
            model._modules,
            model._parameters,
            model._buffers,
        )
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.__dict__.update(model=model, cuts=tuple(cuts))
        *blocks, head = _cut(model, tuple(cuts))
        self.__dict__.update(blocks=blocks, head=head, _known=dict(model.named_modules(remove_duplicate=False)))
        self.training = model.training

    model: nn.Module
    cuts: tuple[str, ...]
    blocks: list[Block]
    head: Block
    _known: dict[str, nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks and the head: the model's output for `x`, bit for bit."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def train(self, mode: bool = True) -> "Partition":
        """Set training or evaluation mode, on the model itself too."""
        self.model.train(mode)
        self.training = mode
        return self

    def check_modules(self) -> None:
        """Raise LayerwiseError where a module of the model was replaced: its block still runs the old one."""
        now = dict(self.model.named_modules(remove_duplicate=False))
        for name, module in self._known.items():
            if now.get(name) is not module:
                raise LayerwiseError(
                    f"module {name!r} was replaced after the model was cut; call partition(model) again."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return Partition, (self.model, self.cuts)


def _cut(model: nn.Module, cuts: tuple[str, ...]) -> list[Block]:
    """The blocks and the head between `cuts`, checked."""
    if not cuts:
        raise LayerwiseError(f"name at least one cut, out of {listed(legal_cuts(model))}.")
    if len(set(cuts)) < len(cuts):
        raise LayerwiseError(f"a cut is named twice in {list(cuts)}; name each once.")
    known = dict(model.named_modules(remove_duplicate=False))
    for cut in cuts:
        if cut not in known or cut == "":
            raise LayerwiseError(f"unknown cut {cut!r}; legal cuts are {listed(legal_cuts(model))}.")
    if is_sequential(model) and set(cuts) <= {name for name, _ in expanded(model, cuts)}:
        parts = cut_sequential(model, cuts)
    else:
        parts = cut_graph(model, cuts)
    names = [*cuts, "head"]
    blocks = [Block(name, model, run, owned) for name, (run, owned) in zip(names, parts, strict=True)]
    _check_ownership(model, blocks)
    return blocks


def _check_ownership(model: nn.Module, blocks: list[Block]) -> None:
    owner: dict[int, tuple[str, str]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for block in blocks:
        for name in sorted(block._names & tensors.keys()):
            first, first_name = owner.setdefault(id(tensors[name]), (block.name, name))
            if first != block.name:
                raise LayerwiseError(
                    f"the parameter {first_name!r} of block {first!r} is shared with block "
                    f"{block.name!r}, so they cannot be trained apart; cut so that one block holds "
                    f"both, out of {listed(legal_cuts(model))}."
                )
    *_, head = blocks
    if not head.parameters():
        raise LayerwiseError(
            f"nothing behind the last cut {blocks[-2].name!r} has parameters, so there is no head; leave "
            f"that cut out, legal cuts are {listed(legal_cuts(model))}."
        )
