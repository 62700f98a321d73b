"""The first blocks of a model that is cut at its calls are on other ranks: what is run here in their place.

The forward pass begins with the batch, as on every rank. In place of a module that is elsewhere something of the same
shape is returned, and at the last of them what was received. What lies between the modules runs, so that masks and
positions are there; whatever it computes from parameters of other ranks is NaN, and is used by nobody here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.crossing import Crossing
from layerwise.core.trees import mapped, replaced
from layerwise.errors import LayerwiseError


class Elsewhere:
    """What the modules of earlier ranks would return.

    Args:
        forms: per cut, what its module returns, as tensors without memory, and which of them is passed on.
        before: number of the last module that is elsewhere.
        h: what was received.
    """

    def __init__(self, forms: Sequence[tuple[Any, Tensor]], before: int, h: Tensor):
        self.forms, self.before, self.h = forms, before, h

    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the call of module `index`."""
        form, teaching = self.forms[index]
        passed = self.forms[self.before][1].shape

        def shown(tensor: Tensor) -> Tensor:
            if tensor is teaching and index == self.before:
                return self.h
            # Sides that follow those of what was received, such as the number of samples, do so now.
            alike = len(tensor.shape) == len(passed)
            sides = [
                new if side == old and (alike or i == 0) else side
                for i, (side, old, new) in enumerate(zip(tensor.shape, passed, self.h.shape, strict=False))
            ]
            sides += tensor.shape[len(sides) :]
            number = torch.nan if tensor.is_floating_point() else 0
            return torch.full(sides, number, dtype=tensor.dtype, device=self.h.device)

        return mapped(form, shown)


def form_of(whole: Any, teaching: Tensor) -> tuple[Any, Tensor]:
    """What a module has returned, as tensors without memory, and which of them is passed on."""
    mark = torch.empty_like(teaching, device="meta")
    form = replaced(whole, teaching, mark, detach=True)
    return mapped(form, lambda t: t if t is mark else torch.empty_like(t, device="meta")), mark


def without_memory(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a model holds tensors on the meta device: registries, and the names there."""
    registries = [r for module in model.modules() for r in (module._parameters, module._buffers)]
    return [(r, name) for r in registries for name, tensor in r.items() if tensor is not None and tensor.is_meta]


@contextmanager
def shown_as_nan(places: Sequence[tuple[dict[str, Any], str]], device: torch.device) -> Iterator[None]:
    """A context in which tensors without memory show NaN, in their own shapes and types on a device."""
    found = [(registry, name, registry[name]) for registry, name in places]
    for registry, name, tensor in found:
        number = torch.nan if tensor.is_floating_point() else 0
        blank = torch.full((), number, dtype=tensor.dtype, device=device).expand(tensor.shape)
        registry[name] = nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank
    try:
        yield
    finally:
        for registry, name, tensor in found:
            registry[name] = tensor


def needed(
    crossings: Sequence[Crossing],
    users: Mapping[str, Collection[int]],
    learned: Collection[str],
    names: Sequence[str],
    own: range,
) -> set[str]:
    """Which tensors of other blocks a rank needs to run its own.

    Args:
        crossings: what crosses the cuts.
        users: by the name of a parameter or buffer, the blocks that use it.
        learned: names of the parameters that some block trains.
        names: of the blocks.
        own: the blocks of the rank.

    Raises:
        LayerwiseError: a block here needs what another rank computes with its own parameters, or trains.
    """
    found: set[str] = set()
    for name, blocks in users.items():
        here = sorted(set(blocks) & set(own))
        if here and len(here) < len(blocks):
            if name in learned:
                first, last = names[min(blocks)], names[max(blocks)]
                raise LayerwiseError(
                    f"{name!r} is used by the blocks {first!r} to {last!r}, which are on different ranks, and "
                    "one of them alone would train it; give tied='frozen', or share the blocks out so that one rank "
                    "has both."
                )
            found.add(name)
    for crossing in crossings:
        uses = sorted(set(crossing.used) & set(own))
        if not uses or crossing.made >= own.start or crossing.made < 0:
            continue
        wrong = sorted(crossing.needs & set(learned))
        if crossing.inside or crossing.after or wrong:
            how = f" with {wrong[0]!r}" if wrong else ""
            raise LayerwiseError(
                f"block {names[uses[0]]!r} uses {crossing}, which block {names[crossing.made]!r} on another rank "
                f"computes{how}, and one tensor alone goes from rank to rank; train it in one process, or share the "
                "blocks out so that one rank has both."
            )
        found |= crossing.needs
    return found
