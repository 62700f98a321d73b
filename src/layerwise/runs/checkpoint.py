"""Checkpoints: safetensors + JSON, no pickle; written completely or not at all, verified when read.

A checkpoint is a folder `step-<number>` with two files: `state.safetensors` holds the tensors, `state.json`
everything else, the tree that joins both, and the digest of both. One that several ranks have written
(`layerwise.runs.distributed_checkpoint`) has a safetensors file per rank, and `state.json` holds a digest of each.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from layerwise.errors import LayerwiseError, short, why
from layerwise.files import check_regular, kind_of, shown
from layerwise.memory.mmap import map_file, tensor_at
from layerwise.memory.tensorfile import TYPES, save_file
from layerwise.records import Count, convert, parse_json, read_json
from layerwise.runs.writing import FAILURES, flush, replaced

KEPT = 2  # complete checkpoints to keep: the newest, and one to fall back to


class CorruptCheckpoint(LayerwiseError):
    """A checkpoint folder is incomplete or its bytes have changed."""


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint of nested mappings of tensors, numbers, strings and None.

    Everything goes to a temporary folder that is renamed when complete, so a crash or a full disk at any
    moment leaves the checkpoints before it as they were.

    Args:
        folder: folder of all checkpoints of a run.
        step: number of finished steps; the name of the new checkpoint.
        state: string keys at every level.

    Raises:
        LayerwiseError: the disk is full or the folder is not writable.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(Path(folder), 7, {"weight": torch.ones(2), "steps": 7})
    ...     load(path)
    {'weight': tensor([1., 1.]), 'steps': 7}
    """
    tree, tensors = split(state)
    try:
        partial = begin(folder, step)
        save_file(tensors, partial / "state.safetensors")
        about = {"tree": tree, "digest": digest(tree, partial / "state.safetensors")}
        return make_current(partial, about)
    except FAILURES as reason:
        raise not_written(folder, step, reason) from reason


