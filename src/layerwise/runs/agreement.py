"""Facts on which all ranks of a run must agree before they begin: options, every sample, and the checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.data import Dataset
from layerwise.data.sources import InMemorySource, Source, StreamedSource
from layerwise.runs import checkpoint
from layerwise.runs.building import DataSignature
from layerwise.runs.options import TrainOptions, to_mapping

READ = 4 * 2**30
"""Up to this many bytes of encoded images, all are read; beyond that, `SAMPLED` of them."""
SAMPLED = 4096


def facts_of_options(
    options: TrainOptions, launch: Mapping[str, Any], device: torch.device, resumed: bool
) -> dict[str, Any]:
    """List the options one by one, so that an error can name a difference.

    Args:
        options: of the run.
        launch: the options of the ranks.
        device: of this rank; its number may differ.
        resumed: whether this continues a run.
    """
    facts = {"resume": resumed, **launch, **_flat(json.loads(json.dumps(to_mapping(options), default=str)))}
    return {f"--{name.replace('_', '-')}": value for name, value in {**facts, "device": device.type}.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[(prefix + name).removesuffix(".name")] = value
    return found


def facts_of_data(dataset: Dataset) -> dict[str, Any]:
    """The format of the data, and digests of the samples and labels of every split.

    Images that are decoded on demand are read from their files: all of them up to 4 GiB, otherwise 4,096, evenly
    spaced.
    """
    facts = {f"the {name} of the data": value for name, value in vars(DataSignature.of(dataset)).items()}
    for part in () if dataset.contents else ("train", "val", "test"):  # a text may be larger than memory
        source: Source | None = getattr(dataset, part)
        if source is not None:
            facts[f"the labels of {part}"] = digest_of_tensors(source.labels)
            facts[f"the samples of {part}"] = digest_of_samples(source)
    if dataset.graph is not None:
        facts["the graph"] = digest_of_tensors(*dataset.graph.buffers())
    return facts


def digest_of_tensors(*tensors: Tensor) -> str:
    """BLAKE2b of shapes, types and values."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of_samples(source: Source) -> str:
    """BLAKE2b of the samples as they are stored: decoded in memory, or encoded on the disk."""
    if isinstance(source, InMemorySource):
        return digest_of_tensors(source.images)
    found = hashlib.blake2b(digest_size=16)
    if isinstance(source, StreamedSource):
        rows, chosen = source.rows, source.chosen.tolist()
        sizes = [file.stat().st_size for file in rows.files]
        found.update(f"{tuple(source.form)} {len(chosen)} {sizes}".encode())
        step = 1 if sum(sizes) <= READ else -(-len(chosen) // SAMPLED)
        for row in chosen[::step]:
            image = rows.read(row)
            found.update(len(image).to_bytes(8, "little"))
            found.update(image)
    else:  # a user's own source
        for images, _ in source.batches(torch.arange(len(source), device="cpu").split(256)):
            found.update(digest_of_tensors(images).encode())
    return found.hexdigest()


def facts_of_checkpoint(folder: Path | None) -> dict[str, Any]:
    """The newest checkpoint of a continued run, and a digest of its content."""
    newest = None if folder is None else checkpoint.latest(folder / "checkpoints")
    if newest is None:
        return {"the checkpoint": None}
    try:
        about = (newest / "state.json").read_bytes()  # it holds the digests of all tensors
    except OSError as reason:
        about = str(reason).encode()
    return {"the checkpoint": [newest.name, hashlib.blake2b(about, digest_size=16).hexdigest()]}
