"""Where samples come from: uint8 tensors in memory, or image files that are decoded on demand."""

import copy
import hashlib
import io
import json
import os
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.data.rows import Rows, cache_folder, need
from layerwise.errors import LayerwiseError

SAMPLED = 1024  # images whose headers decide the form of a data set
CHUNK = 256  # images decoded per task
PREFETCH = 4  # batches decoded ahead of the one in use
WORKERS = min(4, os.cpu_count() or 1)  # decoding threads: PIL decodes outside the interpreter lock
BROKEN = (OSError, SyntaxError, ValueError)  # the ways in which PIL says that a file is broken
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "F")


class ImageFormat(NamedTuple):
    """What every image of a data set is turned into: PIL mode ("L" or "RGB"), height and width in pixels."""

    mode: str
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1 if self.mode == "L" else 3, self.height, self.width)


class Source(ABC):
    """Labelled samples, read by index: images, or what is laid out like them.

    Attributes:
        labels: int64 (N,).
        shape: (C, H, W) of every image.
        whole: whether the samples belong together, so that one batch holds them all, in order.
        pictures: whether the samples are pictures, which may be augmented.
        dtype: of the values: uint8 for pixels, of which mean and std count 255 as 1, or float64.
    """

    labels: Tensor
    whole = False
    pictures = True
    dtype = torch.uint8
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels)

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `indices` (int64 (B,)): images uint8 (B, C, H, W) and labels int64 (B,)."""

    @abstractmethod
    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch` of each item of `indices`, in order."""

    @abstractmethod
    def subset(self, indices: Tensor) -> "Source":
        """The samples at `indices` (int64 (M,)) as a source of their own."""

    @abstractmethod
    def to(self, device: torch.device) -> "Source":
        """The source with its pixels on `device`, if it holds any."""

    def without_images(self) -> "Source":
        """The labels alone; the pixels, if it holds any, are not kept."""
        return self

    def relabelled(self, labels: Tensor) -> "Source":
        """The same images with other labels, int64 (N,)."""
        other = copy.copy(self)
        other.labels = labels
        return other


class InMemorySource(Source):
    """Images that are held decoded.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).

    A subclass keeps its kind in `subset`, `to` and `without_images`.

    >>> source = InMemorySource(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    >>> images, labels = source.batch(torch.tensor([2, 0]))
    >>> images.shape, labels.tolist()
    (torch.Size([2, 1, 8, 8]), [1, 0])
    """

    def __init__(self, images: Tensor, labels: Tensor):
        self.images = images
        self.labels = labels
        channels, height, width = images.shape[1:]
        self.shape = channels, height, width

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.batch, indices)

    def subset(self, indices: Tensor) -> "InMemorySource":
        return type(self)(*self.batch(indices))

    def to(self, device: torch.device) -> "InMemorySource":
        return type(self)(self.images.to(device), self.labels.to(device))

    def without_images(self) -> "InMemorySource":
        return type(self)(self.images.to("meta"), self.labels)


class StreamedSource(Source):
    """Images that are decoded when they are asked for.

    `batches` decodes up to 4 batches ahead in background threads; neither that nor the number of threads changes
    what it gives.

    Args:
        rows: the undecoded images.
        labels: int64 (N,), the labels of the samples.
        form: what every image is converted, resized and cropped to.
        chosen: int64 (N,), the row of each sample; default all rows.

    Raises:
        LayerwiseError: when an image that is asked for cannot be decoded.
    """

    def __init__(self, rows: Rows, labels: Tensor, form: ImageFormat, chosen: Tensor | None = None):
        self.rows = rows
        self.labels = labels
        self.form = form
        self.chosen = torch.arange(len(rows)) if chosen is None else chosen
        self.shape = form.shape

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = _stack([_pixels(self.rows, row, self.form)[0] for row in self.chosen[indices].tolist()], self.form)
        return images, self.labels[indices]

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="layerwise-data")
        waiting: deque = deque()
        try:
            for batch in indices:
                waiting.append(pool.submit(self.batch, batch))
                if len(waiting) > PREFETCH:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def subset(self, indices: Tensor) -> "StreamedSource":
        return StreamedSource(self.rows, self.labels[indices], self.form, self.chosen[indices])

    def to(self, device: torch.device) -> "StreamedSource":
        return self


