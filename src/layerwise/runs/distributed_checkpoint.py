"""Checkpoints written by several ranks, each its own part, with `torch.distributed.checkpoint`.

Planning, sharded tensors and the agreement of the ranks are torch's. The storage is our own, since torch's keeps
its index in a pickle, which runs code when it is read, and its safetensors storage (torch 2.8) has no index at all:
a safetensors file per rank, and the `state.json` that every checkpoint has.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_together
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from layerwise.parallel.transport import Refused
from layerwise.runs.checkpoint import begin, digest, flush, make_current, not_written, split

Join = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    join: Join,
    group: dist.ProcessGroup | None,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint of all ranks together, whole or not at all; none leaves before it is complete.

    Args:
        folder: of all checkpoints of the run, which every rank sees.
        step: number of finished steps.
        state: this rank's; nested mappings of tensors (also sharded ones), numbers, strings and None.
        join: the whole tree out of those of all ranks.
        group: of the ranks.
        written: called when this rank's part has been written.

    Raises:
        Refused: on every rank, where one of them could not write.
        RuntimeError: a rank is gone.
    """
    tree, tensors = split(state)
    writer = Writer(folder, step, tree, join, written)
    try:
        save_together(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        rank, (reason, _) = min(failed.failures.items())
        if not isinstance(reason, Exception):
            raise reason from None
        raise Refused(str(not_written(folder, step, reason)), teller=rank) from None


class Writer(StorageWriter):
    """A folder with a safetensors file per rank, which is renamed when all have been written."""

    def __init__(self, folder: Path, step: int, tree: Any, join: Join, written: Callable[[], None]):
        self.folder, self.step, self.tree, self.join, self.written = folder, step, tree, join, written
        self.partial = folder / f"step-{step:09d}.partial"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer writes one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No: the folder is given when the writer is made."""
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Rank 0 makes the temporary folder; the others write only after it has planned."""
        if is_coordinator:
            begin(self.folder, self.step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan takes the rank's tree along, as JSON, like the one on the disk."""
        return dataclasses.replace(plan, storage_data=json.dumps(self.tree))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Joins the trees of all ranks; gives each rank a file."""
        self.tree = self.join([json.loads(plan.storage_data) for plan in plans])
        return [dataclasses.replace(plan, storage_data=f"rank-{i}.safetensors") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file with what is on this rank."""
        done: Future[list[WriteResult]] = Future()
        if not plan.items:  # others have all that is here
            done.set_result([])
            return done
        path = self.partial / plan.storage_data
        tensors = {_key(item): planner.resolve_data(item) for item in plan.items}
        save_file({key: t.contiguous() for key, t in tensors.items() if isinstance(t, Tensor)}, path)
        flush(path)
        part = path.name, digest(path.name, path)
        self.written()
        done.set_result([WriteResult(item.index, path.stat().st_size, (part, _key(item))) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0 writes which part has which digest, and which shard lies where; then the checkpoint is current."""
        written = [result for found in results for result in found]
        keys = {result.index: result.storage_data[1] for result in written}
        shards = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata)
            if keys.get(MetadataIndex(name, [0] * len(about.size))) != name:
                offsets = {keys[MetadataIndex(name, chunk.offsets)]: list(chunk.offsets) for chunk in about.chunks}
                shards[name] = {"shape": list(about.size), "offsets": offsets}
        about = {"tree": self.tree, "parts": dict(sorted({result.storage_data[0] for result in written}))}
        about["shards"] = shards
        make_current(self.partial, {**about, "digest": digest(about)})


def _key(item: WriteItem) -> str:
    """Name in the file: the tensor's own, with the offset for a shard."""
    about = item.tensor_data
    assert about is not None  # a state holds tensors alone here
    offset = "" if about.chunk.sizes == about.size else f"@{','.join(map(str, about.chunk.offsets))}"
    return item.index.fqn + offset
