"""Cuts a model into gradient-isolated blocks and a head, as functions or at its calls."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerwise.core.blocks import Partition
from layerwise.core.calls import CallPartition
from layerwise.core.chains import check_model, expanded, is_sequential, listed
from layerwise.core.cost import balanced_ends, operations
from layerwise.core.cut_names import Unordered, automatic_cuts, has_matrix, has_patterns, matching, spaced
from layerwise.core.keeping import put_back
from layerwise.core.modes import evaluation_mode
from layerwise.core.ownership import Tied
from layerwise.core.ranges import check_ranges
from layerwise.core.reading import Output, Read, arguments
from layerwise.core.tracing import possible_cuts
from layerwise.errors import LayerwiseError


def partition(
    model: nn.Module,
    cuts: Sequence[str] | str | None = None,
    *,
    blocks: int | None = None,
    example: Tensor | None = None,
    layout: Mapping[str, str] | str | None = None,
) -> Partition:
    """Cut a model into gradient-isolated blocks and a head.

    Args:
        model: any module with one tensor in and one tensor out. A `nn.Sequential` needs nothing else:
            every child with a weight matrix or kernel starts a block, other children (activation, pooling,
            normalisation) join the block before them, and the last such child is the head. A model may
            name its own cuts in an attribute `block_names`. Any other model is traced with `torch.fx`.
        cuts: names of the modules after which to cut (`["layer1", "layer2.0"]`); what runs after the
            last one is the head. `"layer"` cuts as finely as is possible, `"block"` is the default.
        blocks: join the blocks found to this many, so that the largest number of floating-point
            operations in one block is as small as possible (measured on `example`).
        example: one batch of inputs, needed for `blocks` and for lazy layers; layouts are known at once with it.
        layout: where outputs have batch, channels and positions, if the layers do not show it: a letter per dimension
            (`"BCL"`, `"BHWC"`), for all outputs of that many dimensions, or by name of a block or `"input"`.

    Returns:
        The partition; `partition(model)(x)` equals `model(x)` bit for bit.

    Raises:
        LayerwiseError: an unknown cut, a cut that another tensor crosses (a skip connection), parameters
            shared by two blocks, a head without parameters, a model that cannot be traced, more blocks
            than there are places to cut, a model that is wrapped or compiled. The sentence says what to do.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [block.name for block in partition(net).blocks], partition(net).head.name
    (['1', '3'], 'head')
    """
    check_cutting(cuts, blocks, layout)
    if isinstance(model, Partition):
        return model if layout is None else model.with_layout(layout)
    check_model(model)
    materialise(model, example)
    if cuts is None or cuts == "block":
        cuts = _default_cuts(model)
    elif cuts == "layer":
        cuts = _finest_cuts(model)
    elif isinstance(cuts, str):
        cuts = [name.strip() for name in cuts.split(",") if name.strip()]
    if blocks is not None:
        cuts = _balanced(model, cuts, blocks, example)
    return Partition(model, cuts, layout)


def legal_cuts(model: nn.Module) -> list[str]:
    """Names of the modules after which `model` may be cut: one tensor crosses there and no other.

    Found by tracing; where the model cannot be traced, the children of its `nn.Sequential` parts. For a partition they
    are those of its model.

    Raises:
        LayerwiseError: no module, or one that is wrapped or compiled.

    >>> legal_cuts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    ['0', '1']
    """
    model = model.model if isinstance(model, Partition) else model
    check_model(model)
    with put_back(model):
        return possible_cuts(model)


def cut_at_calls(
    model: nn.Module,
    cuts: Sequence[str] | str = "auto",
    *,
    output: Output = None,
    read: Read = None,
    tied: Tied = "last",
    blocks: int | None = None,
    layout: Mapping[str, str] | str | None = None,
) -> CallPartition:
    """Cut any model at the calls of its own modules; its own forward pass runs, nothing is traced.

    Args:
        model: any module. It may take several arguments, keywords, masks, and return anything.
        cuts: names of modules, in the order in which they are called, or patterns (`"model.layers.*"`), whose order
            the first batch shows: a module that is called ends a block with its call. Everything after the last one is
            the head. `"auto"` takes the longest list of blocks, or the parts with weights where there is none. Of names
            that are not given one by one, the last may be the head: then they are no cuts.
        output: where the logits are in the model's output: a function, or the name of an entry. Not needed for a
            tensor, or where the entry is called `logits`.
        read: where the teaching tensor is in a cut module's output, its first tensor of real numbers if not given: a
            function, or one per cut by name.
        tied: who trains a parameter that several blocks use: the `"last"` of them, the `"first"`, or nobody
            (`"frozen"`).
        blocks: keep this many of the cuts, evenly spaced.
        layout: where outputs have batch, channels and positions, where the layers do not tell, see `partition`.

    Raises:
        LayerwiseError: a wrong cut, or a model that cannot be stopped at its calls.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [block.name for block in cut_at_calls(net, ["1", "3"]).blocks]
    ['1', '3']
    """
    check_cutting(cuts, blocks, layout)
    check_model(model)
    if isinstance(model, Partition):
        raise LayerwiseError("the model is cut already; give the model itself, or leave the cuts out.")
    names = automatic_cuts(model) if cuts == "auto" else matching(model, cuts)
    found = CallPartition(model, spaced(names, blocks), output, read, tied, layout)
    if cuts == "auto" or has_patterns(cuts):
        found.__dict__["_unordered"] = Unordered(tuple(names), cuts == "auto", blocks)
    return found


def check_cutting(cuts: Any, blocks: Any, layout: Any) -> None:
    """Raise LayerwiseError if what says where to cut is of the wrong type."""
    if not isinstance(cuts, str | Sequence | None):
        raise LayerwiseError(f"cuts is of type {type(cuts).__name__}; give a name, a pattern, or a list of names.")
    if isinstance(cuts, Sequence) and not all(isinstance(cut, str) for cut in cuts):
        raise LayerwiseError("cuts are names of modules; give words.")
    if type(blocks) is not int:  # how many there can be is told below
        check_ranges(blocks=blocks)
    if not isinstance(layout, str | Mapping | None):
        kind = type(layout).__name__
        raise LayerwiseError(f"layout is of type {kind}; give a layout such as 'BCL', or a mapping from block names.")
    if isinstance(layout, Mapping) and not all(isinstance(part, str) for item in layout.items() for part in item):
        raise LayerwiseError("layout maps block names to layouts such as 'BCL'; give words for both.")


def materialise(model: nn.Module, example: Any) -> None:
    """Let lazy layers learn their sizes from the example."""
    lazy = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if is_lazy(p)]
    if not lazy:
        return
    if example is None:
        raise LayerwiseError(
            f"{lazy[0]!r} belongs to a lazy layer, whose size is not known yet; give example=..., a batch of "
            "inputs, or call the model once."
        )
    with evaluation_mode(model), torch.no_grad():
        args, kwargs = arguments(example[:2] if isinstance(example, Tensor) else example)
        model(*args, **{name: value for name, value in kwargs.items() if name != "labels"})


def _default_cuts(model: nn.Module) -> list[str]:
    names = getattr(model, "block_names", None)
    if names is not None:
        return list(names)
    if is_sequential(model):
        return _weighted_cuts(model, deep=False)
    raise LayerwiseError(
        f"{type(model).__name__} is not a nn.Sequential and names no blocks of its own, so say where to cut it: "
        f"cuts=[...] out of {listed(possible_cuts(model))}; or let cut_at_calls(model) find where, as a Learner does."
    )


def _finest_cuts(model: nn.Module) -> list[str]:
    if not is_sequential(model):
        raise LayerwiseError(
            f'cuts="layer" needs a nn.Sequential, not {type(model).__name__}; name the cuts: '
            f"cuts=[...] out of {listed(possible_cuts(model))}."
        )
    cuts = _weighted_cuts(model, deep=True)
    # A model's own names say where its head begins; a head of several modules is not taken apart.
    names = getattr(model, "block_names", None)
    if names is None:
        return cuts
    order = [name for name, _ in expanded(model, deep=True)]
    end = max(i for i, name in enumerate(order) if f"{name}.".startswith(f"{names[-1]}."))
    last = order[end]
    return [cut for cut in cuts if order.index(cut) < end and cut != last] + [names[-1]]


def _weighted_cuts(model: nn.Module, deep: bool) -> list[str]:
    """Cut before every child with a weight of two or more dimensions; the others join the child before."""
    children = expanded(model, deep=deep)
    starts = [i for i, (_, child) in enumerate(children) if has_matrix(child)]
    if len(starts) < 2:
        raise LayerwiseError(
            f"{type(model).__name__} has {len(starts)} children with weights, and a partition needs at "
            "least two, a block and a head; use a deeper model or name the cuts."
        )
    return [children[start - 1][0] for start in starts[1:]]


def _balanced(model: nn.Module, cuts: Sequence[str], blocks: int, example: Tensor | None) -> list[str]:
    """Choose `blocks` of the cuts so that the costliest block is as cheap as can be."""
    if not 1 <= blocks <= len(cuts):
        raise LayerwiseError(
            f"blocks={blocks} is not possible: the model can be cut into 1 to {len(cuts)} blocks and a head."
        )
    if blocks == len(cuts):
        return list(cuts)
    if blocks == 1:
        return [cuts[-1]]
    if example is None:
        raise LayerwiseError(f"blocks={blocks} is balanced by measured cost; give example=..., a batch of inputs.")
    *cost, _ = operations(Partition(model, cuts), example)
    return [cuts[end - 1] for end in balanced_ends(cost, blocks)]
