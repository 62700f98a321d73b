"""Checkpoints written by several ranks, each a part.

A checkpoint is a safetensors file per rank, and the `state.json` that every checkpoint has. The ranks of
`torch.distributed.checkpoint` exchange pickles, and its index is one; a pickle runs code when it is read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from layerwise.memory.tensorfile import save_file
from layerwise.parallel.ranks import Refused
from layerwise.parallel.serialization import all_gather_values
from layerwise.runs.checkpoint import begin, digest, make_current, not_written, split
from layerwise.runs.writing import flush

Join = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class LocalTensor:
    """The part of a tensor that one rank holds."""

    name: str
    shape: tuple[int, ...]
    """Of the full tensor."""
    offsets: tuple[int, ...]
    """Where the part begins in it."""
    sizes: tuple[int, ...]
    """Shape of the part."""
    bytes: int

    @property
    def key(self) -> str:
        """Name in the file: the tensor's own, with the offset for a shard."""
        return self.name if self.sizes == self.shape else f"{self.name}@{','.join(map(str, self.offsets))}"

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "LocalTensor":
        """The part of a tensor that this rank holds: a shard of a `DTensor`, otherwise all of it."""
        shape, offsets = tuple(tensor.shape), [0] * tensor.dim()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(tensor, DTensor):
            sizes, coordinate = list(shape), tensor.device_mesh.get_coordinate()
            assert coordinate is not None
            for place, count, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
                if isinstance(placement, Shard):  # chunks of equal size; the last ones may be short or empty
                    chunk = -(-sizes[placement.dim] // count)
                    start = min(chunk * place, sizes[placement.dim])
                    offsets[placement.dim] += start
                    sizes[placement.dim] = min(chunk, sizes[placement.dim] - start)
            assert tuple(sizes) == tuple(local.shape)
        return cls(name, shape, tuple(offsets), tuple(local.shape), local.nbytes)


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    join: Join,
    group: dist.ProcessGroup | None,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint of all ranks together, completely or not at all; all wait until it is complete.

    Args:
        folder: of all checkpoints of the run, which every rank sees.
        step: number of finished steps.
        state: of this rank; nested mappings of tensors (also sharded ones), numbers, strings and None.
        join: makes the whole tree from those of all ranks.
        group: of the ranks.
        written: called when the part of this rank is written.

    Raises:
        Refused: on every rank, if one of them could not write.
        RuntimeError: a rank is gone.
    """
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    partial = folder / f"step-{step:09d}.partial"

    def gathered(work: Callable[[], Any]) -> list[Any]:
        """Gather the results of all ranks; if one fails, all fail."""
        try:
            mine = (None, work())
        except Exception as reason:
            mine = (str(reason) or type(reason).__name__, None)
        found = all_gather_values(mine, group)
        for number, (failure, _) in enumerate(found):
            if failure is not None:
                raise Refused(str(not_written(folder, step, OSError(failure))), teller=number)
        return [value for _, value in found]

    tree, tensors = split(state)
    held = [LocalTensor.of(name, tensor) for name, tensor in tensors.items()]

    def plan() -> Any:
        if rank == 0:
            begin(folder, step)
        return json.dumps(tree), [(t.name, t.shape, t.offsets, t.sizes, t.bytes) for t in held]

    found = gathered(plan)
    everyone = [[LocalTensor(*values) for values in rows] for _, rows in found]
    writers = shared_out(everyone)

    def write() -> Any:
        mine = [tensor for tensor in held if writers.get(tensor.key) == rank]
        if not mine:  # other ranks hold everything in this part
            written()
            return None
        path = partial / f"rank-{rank}.safetensors"
        parts = {t.key: tensors[t.name] for t in mine}
        save_file({k: t.to_local() if isinstance(t, DTensor) else t for k, t in parts.items()}, path)
        flush(path)
        about = path.name, digest(path.name, path)
        written()
        return about

    parts = [part for part in gathered(write) if part is not None]

    def finish() -> None:
        if rank == 0:
            trees = [json.loads(text) for text, _ in found]
            about = {"tree": join(trees), "parts": dict(sorted(parts)), "shards": shards_of(everyone)}
            make_current(partial, {**about, "digest": digest(about)})

    gathered(finish)


def shared_out(held: Sequence[Sequence[LocalTensor]]) -> dict[str, int]:
    """Choose the rank that writes each key: if several hold the same, the one with the fewest bytes so far.

    >>> both, one = LocalTensor("a", (2,), (0,), (2,), 8), LocalTensor("b", (1,), (0,), (1,), 4)
    >>> shared_out([[one, both], [both]])
    {'b': 0, 'a': 1}
    """
    holders: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for rank, tensors in enumerate(held):
        for tensor in tensors:
            if tensor.bytes or 0 in tensor.shape:  # nobody writes an empty shard
                holders.setdefault(tensor.key, []).append(rank)
                sizes[tensor.key] = tensor.bytes
    load, writers = [0] * len(held), {}
    for key in sorted(holders, key=lambda key: len(holders[key])):
        writers[key] = min(holders[key], key=lambda rank: load[rank])
        load[writers[key]] += sizes[key]
    return writers


def shards_of(held: Sequence[Sequence[LocalTensor]]) -> dict[str, Any]:
    """Shape and offsets of every tensor that no rank holds completely."""
    shards: dict[str, Any] = {}
    for tensors in held:
        for tensor in tensors:
            if tensor.key != tensor.name and tensor.bytes:
                about = shards.setdefault(tensor.name, {"shape": list(tensor.shape), "offsets": {}})
                about["offsets"][tensor.key] = list(tensor.offsets)
    return shards
