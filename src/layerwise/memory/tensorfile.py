"""A safetensors file, written one tensor after the other."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.memory.mmap import release_pages

TYPES = {  # names in the format
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def save_file(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor after the other, so that at most one of them is in memory twice.

    The writer of safetensors needs copies of all tensors at once. Its order is kept: wide types first, so that all
    tensors are aligned. `about` is the file's metadata.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    names, header, end = {dtype: name for name, dtype in TYPES.items()}, {}, 0
    if about:
        header["__metadata__"] = dict(about)
    for name in order:
        if tensors[name].dtype not in names:
            raise LayerwiseError(
                f"the tensor {name!r} is of type {tensors[name].dtype}, for which safetensors has no name; convert it."
            )
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": names[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().to("cpu").contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data)
            release_pages()
