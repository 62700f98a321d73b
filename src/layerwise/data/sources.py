"""Sources of samples: uint8 tensors in memory, or image files that are decoded on demand."""

import copy
import hashlib
import json
import os
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from layerwise.data.machine import cache_folder
from layerwise.data.pictures import (
    DEEP_MODES,
    GREY_MODES,
    Header,
    ImageFormat,
    decode,
    pick_ground,
    read_header,
    refusal,
    stack,
)
from layerwise.data.rows import Rows
from layerwise.errors import LayerwiseError
from layerwise.files import check_regular

SAMPLED = 1024  # number of images whose headers decide the format of a data set
CHUNK = 256  # images decoded per task
PREFETCH = 4  # batches decoded ahead of the one in use
WORKERS = min(4, os.cpu_count() or 1)  # decoding threads: PIL decodes outside the interpreter lock
DECODING = 2  # version of the decoding; images cached by another version are decoded again
GROUND_SAMPLE = 256  # number of transparent images that decide their background


class Source(ABC):
    """Labelled samples, read by index: images, or data in their layout.

    Attributes:
        labels: int64 (N,) of classes; whole numbers (N, T) of tokens; float32 (N, D) of numbers, (N, K) of several
            labels; uint8 (N, H, W) of pixels, 255 for those that are ignored.
        shape: (C, H, W) of every image.
        whole: whether the samples belong together, so that one batch holds them all, in order.
        pictures: whether the samples are pictures, which may be augmented.
        dtype: int64 for tokens; uint8 for pixels, whose mean and std are on a scale where 255 is 1 (pixels of more than
            8 bits are float32 from 0 to 255); or float64 for other numbers.
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
        """The samples at `indices` (int64 (B,)): images (B, C, H, W) from 0 to 255, labels int64 (B,)."""

    @abstractmethod
    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch` of each item of `indices`, in order."""

    @abstractmethod
    def subset(self, indices: Tensor) -> "Source":
        """The samples at `indices` (int64 (M,)) as a source of their own."""

    @abstractmethod
    def to(self, device: torch.device) -> "Source":
        """The source with its pixels, if any, on `device`."""

    def blank(self) -> Tensor:
        """A sample of zeros as it comes in a batch, (1, C, H, W)."""
        return torch.zeros(1, *self.shape, device="cpu")

    @property
    def checked_labels(self) -> Tensor:
        """The labels whose values a run checks before it begins: all of them."""
        return self.labels

    def without_images(self) -> "Source":
        """Only the labels; the pixels, if it holds any, are not kept."""
        return self

    def relabelled(self, labels: Tensor) -> "Source":
        """The same images with other labels, int64 (N,)."""
        other = copy.copy(self)
        other.labels = labels
        return other


