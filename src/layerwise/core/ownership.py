"""Which block of a model that is cut at its calls owns a parameter or buffer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Tied = Literal["last", "first", "frozen"]
"""Who trains a parameter that several blocks use."""


@dataclass(frozen=True)
class Ownership:
    """Names of a model's tensors by the blocks that they belong to."""

    names: list[set[str]]
    """One set per block, the head's last."""
    shared: dict[str, set[int]]
    """Parameters that several blocks use, with the numbers of these blocks."""
    unused: list[str]
    """Parameters that want to learn, and that no block uses."""


def ownership(model: nn.Module, cuts: Sequence[str], used: Mapping[str, set[int]], tied: Tied) -> Ownership:
    """Give every parameter and buffer to a block: that uses it, or in whose module it lies if none does.

    Args:
        model: the model.
        cuts: names of the cuts.
        used: by a tensor's name, the numbers of the blocks that use it; empty before a probe.
        tied: who gets a parameter that several use.
    """
    aliases: dict[int, list[str]] = {}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        aliases.setdefault(id(tensor), []).append(name)
    found = Ownership([set() for _ in range(len(cuts) + 1)], {}, [])
    beside: dict[str, int] = {}  # a counter of training that the probe does not use belongs where its module does
    for name, blocks in used.items():
        for block in blocks:
            beside.setdefault(name.rpartition(".")[0], block)
    learn = dict(model.named_parameters())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        holding = {i for alias in aliases[id(tensor)] if (i := _innermost(cuts, alias)) is not None}
        blocks = set(used.get(name, ())) or holding
        if name not in learn and not blocks and name.rpartition(".")[0] in beside:
            blocks = {beside[name.rpartition(".")[0]]}
        if name in learn and len(blocks) > 1:
            found.shared[name] = blocks
        owner = owner_of(blocks, tied if name in learn else "last")
        if owner is not None:
            found.names[owner].add(name)
        elif not blocks and used and name in learn and tensor.requires_grad:
            found.unused.append(name)
    return found


def owner_of(blocks: set[int], tied: Tied) -> int | None:
    """The one of these blocks that a tensor belongs to; None where nobody trains it.

    >>> owner_of({1, 3}, "last"), owner_of({1, 3}, "frozen"), owner_of({2}, "frozen")
    (3, None, 2)
    """
    if len(blocks) < 2:
        return next(iter(blocks), None)
    return {"last": max(blocks), "first": min(blocks), "frozen": None}[tied]


def _innermost(cuts: Sequence[str], name: str) -> int | None:
    """The innermost cut whose module holds the parameter."""
    holding = [i for i, cut in enumerate(cuts) if name.startswith(cut + ".")]
    return max(holding, key=lambda i: len(cuts[i]), default=None)
