"""A model that was made on the meta device: its weights are made block by block, when a block is first needed."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.drawing import draw_own
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.errors import LayerwiseError

Fill = Callable[[str, nn.Module], None]
"""Writes the tensors that a module itself holds, by the module's name in the model."""


class LateWeights:
    """The weights of a model that are still to be made.

    Until a block needs its tensors they show one number (NaN, or zero) and take no memory. What a module draws depends
    on the seed and on its name alone, so that every process gets the same bits, whatever else it makes.

    Args:
        model: with parameters or buffers that are not made, in whose place tensors of the same sizes are put.
        fill: writes what a module holds; each module draws its weights in its own way if not given.
        seed: of all draws.
        device: where the tensors will be.
    """

    def __init__(self, model: nn.Module, fill: Fill | None, seed: int, device: torch.device):
        self.model, self.fill, self.seed, self.device = model, fill or self._drawn, seed, device
        self._waiting: dict[str, Tensor] = {}
        """What is not made, by its first name."""
        self._made: list[str] = []
        """Names of what was made for a block, which may be released again."""
        self._holder: Block | None = None
        self._followed: list[Block] = []
        instead: dict[int, Tensor] = {}
        replaced = []
        for path, module in model.named_modules():
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    if tensor is not None and is_unmade(tensor):
                        replaced.append(tensor)  # so that no other one gets its id
                        if id(tensor) not in instead:
                            instead[id(tensor)] = self._placeholder(tensor)
                            self._waiting[f"{path}.{name}".removeprefix(".")] = instead[id(tensor)]
                        registry[name] = instead[id(tensor)]  # pyright: ignore[reportArgumentType]

    def follow(self, blocks: Sequence[Block]) -> None:
        """Make the tensors of a block whenever it is about to run, and give up those of the one before."""
        self._followed = list(blocks)
        for block in blocks:
            block.before = functools.partial(self._need, block)

    def make_rest(self, blocks: Sequence[Block]) -> None:
        """Make whatever the blocks still lack, for good; from now on no block is made when it runs."""
        self.give_up()
        while self._followed:
            self._followed.pop().before = None
        self.make(name for block in blocks for name in block.names())

    def _need(self, block: Block) -> None:
        if self._holder is not block:
            self.give_up()
            self._holder, self._made = block, self.make(block.names())

    def give_up(self) -> None:
        """Let the tensors of the block that has run last show nothing again."""
        known = dict([*self.model.named_parameters(), *self.model.named_buffers()]) if self._made else {}
        for name in self._made:
            tensor = known[name]
            tensor.data = _blank(tensor)
            tensor._unmade = True  # pyright: ignore[reportAttributeAccessIssue]
            self._waiting[name] = tensor
        self._made, self._holder = [], None

    @torch.no_grad()
    def make(self, names: Iterable[str]) -> list[str]:
        """Make tensors, those that are not made yet.

        Returns:
            Their names.

        Raises:
            LayerwiseError: nobody knows how.
        """
        made = [name for name in names if name in self._waiting]
        for name in made:
            tensor = self._waiting.pop(name)
            del tensor._unmade  # pyright: ignore[reportAttributeAccessIssue]
            tensor.data = torch.full(tensor.shape, _unwritten(tensor.dtype), dtype=tensor.dtype, device=self.device)
        with preserved_generators(self.device):
            for path, module in self._holding(set(made)):
                seed_generators(derive_seed(self.seed, "weights", path), self.device)
                self.fill(path, module)
        known = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        for name in made:
            tensor = known[name]
            if tensor.numel() and _is_unwritten(tensor):
                raise LayerwiseError(
                    f"{name!r} of a model on the meta device was not written by its "
                    f"{type(self.model.get_submodule(name.rpartition('.')[0])).__name__}; give that a "
                    "reset_parameters() that writes it, or give weights=, a function of a module's name and the module."
                )
        return made

    def _holding(self, names: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
        """The modules that hold these tensors, and those that hold nothing else, the inner ones first."""
        every = dict([*self.model.named_parameters(), *self.model.named_buffers()])

        def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
            prefix = path + "." if path else ""
            inside = [name for name in every if name.startswith(prefix)]
            if not any(name in names for name in inside):
                return
            for name, child in module.named_children():
                yield from walk(prefix + name, child)
            if all(name in names for name in inside) or any(n in names and "." not in n[len(prefix) :] for n in inside):
                yield path, module

        return walk("", self.model)

    def _drawn(self, path: str, module: nn.Module) -> None:
        draw_own(module, self.model)

    def _placeholder(self, tensor: Tensor) -> Tensor:
        found = _blank(torch.empty(0, dtype=tensor.dtype, device=self.device), tensor.shape)
        if isinstance(tensor, nn.Parameter):
            found = nn.Parameter(found, tensor.requires_grad)
        vars(found).update(vars(tensor), _unmade=True)
        return found


class NotLate:
    """In place of `LateWeights`: all weights are there."""

    def follow(self, blocks: Sequence[Block]) -> None:
        """Nothing is to be made."""

    def make_rest(self, blocks: Sequence[Block]) -> None:
        """Nothing is to be made."""

    def make(self, names: Iterable[str]) -> list[str]:
        """Nothing is to be made."""
        return []


def is_late(model: nn.Module) -> bool:
    """Whether a model has tensors that are not made."""
    return any(is_unmade(tensor) for tensor in (*model.parameters(), *model.buffers()))


def is_unmade(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, or was, and a learner that came to nothing has left it unmade."""
    return tensor.is_meta or getattr(tensor, "_unmade", False)


def _unwritten(dtype: torch.dtype) -> float | int | bool:
    """What fills a tensor before it is written."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).min


def _is_unwritten(tensor: Tensor) -> bool:
    """Whether anything of a tensor was not written; of whole numbers, whether nothing was."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return tensor.dtype != torch.bool and bool((tensor == _unwritten(tensor.dtype)).all())


def _blank(tensor: Tensor, shape: torch.Size | None = None) -> Tensor:
    """One number in a storage of its own, shown in every place."""
    number = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full((), number, dtype=tensor.dtype, device=tensor.device).expand(shape or tensor.shape)
