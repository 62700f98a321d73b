"""Loads and saves weights in files, block by block."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.drawing import draw_own
from layerwise.core.late import Fill, LateWeights, NotLate, is_late
from layerwise.errors import LayerwiseError
from layerwise.files import check_regular, kind_of, read_text, shown
from layerwise.memory.offload import NotOffloaded, Offload
from layerwise.memory.tensorfile import save_file

Weights = str | Path | Callable[[str, nn.Module], None] | None
INDEX = "model.safetensors.index.json"
ADVICE = "give a safetensors file, or a folder of them"


def late_weights(
    model: nn.Module, weights: Weights, seed: int, device: torch.device | str | None
) -> LateWeights | NotLate:
    """Return an object that makes the weights of a model on the meta device; for other models there is nothing to make.

    Raises:
        LayerwiseError: weights for a model that already has some, or files that cannot be read.
    """
    model = model.model if isinstance(model, Partition) else model
    if not isinstance(model, nn.Module) or not is_late(model):
        if weights is not None:
            raise LayerwiseError(
                "weights= is for a model that was made under torch.device('meta'); leave it out, or load them into "
                "the model."
            )
        return NotLate()
    fill: Fill | None = None
    if isinstance(weights, (str, os.PathLike)):
        fill = FromFiles(model, Path(weights))
    elif callable(weights):
        fill = weights
    elif weights is not None:
        raise LayerwiseError(f"weights is of type {type(weights).__name__}; {ADVICE}, or a function.")
    return LateWeights(model, fill, seed, torch.device("cpu" if device is None else device))


class FromFiles:
    """Fills modules from safetensors files; tensors in no file, such as a table of positions, are made by the module.

    Args:
        model: the whole model.
        path: of a file, or of a folder with files.

    Raises:
        LayerwiseError: there is no such file, a file cannot be read, or a parameter is in no file.
    """

    def __init__(self, model: nn.Module, path: Path):
        self.model, self.path = model, path
        self.files = _files_by_tensor(path)
        self._aliases: dict[int, list[str]] = {}
        for name, tensor in _every_name(model):
            self._aliases.setdefault(id(tensor), []).append(name)
        missing = [
            name for name, p in model.named_parameters() if not any(n in self.files for n in self._aliases[id(p)])
        ]
        if missing:
            raise LayerwiseError(
                f"{shown(path)} holds no tensor {missing[0]!r}, which {type(model).__name__} has; give the weights of "
                "this model."
            )

    def __call__(self, name: str, module: nn.Module) -> None:
        """Fill a module's own tensors."""
        prefix = name + "." if name else ""
        known = dict(_every_name(self.model))
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        found = {key: self._named(f"{prefix}{key}", tensor, known) for key, tensor in own.items()}
        if not all(found.values()):
            draw_own(module, self.model)
        for key, tensor in own.items():
            if (source := found[key]) is not None:
                _read(self.files[source], source, tensor)

    def _named(self, name: str, tensor: Tensor, known: Mapping[str, Tensor]) -> str | None:
        """The name under which the files hold a tensor of the model."""
        names = [name, *(other for other, same in known.items() if same is tensor)]
        return next((n for n in names if n in self.files), None)


def _every_name(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _files_by_tensor(path: Path) -> dict[str, Path]:
    """The file of every tensor."""
    from safetensors import SafetensorError, safe_open

    if kind_of(path, ADVICE) == "folder":
        if kind_of(path / INDEX, ADVICE) == "file":
            try:
                named = json.loads(read_text(path / INDEX, ADVICE))["weight_map"]
                return {str(tensor): path / Path(str(file)).name for tensor, file in named.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as reason:
                raise LayerwiseError(
                    f"{shown(path / INDEX)} is not an index of safetensors files; {ADVICE}."
                ) from reason
        files = sorted(path.glob("*.safetensors"))
    else:
        check_regular(path, ADVICE)
        files = [path]
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:  # pyright: ignore[reportPrivateImportUsage]
                found |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as reason:
            raise LayerwiseError(f"{shown(file)} cannot be read ({reason}); {ADVICE}.") from reason
    if not found:
        raise LayerwiseError(f"{shown(path)} holds no safetensors file; {ADVICE}.")
    return found


def _read(file: Path, name: str, into: Tensor) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore[reportPrivateImportUsage]
            found = opened.get_tensor(name)
            if found.shape != into.shape:
                raise LayerwiseError(
                    f"{name!r} has shape {tuple(found.shape)} in {shown(file)} and {tuple(into.shape)} in the model; "
                    "give the weights of this model."
                )
            into.data.copy_(found)
    except (SafetensorError, OSError) as reason:
        raise LayerwiseError(f"{name!r} cannot be read from {shown(file)} ({reason}); {ADVICE}.") from reason


def save_blocks(network: Partition, offload: Offload | NotOffloaded, folder: str | Path, index: bool) -> None:
    """Write the weights of the blocks here, a file each; see `Learner.save_weights`.

    Args:
        network: the blocks.
        offload: where their tensors are.
        folder: created if it is missing.
        index: whether to write the index, too.

    Raises:
        LayerwiseError: no path, or the folder cannot be written to.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise LayerwiseError(f"the folder is of type {type(folder).__name__}; give the path of a folder.")
    folder, blocks = Path(folder), network.sites
    stored = network.model.state_dict(keep_vars=True)
    first_names = {id(t): name for name, t in reversed([*_every_name(network.model)])}
    owner = {name: i for i, block in enumerate(blocks) for name in block.names()}
    shards: list[dict[str, Tensor]] = [{} for _ in blocks]
    for name, tensor in stored.items():
        if first_names.get(id(tensor), name) == name:  # other names of a shared tensor hold the same
            shards[owner.get(name, 0)][name] = tensor
    files = [f"model-{i + 1:05d}-of-{len(blocks):05d}.safetensors" for i in range(len(blocks))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, shard in zip(files, shards, strict=True):
            here = {name: tensor for name, tensor in shard.items() if not tensor.is_meta}
            if here and len(here) == len(shard):
                partial = folder / f"{file}.partial"
                save_file(offload.to_full(here), partial)
                partial.replace(folder / file)
        if index:
            total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            names = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2)
            (folder / INDEX).write_text(text)
    except OSError as reason:
        raise LayerwiseError(
            f"the weights cannot be written to {shown(folder)} ({reason.strerror or reason}); free space, or choose "
            "another folder."
        ) from reason