def sample_form(rows: Rows, size: int | None) -> tuple[ImageFormat, int]:
    """The form that fits most of the images, and the estimated bytes of all of them when decoded.

    Judged by the headers of up to 1,024 evenly spaced images. A `size` in pixels stands in for the common size.
    """
    step = max(1, len(rows) // SAMPLED)
    seen = [_header(rows, row) for row in range(0, len(rows), step)]
    grey = sum(mode in GREY_MODES for mode, _ in seen)
    mode = "L" if 2 * grey > len(seen) else "RGB"
    width, height = (size, size) if size else Counter(pixels for _, pixels in seen).most_common(1)[0][0]
    pixels = width * height if size else sum(w * h for _, (w, h) in seen) / len(seen)
    return ImageFormat(mode, height, width), int(len(rows) * pixels * (1 if mode == "L" else 3))


def decoded(rows: Rows, form: ImageFormat) -> tuple[Tensor, int, int]:
    """All images as uint8 (N, C, H, W), the number that had to be resized, and the number converted.

    Kept in the user's cache (`$XDG_CACHE_HOME/layerwise` or `~/.cache/layerwise`) under a key of form and of the
    names, sizes and times of the files; a cache that cannot be read or written is not used.
    """
    path = _cache_path(rows, form)
    found = _read_cache(path, (len(rows), *form.shape))
    if found is None:
        found = _decode(rows, form)
        _write_cache(path, *found)
    return found


def _decode(rows: Rows, form: ImageFormat) -> tuple[Tensor, int, int]:
    images = torch.empty(len(rows), *form.shape, dtype=torch.uint8)

    def fill(start: int) -> tuple[int, int]:
        stop = min(start + CHUNK, len(rows))
        pixels, resized, converted = zip(*(_pixels(rows, row, form) for row in range(start, stop)), strict=True)
        images[start:stop] = _stack(pixels, form)
        return sum(resized), sum(converted)

    with ThreadPoolExecutor(WORKERS) as pool:
        counts = list(pool.map(fill, range(0, len(rows), CHUNK)))
    return images, sum(resized for resized, _ in counts), sum(converted for _, converted in counts)


def _stack(pixels: Iterable[bytes], form: ImageFormat) -> Tensor:
    channels, height, width = form.shape
    flat = torch.frombuffer(bytearray(b"".join(pixels)), dtype=torch.uint8)
    return flat.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()


def _header(rows: Rows, row: int) -> tuple[str, tuple[int, int]]:
    try:
        image = need("PIL.Image").open(io.BytesIO(rows.read(row)))
    except BROKEN as error:
        raise _unreadable(rows, row) from error
    return image.mode, image.size


def _pixels(rows: Rows, row: int, form: ImageFormat) -> tuple[bytes, bool, bool]:
    """One image in `form`: its bytes in (H, W, C) order, and whether it had to be resized or converted."""
    pil, ops = need("PIL.Image"), need("PIL.ImageOps")
    try:
        image = pil.open(io.BytesIO(rows.read(row)))
        image.load()
    except BROKEN as error:
        raise _unreadable(rows, row) from error
    resized, converted = image.size != (form.width, form.height), image.mode != form.mode
    if converted:
        if "transparency" in image.info:  # PIL warns unless a palette with alpha goes through RGBA
            image = image.convert("RGBA")
        image = image.convert(form.mode)
    if resized:  # the largest centred part of the wanted proportions, scaled
        image = ops.fit(image, (form.width, form.height), pil.Resampling.BILINEAR)
    return image.tobytes(), resized, converted


def _unreadable(rows: Rows, row: int) -> LayerwiseError:
    return LayerwiseError(f"{rows.where(row)} is not a readable image; replace it or take it out")


def _cache_path(rows: Rows, form: ImageFormat) -> Path:
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in rows.files]
    key = hashlib.sha256(json.dumps([tuple(form), rows.image_column, files]).encode()).hexdigest()[:32]
    return cache_folder() / "decoded" / f"{key}.safetensors"


def _read_cache(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, int, int] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            images, about = file.get_tensor("images"), file.metadata()
        whole = images.shape == shape and zlib.crc32(images.numpy().tobytes()) == int(about["crc32"])
        return (images, int(about["resized"]), int(about["converted"])) if whole else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # absent, torn or of another make: built anew


def _write_cache(path: Path, images: Tensor, resized: int, converted: int) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"crc32": str(zlib.crc32(images.numpy().tobytes())), "resized": str(resized), "converted": str(converted)}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file({"images": images}, temporary, about)
        os.replace(temporary, path)
    except (OSError, SafetensorError):  # no room, no right: the cache is a convenience
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