def begin(folder: Path, step: int) -> Path:
    """The temporary folder of a new checkpoint, empty."""
    partial = folder / f"step-{step:09d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def make_current(partial: Path, about: Mapping[str, Any]) -> Path:
    """Complete a checkpoint by its `state.json`, rename it, and drop the oldest."""
    final = partial.with_suffix("")
    (partial / "state.json").write_text(json.dumps(about))
    for file in partial.iterdir():
        flush(file)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    flush(final.parent)
    for old in complete(final.parent)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def not_written(folder: Path, step: int, reason: BaseException) -> LayerwiseError:
    """Explain why a checkpoint could not be written, and remove the incomplete one."""
    final = folder / f"step-{step:09d}"
    shutil.rmtree(final.with_suffix(".partial"), ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()  # if this was to be the first one
    last = latest(folder)
    kept = f"; the last complete one is {last}" if last else ""
    return LayerwiseError(
        f"could not write the checkpoint {final} ({why(reason)}){kept}; free space or choose another --out."
    )


def load(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint and verify its digest; tensors are on the host.

    Args:
        path: of the checkpoint.
        mapped: leave the bytes in the file until they are read; not to be changed.

    Raises:
        CorruptCheckpoint: a file is missing, truncated or changed, or was not written by this program.
        LayerwiseError: there is no permission to read a file.
    """
    try:
        return _load(path, mapped)
    except CorruptCheckpoint:
        raise
    except (LayerwiseError, *FAILURES, ValueError, RecursionError, MemoryError, RuntimeError) as reason:
        if isinstance(reason, PermissionError) or isinstance(reason.__cause__, PermissionError):
            raise LayerwiseError(
                f"the checkpoint {shown(path)} cannot be read (Permission denied); give yourself permission to read it."
            ) from reason
        raise _damaged(path, why(reason).removesuffix(".")) from reason


ADVICE = "take an older checkpoint"


class Shards(TypedDict):
    """A tensor in several files: its shape, and where each shard begins."""

    shape: list[Count]
    offsets: dict[str, list[Count]]


class About(TypedDict):
    """The fields of `state.json`; the last two only if several ranks have written the checkpoint."""

    digest: str
    tree: dict[str, Any]
    parts: NotRequired[dict[str, str]]
    shards: NotRequired[dict[str, Shards]]


def _damaged(path: Path, reason: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"the checkpoint {shown(path)} is damaged: {reason}.")


def _load(path: Path, mapped: bool) -> dict[str, Any]:
    about = read_json(path / "state.json", Any, ADVICE)
    convert(about, About, "state.json", ADVICE)  # the digest covers all fields that were read, known or not
    said = about.pop("digest")
    parts = about.get("parts")
    for name in parts or {}:
        if not re.fullmatch(r"[\w-]+\.safetensors", name):
            raise _damaged(path, f"it names the file {short(name)}")
    files = ["state.safetensors"] if parts is None else list(parts)
    for name in files:
        check_regular(path / name, ADVICE)
    if parts is None:
        whole = digest(about["tree"], path / files[0]) == said
    else:
        whole = digest(about) == said and all(digest(name, path / name) == found for name, found in parts.items())
    if not whole:
        raise _damaged(path, "its bytes do not match their digest")
    tensors: dict[str, Tensor] = {}
    for name in files:
        found = (_map_tensors if mapped else load_file)(path / name)
        if twice := found.keys() & tensors.keys():
            raise _damaged(path, f"two files hold the tensor {short(min(twice))}")
        tensors |= found
    for name, shards in (about.get("shards") or {}).items():
        whole_tensor = _assembled(path, name, shards, tensors)
        if name in tensors:
            raise _damaged(path, f"it holds the tensor {short(name)} twice")
        tensors[name] = whole_tensor
    tree = _join(about["tree"], tensors, used := set[str]())
    if unused := tensors.keys() - used:
        raise _damaged(path, f"nothing refers to its tensor {short(min(unused))}")
    return tree


def _assembled(path: Path, name: str, shards: Mapping[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Join a tensor from its shards, which are taken out of `tensors`.

    Raises:
        CorruptCheckpoint: the shards overlap, or do not fill the tensor.
    """
    shape, offsets = shards["shape"], shards["offsets"]
    if not offsets.keys() <= tensors.keys():
        raise _damaged(path, f"a shard of the tensor {short(name)} is missing")
    parts = [(tensors.pop(key), offset) for key, offset in offsets.items()]
    boxes = [[range(at, at + size) for at, size in zip(o, part.shape, strict=True)] for part, o in parts]
    inside = all(
        len(box) == len(shape) and all(side.start >= 0 and side.stop <= n for side, n in zip(box, shape, strict=True))
        for box in boxes
    )
    apart = all(_apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    count = sum(part.numel() for part, _ in parts)
    if not (parts and inside and apart and count == torch.Size(shape).numel()):
        raise _damaged(path, f"the shards of the tensor {short(name)} do not fill it")
    if len({part.dtype for part, _ in parts}) > 1:
        raise _damaged(path, f"the shards of the tensor {short(name)} are of several types")
    whole = parts[0][0].new_empty(shape)
    for (part, _), box in zip(parts, boxes, strict=True):
        whole[tuple(slice(side.start, side.stop) for side in box)] = part
    return whole


def _apart(a: Sequence[range], b: Sequence[range]) -> bool:
    """Whether two boxes have no element in common."""
    return any(x.stop <= y.start or y.stop <= x.start for x, y in zip(a, b, strict=True)) or any(
        not side for side in (*a, *b)
    )


def complete(folder: Path) -> list[Path]:
    """List the complete checkpoints in `folder`, oldest first; none if there is no such folder.

    Raises:
        LayerwiseError: the folder cannot be read, or is not a folder.
    """
    kind = kind_of(folder, "give yourself the right to read it")
    if kind is None:
        return []
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as reason:
        raise LayerwiseError(
            f"the checkpoints in {shown(folder)} cannot be read ({why(reason)}); repair the folder, then resume."
        ) from reason
    return [folder / name for name in sorted(names) if re.fullmatch(r"step-[0-9]{9,}", name)]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(complete(folder)), None)


def load_latest(folder: Path, mapped: bool = False) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest checkpoint that is not damaged, with a sentence for each damaged one.

    Returns:
        `(None, [])` if there is no checkpoint yet.

    Raises:
        CorruptCheckpoint: there are checkpoints, and all are damaged.
    """
    passed_over = []
    for path in reversed(complete(folder)):
        try:
            found = load(path, mapped)
            return found, [f"{damage.removesuffix('.')}; {path.name} is read in its place" for damage in passed_over]
        except CorruptCheckpoint as damage:
            passed_over.append(str(damage))
    if passed_over:
        raise CorruptCheckpoint(
            f"every checkpoint in {shown(folder)} is damaged ({passed_over[0]}); start the run again."
        )
    return None, []


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file in one step; `about` is its metadata.

    Raises:
        LayerwiseError: the disk is full, the folder is not writable, or no file can have this name.
    """
    with replaced(path) as partial:
        save_file(tensors, partial, about)


def split(state: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into a tree with references instead of tensors, and the tensors."""
    tensors: dict[str, Tensor] = {}
    return _split(state, (), tensors), tensors


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a safetensors file.

    The library checks the header first, so that no tensor lies outside the file or overlaps another one.
    """
    with safetensors.safe_open(path, framework="pt") as checked:  # pyright: ignore[reportPrivateImportUsage]
        names = set(checked.keys())
    with path.open("rb") as file:
        first = 8 + int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(first - 8).decode(), "its header", ADVICE)  # which refuses a duplicate name
        mapped = map_file(file.fileno(), path.stat().st_size, own_changes=True)
    if header.keys() - {"__metadata__"} != names or first % 8:
        raise ValueError("its header is not one that this program writes")
    found = {}
    for name in names:
        about = header[name]
        if about["dtype"] not in TYPES:
            raise ValueError(f"a tensor is of the unknown type {short(about['dtype'])}")
        start = first + about["data_offsets"][0]
        found[name] = tensor_at(mapped, start, tuple(about["shape"]), TYPES[about["dtype"]])
    return found


def _split(tree: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor by a reference: a mapping with the one key `$tensor`; other keys with a `$` get a second."""
    if isinstance(tree, Tensor):
        name = "/".join(path)
        while name in tensors:  # a key that contains a slash
            name += "'"
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, Mapping):
        keys = {key: f"${key}" if str(key).startswith("$") else str(key) for key in tree}
        return {keys[key]: _split(value, (*path, str(key)), tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_split(value, (*path, str(i)), tensors) for i, value in enumerate(tree)]
    return tree


def _join(tree: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    """Rebuild the state of a tree: every reference becomes its tensor, whose name is added to `used`.

    Raises:
        ValueError: a reference to a missing tensor, or a second reference to the same tensor.
    """
    if isinstance(tree, dict):
        if tree.keys() == {"$tensor"}:
            name = tree["$tensor"]
            if not isinstance(name, str) or name not in tensors or name in used:
                raise ValueError(f"it refers to {short(name)}, which is no tensor of its own")
            used.add(name)
            return tensors[name]
        return {key.removeprefix("$"): _join(value, tensors, used) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_join(value, tensors, used) for value in tree]
    return tree


def digest(tree: Any, file: Path | None = None) -> str:
    """BLAKE2b of the bytes of a file, if one is given, and of a tree after them."""
    found = hashlib.blake2b()
    if file is not None:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "blake2b")
    found.update(json.dumps(tree).encode())
    return found.hexdigest()
