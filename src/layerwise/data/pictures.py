"""Decodes one picture into pixels, in the same way for training, evaluation and prediction."""

import functools
import io
import warnings
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.data.machine import need
from layerwise.errors import LayerwiseError

# Formats that are pictures and nothing else: PIL would run Ghostscript for a file that is EPS inside.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
MAX_PIXELS = 178_956_970  # PIL itself refuses to decode these
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
TURNED = (5, 6, 7, 8)  # values of the EXIF orientation that exchange width and height
PNG = b"\x89PNG\r\n\x1a\n"
GREY_ALPHA_16, RGBA_8 = bytes((16, 4)), bytes((8, 6))  # bits and kind of pixel in the header of a PNG
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two
GROUNDS = {255: "white", 0: "black", 128: "grey"}
NEAR = 48  # levels: closer than this, a drawing can hardly be seen on its background


class ImageFormat(NamedTuple):
    """The format to which every image of a data set is converted."""

    mode: str
    """"L" or "RGB" with 8 bits, or "F": grey with more than 8 bits, as float32 from 0 to 255."""
    height: int
    width: int
    ground: int = 255
    """Grey level of transparent pixels."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3 if self.mode == "RGB" else 1, self.height, self.width)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.mode == "F" else torch.uint8


class Header(NamedTuple):
    """Facts about a picture before it is decoded."""

    mode: str
    size: tuple[int, int]
    """Width and height in pixels, the right way up."""
    transparent: bool
    """Whether it may have transparent pixels."""
    deep_colours: bool
    """Whether its colours have more than 8 bits, of which the upper 8 are read."""


class Unfit(ValueError):
    """A picture is undamaged but cannot be used; the message continues a sentence that begins with its place."""


def read_header(content: bytes) -> Header:
    """Read the facts about a picture, without its pixels."""
    image = open_picture(content)
    deep = _has_deep_colours(image)  # before the EXIF data, for which PIL decodes a PNG
    turned = _orientation(image) in TURNED and image.format != "TIFF"  # PIL turns a TIFF's own size
    size = image.size[::-1] if turned else image.size
    mode = "I;16" if _is_deep_with_alpha(content) else image.mode
    return Header(mode, size, _has_transparency(image), mode not in GREY_MODES and deep)


def decode(content: bytes, form: ImageFormat) -> tuple[bytes, frozenset[str]]:
    """The pixels of one picture in `form`, in (H, W, C) order, and what was done to it.

    EXIF orientation is applied; transparent pixels are laid on the form's ground; 16-bit levels and floats in [0, 1]
    keep their order (65,535 and 1.0 are 255); the largest centred part of the wanted proportions is scaled
    bilinearly; of several frames the first is used.

    Returns:
        Bytes, and which of "converted" (grey to colour or back), "resized", "laid" (on the ground), "frames" apply.

    Raises:
        Unfit: too many pixels, or numbers that are not levels of brightness.
        Exception: whatever PIL raises about a broken file.
    """
    pil, ops = need("PIL.Image"), need("PIL.ImageOps")
    deep_with_alpha = _is_deep_with_alpha(content)
    image = open_picture(_as_rgba(content) if deep_with_alpha else content)
    done = {"frames"} if getattr(image, "is_animated", False) and image.format != "MPO" else set()
    image.load()
    grey, scale = deep_with_alpha or image.mode in GREY_MODES, _scale(image)
    image = upright(image)
    if deep_with_alpha or image.mode in DEEP_MODES:
        if deep_with_alpha:
            levels, clear = _laid(np.asarray(image), form.ground)
            done |= {"laid"} if clear else set()
        else:
            levels = _levels(image, form.ground, *scale)
        image = pil.fromarray(levels if form.mode == "F" else np.rint(levels).astype(np.uint8))
    elif _has_transparency(image):
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            done.add("laid")
        ground = pil.new("RGBA", image.size, (form.ground,) * 3 + (255,))
        ground.alpha_composite(image)
        image = ground.convert("RGB")
    elif image.mode == "LAB":
        image = image.convert("RGB")  # PIL converts CIELAB to nothing else
    if grey != (form.mode != "RGB"):
        done.add("converted")
    if image.mode != form.mode:
        image = image.convert("L").convert("F") if form.mode == "F" else image.convert(form.mode)
    if image.size != (form.width, form.height):
        done.add("resized")
        image = ops.fit(image, (form.width, form.height), pil.Resampling.BILINEAR)
    return image.tobytes(), frozenset(done)


def pick_ground(contents: Iterable[bytes]) -> int:
    """The grey level for transparent pixels that hides least of the visible ones: white, unless they are bright.

    Each picture with a transparent pixel counts alike; of its pixels each counts by its opacity.
    """
    seen = np.zeros(256)
    for content in contents:
        image = open_picture(content)
        image.load()
        if image.mode in DEEP_MODES:
            continue
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), dtype=np.float64)
        if alpha.min() < 255 and alpha.any():
            brightness = np.asarray(image.convert("RGB").convert("L"))
            seen += np.bincount(brightness.ravel(), alpha.ravel(), 256) / alpha.sum()
    hidden = {level: float(seen[max(0, level - NEAR) : level + NEAR + 1].sum()) for level in GROUNDS}
    return min(hidden, key=lambda level: round(hidden[level], 6))


def stack(pixels: Iterable[bytes], form: ImageFormat) -> Tensor:
    """Pictures of `decode` as one tensor (N, C, H, W)."""
    channels, height, width = form.shape
    flat = torch.frombuffer(bytearray(b"".join(pixels)), dtype=form.dtype)
    return flat.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()


def refusal(place: str, reason: Exception) -> LayerwiseError:
    """The error about a picture at `place` that could not be read."""
    if isinstance(reason, LayerwiseError):
        return reason
    if isinstance(reason, Unfit):
        return LayerwiseError(f"{place} {reason}.")
    return LayerwiseError(f"{place} is not a readable image; replace it or take it out.")


def open_picture(content: bytes) -> Any:
    """A picture that is not decoded yet, of a format and size that are allowed."""
    pil = need("PIL.Image")
    try:
        image = pil.open(io.BytesIO(content), formats=_formats())
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as reason:
        raise Unfit(f"has more than the {MAX_PIXELS} pixels that are decoded; scale it down or take it out") from reason
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unfit(f"has {width}x{height} pixels, more than {MAX_PIXELS}; scale it down or take it out")
    if not width * height:
        raise Unfit("has no pixels; replace it or take it out")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    pil = need("PIL.Image")
    pil.init()
    # `_open` has its own limit. It is appended, so that any filter of the user's comes first. It is
    # not undone after each picture, because filters belong to all threads.
    warnings.filterwarnings("ignore", category=pil.DecompressionBombWarning, append=True)
    return tuple(name for name in FORMATS if name in pil.OPEN)


def upright(image: Any) -> Any:
    """A picture turned as its EXIF orientation says."""
    return image if _orientation(image) == 1 else need("PIL.ImageOps").exif_transpose(image)


def _orientation(image: Any) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # PIL raises many kinds of errors; damaged metadata does not make a picture unusable
        return 1


def _has_transparency(image: Any) -> bool:
    return image.mode in ALPHA_MODES or "transparency" in image.info


def _has_deep_colours(image: Any) -> bool:
    """Whether PIL scales the numbers of a colour picture that is not decoded yet down to 8 bits; PNG, TIFF and PPM.

    It names their form (`RGB;16B`), or in a PPM their largest number.
    """
    forms = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in image.tile]
    most = [form[1] for form in forms if image.format == "PPM" and len(form) > 1]
    return any(";16" in str(form[0]) for form in forms if form) or any(number > 255 for number in most)


def _is_deep_with_alpha(content: bytes) -> bool:
    """Whether a picture is a PNG of grey levels and opacities of 16 bits each."""
    return content.startswith(PNG) and content[24:26] == GREY_ALPHA_16


def _as_rgba(content: bytes) -> bytes:
    """A PNG of grey and opacity of 16 bits, as one whose red, green, blue and alpha are these four bytes.

    PIL would give colours of 8 bits. A pixel takes four bytes either way, so that nothing but the header differs.
    """
    header = content[12:24] + RGBA_8 + content[26:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def _laid(pixels: np.ndarray, ground: int) -> tuple[np.ndarray, bool]:
    """Levels, float32 from 0 to 255, of pixels (H, W, 4) of `_as_rgba` on a ground, and whether any is transparent."""
    stored = np.ascontiguousarray(pixels).view(">u2").astype(np.float32) / np.float32(65_535)
    level, opacity = stored[..., 0] * np.float32(255), stored[..., 1]
    return level * opacity + ground * (1 - opacity), bool((opacity < 1).any())


def _scale(image: Any) -> tuple[int, bool]:
    """The largest whole number of a grey picture with more than 8 bits, and whether it is black; tags of a TIFF say so.

    PIL reads the numbers of such a TIFF as they are stored.
    """
    tags = getattr(image, "tag_v2", {})
    bits, kind = (tags.get(tag) for tag in (BITS_PER_SAMPLE, SAMPLE_FORMAT))
    if bits and kind and set(bits) == {8} and set(kind) == {SIGNED}:
        raise Unfit("holds signed numbers of 8 bits; store it with 8 or 16 bits, black as 0")
    deep = image.mode in DEEP_MODES
    most = 2 ** bits[0] - 1 if deep and bits and 8 < bits[0] < 16 else 65_535
    return most, deep and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _levels(image: Any, ground: int, most: int, inverted: bool) -> np.ndarray:
    """Levels of a grey picture with more than 8 bits, float32 from 0 to 255.

    Args:
        image: the picture.
        ground: level of transparent pixels.
        most: its largest whole number.
        inverted: whether that is black.
    """
    stored = np.asarray(image)
    low, high = stored.min(), stored.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # NaN too
            raise Unfit(
                f"holds floating-point numbers from {low:g} to {high:g}; scale them to 0 (black) to 1 (white), or "
                "store whole numbers of 8 or 16 bits"
            )
        levels = stored.astype(np.float32) * np.float32(255)
        return 255 - levels if inverted else levels
    if low < 0 or high > 65_535:
        raise Unfit(f"holds whole numbers from {low} to {high}; store it with 8 or 16 bits, black as 0")
    levels = stored.astype(np.float32) / np.float32(most / 255)
    levels = 255 - levels if inverted else levels
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        levels[stored == clear] = ground
    return levels
