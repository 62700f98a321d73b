"""Tokens of a text in a file that is mapped into memory, and windows of them as samples."""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from layerwise.core.randomness import derive_seed
from layerwise.data.machine import cache_folder
from layerwise.data.sources import Source
from layerwise.data.tokenizer import Tokenizer
from layerwise.errors import LayerwiseError, why

VERSION = 1  # of the files in the cache
PIECE = 2**24  # bytes of one step of the checksum
ORDER_SEED = 0  # of the order of documents: the same in every run


class TokenSource(Source):
    """Windows of T tokens, one after the other, and as labels the token after each.

    Every token but the first is a label once; what does not fill a window at the end is left out.

    Args:
        inputs: whole numbers (N, T).
        labels: whole numbers (N, T), the tokens that follow.

    >>> source = TokenSource.of(torch.arange(8), 3)
    >>> [part.tolist() for part in source.batch(torch.tensor([1]))]
    [[[3, 4, 5]], [[4, 5, 6]]]
    """

    pictures = False
    dtype = torch.int64

    def __init__(self, inputs: Tensor, labels: Tensor):
        self.inputs, self.labels = inputs, labels
        self.shape = (1, 1, inputs.shape[1])

    @classmethod
    def of(cls, tokens: Tensor, window: int) -> "TokenSource":
        """The windows of a stream of tokens (n,): views, so that nothing is read before it is needed."""
        count = (len(tokens) - 1) // window
        return cls(tokens[: count * window].view(count, window), tokens[1 : count * window + 1].view(count, window))

    def blank(self) -> Tensor:
        return torch.zeros(1, self.shape[2], dtype=torch.int64, device="cpu")

    @property
    def checked_labels(self) -> Tensor:
        """The labels of one window: all come from the tokenizer, and there may be more than fit into memory."""
        return self.labels[:1].long()

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices].long(), self.labels[indices].long()

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.batch, indices)

    def subset(self, indices: Tensor) -> "TokenSource":
        return TokenSource(self.inputs[indices], self.labels[indices])

    def to(self, device: torch.device) -> "TokenSource":
        return self  # the file stays on the host


class Tokens(NamedTuple):
    """The tokens of a split."""

    values: Tensor
    """int16 or int32 (n,), mapped from a file."""
    contents: str
    """Their number and their CRC-32, which identify the text."""


def token_file(pieces: Iterable[str], tokenizer: Tokenizer, key: Any, shuffled: bool) -> Tokens:
    """The tokens of a text, encoded once and kept in the user's cache; no more than a piece is in memory at a time.

    Args:
        pieces: of the text.
        tokenizer: how it is encoded.
        key: identifies what the text is made of, as JSON; if None, nothing is kept.
        shuffled: whether pieces are put into a random order, the same one in every run.

    Raises:
        LayerwiseError: there is no room for the file.
    """
    dtype = np.dtype(np.int16 if len(tokenizer.names) <= 2**15 else np.int32)
    path = None
    if key is not None:
        text = json.dumps([VERSION, tokenizer.digest, shuffled, key])
        path = cache_folder() / "tokens" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.bin"
        if (found := _read(path, dtype)) is not None:
            return found
    try:
        return _write(path, tokenizer.encode_all(pieces), dtype, shuffled)
    except OSError as reason:
        raise LayerwiseError(
            f"the tokens of the text cannot be written ({why(reason)}); free space, or let XDG_CACHE_HOME name a "
            "folder on another disk."
        ) from reason


def _write(path: Path | None, encoded: Iterable[np.ndarray], dtype: np.dtype, shuffled: bool) -> Tokens:
    """Write the file under another name and rename it; an unnamed file if the cache cannot be used."""
    with suppress(OSError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    kept = path is not None and os.access(path.parent, os.W_OK)
    with tempfile.TemporaryDirectory(dir=path.parent if path is not None and kept else None) as folder:
        file = Path(folder) / "tokens"
        ends = _append(file, encoded, dtype)
        values = _mapped(file, ends[-1], dtype)
        if shuffled:
            generator = Generator().manual_seed(derive_seed(ORDER_SEED, "documents"))
            order = torch.randperm(len(ends) - 1, generator=generator, device="cpu").tolist()
            file = file.with_name("shuffled")
            _append(file, (values[ends[place] : ends[place + 1]] for place in order), dtype)
            values = _mapped(file, ends[-1], dtype)
        crc = _checksum(values)
        if path is not None and kept:
            os.replace(file, path)
            _describe(path, len(values), crc)
    return _tokens(values, crc)  # if nothing is kept, the file exists until it is no longer mapped


def _append(path: Path, arrays: Iterable[np.ndarray], dtype: np.dtype) -> list[int]:
    """Write arrays one after the other; returns where each begins, and the end."""
    ends = [0]
    with path.open("wb") as file:
        for tokens in arrays:
            file.write(tokens.astype(dtype).tobytes())
            ends.append(ends[-1] + len(tokens))
    return ends


def _mapped(path: str | Path, count: int, dtype: np.dtype) -> np.ndarray:
    """The numbers of a file; pages are loaded when they are read. Changes would stay in memory; none are made."""
    return np.memmap(path, dtype, mode="c", shape=(count,)) if count else np.empty(0, dtype)


def _checksum(values: np.ndarray) -> int:
    crc, step = 0, PIECE // values.itemsize
    for start in range(0, len(values), step):
        crc = zlib.crc32(values[start : start + step].tobytes(), crc)
    return crc


def _tokens(values: np.ndarray, crc: int) -> Tokens:
    return Tokens(torch.from_numpy(values), f"{len(values)} tokens, CRC-32 {crc:08x}")


def _describe(path: Path, count: int, crc: int) -> None:
    with suppress(OSError):  # without it the file is made again
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps({"count": count, "crc32": crc}))
        os.replace(partial, path.with_suffix(".json"))


def _read(path: Path, dtype: np.dtype) -> Tokens | None:
    """The kept tokens; None if there are none, or not all of them."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        count, crc = int(about["count"]), int(about["crc32"])
        if path.stat().st_size != count * dtype.itemsize:
            return None
        values = _mapped(path, count, dtype)
        return _tokens(values, crc) if _checksum(values) == crc else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