class InMemorySource(Source):
    """Images that are kept decoded in memory.

    Args:
        images: uint8 (N, C, H, W), or float32 on the same scale from 0 to 255.
        labels: int64 (N,).

    Raises:
        LayerwiseError: images and labels do not fit each other.

    `subset`, `to` and `without_images` of a subclass return that subclass.

    >>> source = InMemorySource(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    >>> images, labels = source.batch(torch.tensor([2, 0]))
    >>> images.shape, labels.tolist()
    (torch.Size([2, 1, 8, 8]), [1, 0])
    """

    def __init__(self, images: Tensor, labels: Tensor):
        # Arrays of numpy too; `as_tensor` would bring tensors to the default device.
        images, labels = (t if isinstance(t, Tensor) else torch.as_tensor(t, device="cpu") for t in (images, labels))
        if images.ndim != 4 or labels.shape[:1] != images.shape[:1]:
            raise LayerwiseError(
                f"images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)} are not samples; "
                "give images (N, C, H, W) and labels (N,)."
            )
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
    """Images that are decoded on demand.

    `batches` decodes up to 4 batches ahead in background threads; neither that nor the number of threads changes
    what it gives.

    Args:
        rows: the undecoded images.
        labels: int64 (N,), the labels of the samples.
        form: what every image is converted, resized and cropped to.
        chosen: int64 (N,), the row of each sample; default all rows.

    Raises:
        LayerwiseError: a requested image cannot be decoded.
    """

    def __init__(self, rows: Rows, labels: Tensor, form: ImageFormat, chosen: Tensor | None = None):
        self.rows = rows
        self.labels = labels
        self.form = form
        self.chosen = torch.arange(len(rows), device="cpu") if chosen is None else chosen
        self.shape = form.shape

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = stack([_pixels(self.rows, row, self.form)[0] for row in self.chosen[indices].tolist()], self.form)
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
    """The format that fits most of the images, and the estimated bytes of all of them when decoded.

    It follows from the headers of up to 1,024 evenly spaced images, and from the pixels of those that may be
    transparent. A `size` in pixels replaces the common size.
    """
    seen = _sampled_headers(rows)
    grey = sum(header.mode in GREY_MODES for header in seen.values())
    mode = "RGB"
    if 2 * grey > len(seen):
        mode = "F" if any(header.mode in DEEP_MODES for header in seen.values()) else "L"
    sizes = [header.size for header in seen.values()]
    width, height = (size, size) if size else Counter(sizes).most_common(1)[0][0]
    pixels = width * height if size else sum(w * h for w, h in sizes) / len(sizes)
    clear = [row for row, header in seen.items() if header.transparent]
    form = ImageFormat(mode, height, width, _ground(rows, clear[:: max(1, len(clear) // GROUND_SAMPLE)]))
    return form, round(len(rows) * pixels * form.shape[0] * form.dtype.itemsize)


def notes_on_colours(rows: Rows, what: str) -> list[str]:
    """What to tell about images whose colours have more bits than are read.

    Args:
        rows: the images; the headers of up to 1,024 are looked at.
        what: their name in the note, such as "train images".
    """
    seen = _sampled_headers(rows)
    deep = sum(header.deep_colours for header in seen.values())
    return [f"{deep} of {len(seen)} {what} have more than 8 bits per colour, of which the upper 8 are read"] * bool(
        deep
    )


def _sampled_headers(rows: Rows) -> dict[int, Header]:
    return {row: _header(rows, row) for row in range(0, len(rows), max(1, len(rows) // SAMPLED))}


def decoded(rows: Rows, form: ImageFormat) -> tuple[Tensor, dict[str, int]]:
    """All images (N, C, H, W), and to how many of them `pictures.decode` did each of the things that it reports.

    They are kept in the user's cache (`$XDG_CACHE_HOME/layerwise` or `~/.cache/layerwise`) under a key of the format
    and of the names, sizes and times of the files; a cache that cannot be read or written is not used.
    """
    path = _cache_path(rows, form)
    found = _read_cache(path, (len(rows), *form.shape), form.dtype)
    if found is None:
        found = _decode(rows, form)
        _write_cache(path, *found)
    return found


def _decode(rows: Rows, form: ImageFormat) -> tuple[Tensor, dict[str, int]]:
    images = torch.empty(len(rows), *form.shape, dtype=form.dtype, device="cpu")

    def fill(start: int) -> Counter[str]:
        stop = min(start + CHUNK, len(rows))
        pixels, done = zip(*(_pixels(rows, row, form) for row in range(start, stop)), strict=True)
        images[start:stop] = stack(pixels, form)
        return Counter(name for names in done for name in names)

    with ThreadPoolExecutor(WORKERS) as pool:
        counts = list(pool.map(fill, range(0, len(rows), CHUNK)))
    return images, dict(sum(counts, Counter()))


def _header(rows: Rows, row: int) -> Header:
    try:
        return read_header(rows.read(row))
    except Exception as reason:  # PIL raises many kinds of errors for a broken file
        raise refusal(rows.where(row), reason) from reason


def _ground(rows: Rows, chosen: Sequence[int]) -> int:
    row = 0

    def contents() -> Iterator[bytes]:
        nonlocal row
        for row in chosen:
            yield rows.read(row)

    try:
        return pick_ground(contents())
    except Exception as reason:
        raise refusal(rows.where(row), reason) from reason


def _pixels(rows: Rows, row: int, form: ImageFormat) -> tuple[bytes, frozenset[str]]:
    try:
        return decode(rows.read(row), form)
    except Exception as reason:
        raise refusal(rows.where(row), reason) from reason


def _cache_path(rows: Rows, form: ImageFormat) -> Path:
    files = []
    for path in rows.files:
        status = check_regular(path)
        files.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    key = hashlib.sha256(json.dumps([DECODING, tuple(form), rows.image_column, files]).encode()).hexdigest()[:32]
    return cache_folder() / "decoded" / f"{key}.safetensors"


def _read_cache(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, dict[str, int]] | None:
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, "pt") as file:
            images, about = file.get_tensor("images"), file.metadata()
        counts = json.loads(about["done"])
        whole = images.shape == shape and images.dtype == dtype and _checksum(images) == about["crc32"]
        return (images, {str(name): int(count) for name, count in counts.items()}) if whole else None
    except (LayerwiseError, OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
        return None  # missing, damaged or of another version: built again


def _checksum(images: Tensor) -> str:
    return str(zlib.crc32(images.numpy().tobytes()))


def _write_cache(path: Path, images: Tensor, done: dict[str, int]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"crc32": _checksum(images), "done": json.dumps(done)}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file({"images": images}, temporary, about)
        os.replace(temporary, path)
    except (OSError, SafetensorError):  # no space or no permission: the cache is optional
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
