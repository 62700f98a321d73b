"""Pictures of every kind become the right pixels, the same for training and prediction, or an error in one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch

from layerwise import LayerwiseError, data
from layerwise.data.pictures import ImageFormat, decode, read_header, stack

PIL = pytest.importorskip("PIL.Image", reason="the data extra is not installed")
SIDE = 8
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def folder(path, kinds, suffix="png"):
    """An image folder with six copies of each class's encoded picture, or of its list of them."""
    for kind, contents in kinds.items():
        (path / kind).mkdir(parents=True)
        contents = [contents] * 6 if isinstance(contents, bytes) else contents
        for index, content in enumerate(contents):
            (path / kind / f"{index}.{suffix}").write_bytes(content)
    return f"imagefolder:{path}"


def pixels(content, mode="L", side=SIDE, ground=255):
    form = ImageFormat(mode, side, side, ground)
    return stack([decode(content, form)[0]], form)[0]


def fromarray(array):
    return PIL.fromarray(array)


def png(width, height, bits, kind, rows=b""):
    """A PNG of these filtered rows; it may claim any size, and hold nothing."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey_alpha_16(level, opacity):
    """A PNG of grey and opacity of 16 bits, whose rows hold differences to the pixel on the left (filter 1)."""
    stored = np.stack(np.broadcast_arrays(level, opacity), -1).astype(">u2")
    found = stored.view(np.uint8).reshape(*stored.shape[:2], 4)
    differences = np.diff(found, axis=1, prepend=np.uint8(0))
    return png(stored.shape[1], stored.shape[0], 16, 4, b"".join(b"\1" + row.tobytes() for row in differences))


DEEP = {
    "16 bits with opacity": (grey_alpha_16(RAMP * 1000, 65535), RAMP * 1000 / 65535),
    "16 bits of a PNG": (encoded(fromarray((RAMP * 1000).astype(np.uint16))), RAMP * 1000 / 65535),
    "12 bits in 16": (encoded(fromarray((RAMP * 65).astype(np.uint16))), RAMP * 65 / 65535),
    "16 bits of a TIFF": (encoded(fromarray((RAMP * 1000).astype(np.uint16)), "TIFF"), RAMP * 1000 / 65535),
    "32 bits of a TIFF": (encoded(fromarray((RAMP * 1000).astype(np.int32)), "TIFF"), RAMP * 1000 / 65535),
    "floats": (encoded(fromarray((RAMP / 63).astype(np.float32)), "TIFF"), RAMP / 63),
    "dark floats": (encoded(fromarray((RAMP / 1e4).astype(np.float32)), "TIFF"), RAMP / 1e4),
    "PGM of 16 bits": (b"P5 8 8 65535\n" + (RAMP * 1000).astype(">u2").tobytes(), RAMP * 1000 / 65535),
}


@pytest.mark.parametrize("case", DEEP)
def test_more_than_eight_bits_keep_every_level(case, tmp_path):
    content, brightness = DEEP[case]
    found = data.load(folder(tmp_path / "d", {"a": content, "b": content}, "tif"), val_fraction=0)
    assert found.shape == (1, SIDE, SIDE)
    np.testing.assert_allclose(found.train.images[0, 0] / 255, brightness, atol=1e-6)
    assert len(found.train.images[0].unique()) == 64
    assert found.mean[0] == pytest.approx(brightness.mean(), rel=1e-5)
    assert found.std[0] == pytest.approx(brightness.std(), rel=1e-4)
    again = data.load(f"imagefolder:{tmp_path / 'd'}", val_fraction=0)  # from the cache
    assert torch.equal(again.train.images, found.train.images)
    streamed = data.load(f"imagefolder:{tmp_path / 'd'}", val_fraction=0, size=SIDE, in_memory_limit=0)
    everything = torch.arange(len(streamed.train))
    assert torch.equal(streamed.train.batch(everything)[0], found.train.images)
    assert (streamed.mean, streamed.std) == (found.mean, found.std)
    # Among pictures of eight bits the levels are rounded, and keep their order.
    np.testing.assert_allclose(pixels(content)[0] / 255, brightness, atol=0.5 / 255 + 1e-6)


def tiff(rows, bits, white_is_zero=False, kind=1):
    """A TIFF of these rows of bytes, with the tags that say what its numbers mean."""
    content, side = b"".join(rows), len(rows)
    tags = {256: side, 257: side, 258: bits, 259: 1, 262: 1 - white_is_zero, 277: 1, 278: side, 339: kind}
    tags |= {279: len(content), 273: 8 + 2 + 12 * 10 + 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def packed(row):
    """Numbers of 12 bits, two in three bytes."""
    text = "".join(f"{value:012b}" for value in row)
    return int(text, 2).to_bytes(len(text) // 8, "big")


STORED_OTHERWISE = {
    "16 bits, white is 0": (
        tiff([(65535 - row * 1000).astype("<u2").tobytes() for row in RAMP], 16, True),
        1000 / 65535,
    ),
    "floats, white is 0": (tiff([(1 - row / 63).astype("<f4").tobytes() for row in RAMP], 32, True, 3), 1 / 63),
    "8 bits, white is 0": (tiff([(255 - row * 4).astype("u1").tobytes() for row in RAMP], 8, True), 4 / 255),
    "12 bits": (tiff([packed(row * 65) for row in RAMP], 12), 65 / 4095),
}


@pytest.mark.parametrize("case", STORED_OTHERWISE)
def test_what_a_tiff_says_of_black_and_white_is_heeded(case):
    content, step = STORED_OTHERWISE[case]
    np.testing.assert_allclose(pixels(content, "F")[0] / 255, RAMP * step, atol=1e-6)


def test_signed_numbers_of_8_bits_are_refused(tmp_path):
    content = tiff([(row - 9).astype("i1").tobytes() for row in RAMP], 8, kind=2)
    with pytest.raises(LayerwiseError, match=r"a/0.tif holds signed numbers of 8 bits"):
        data.load(folder(tmp_path / "d", {"a": content, "b": content}, "tif"))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (RAMP.astype(np.float32), "floating-point numbers from 0 to 63; scale them to 0"),
        (RAMP.astype(np.float32) / 63 - 0.5, "floating-point numbers from -0.5 to 0.5"),
        (np.where(RAMP == 5, np.nan, 0).astype(np.float32), "floating-point numbers from nan"),
        (np.where(RAMP == 5, np.inf, 0).astype(np.float32), "floating-point numbers from 0 to inf"),
        (RAMP.astype(np.int32) - 1, "whole numbers from -1 to 62; store it with 8 or 16 bits"),
        (RAMP.astype(np.int32) * 10**6, "whole numbers from 0 to 63000000"),
    ],
)
def test_numbers_that_are_no_brightness_are_refused(array, words, tmp_path):
    content = encoded(fromarray(array), "TIFF")
    with pytest.raises(LayerwiseError, match=f"a/0.tif holds {words}"):
        data.load(folder(tmp_path / "d", {"a": content, "b": content}, "tif"))


SCENE = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
SCENE[: SIDE // 2] = 255  # sky above
SCENE[:, :SIDE, 0] = 120  # and a side of its own, so that mirror images differ
STORED = {  # EXIF orientation: how the upright scene is stored
    2: [PIL.Transpose.FLIP_LEFT_RIGHT],
    3: [PIL.Transpose.ROTATE_180],
    4: [PIL.Transpose.FLIP_TOP_BOTTOM],
    5: [PIL.Transpose.TRANSPOSE],
    6: [PIL.Transpose.ROTATE_90],
    7: [PIL.Transpose.TRANSVERSE],
    8: [PIL.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_stored_turned_is_read_upright(form, orientation):
    picture = fromarray(SCENE)
    for step in STORED[orientation]:
        picture = picture.transpose(step)
    exif = PIL.Exif()
    exif[0x0112] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    content = encoded(picture, form, exif=exif, **lossless)
    assert read_header(content).size == (2 * SIDE, SIDE)
    wanted = ImageFormat("RGB", SIDE, 2 * SIDE)
    found, done = decode(content, wanted)
    assert not done
    tolerance = 40 if form == "JPEG" else 0
    difference = stack([found], wanted)[0].permute(1, 2, 0).numpy().astype(int) - SCENE
    assert abs(difference).max() <= tolerance


def test_turned_16_bit_pictures_are_read_upright_too():
    exif = PIL.Exif()
    exif[0x0112] = 3
    content = encoded(fromarray((RAMP * 1000).astype(np.uint16)[::-1, ::-1].copy()), exif=exif)
    np.testing.assert_allclose(pixels(content, "F")[0] / 255, RAMP * 1000 / 65535, atol=1e-6)


def test_grey_with_16_bits_of_opacity_is_laid_on_the_ground_level_by_level(tmp_path):
    """It is grey (PIL gives RGBA), and its levels are mixed before anything is rounded."""
    opacity = RAMP[::-1] * 1000
    content = grey_alpha_16(RAMP * 1000, opacity)
    found = data.load(folder(tmp_path / "d", {"a": content, "b": content}), val_fraction=0)
    assert found.shape == (1, SIDE, SIDE) and any("transparent in places" in note for note in found.notes)
    share = opacity / 65535
    expected = share * RAMP * 1000 / 65535 * 255 + (1 - share) * found.form.ground
    np.testing.assert_allclose(found.train.images[0, 0], expected, rtol=1e-5)
    assert read_header(content).size == (SIDE, SIDE)


def colours_16(kind):
    """A picture of red, green, blue (and opacity) with 16 bits each: a PNG of this kind, or a PPM."""
    stored = np.stack([RAMP * 1000, RAMP[::-1] * 1000, RAMP * 500] + [RAMP * 0 + 65535] * (kind == 6), -1)
    rows = stored.astype(">u2")
    if kind == "PPM":
        return b"P6 8 8 65535\n" + rows.tobytes()
    return png(SIDE, SIDE, 16, kind, b"".join(b"\0" + row.tobytes() for row in rows))


@pytest.mark.parametrize("kind", [2, 6, "PPM"])
def test_colours_with_more_bits_than_are_read_are_told(tmp_path, kind):
    deep, plain = colours_16(kind), encoded(fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)))
    found = data.load(folder(tmp_path / "d", {"a": deep, "b": [deep, *[plain] * 5]}), val_fraction=0)
    words = "7 of 12 train images have more than 8 bits per colour, of which the upper 8 are read"
    assert words in found.notes
    assert not read_header(plain).deep_colours
    for grey in (encoded(fromarray((RAMP * 1000).astype(np.uint16))), grey_alpha_16(RAMP * 1000, 65535)):
        assert not read_header(grey).deep_colours  # all bits of grey are read


def sign(colour, where, mode="RGBA"):
    """A sign of one colour on transparent ground, whose colour is that of the sign."""
    image = np.zeros((SIDE, SIDE, 4), np.uint8)
    image[..., :3] = colour
    image[(*where, 3)] = 255
    picture = fromarray(image)
    if mode == "LA":
        return encoded(picture.convert("LA"))
    if mode == "P":
        palette = PIL.new("P", (SIDE, SIDE), 0)
        palette.putpalette([*colour, *colour])
        palette.paste(1, mask=picture.getchannel("A"))
        return encoded(palette, transparency=0)
    if mode == "GIF":
        palette = PIL.new("P", (SIDE, SIDE), 0)
        palette.putpalette([*colour, *(255 - c for c in colour)])
        palette.paste(1, mask=picture.getchannel("A"))
        return encoded(palette, "GIF", transparency=0)
    return encoded(picture)


BAR, POLE = np.s_[3:5, :], np.s_[:, 3:5]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF"])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_sign_on_transparent_ground_can_be_seen(mode, level, tmp_path):
    kinds = {"bar": sign((level,) * 3, BAR, mode), "pole": sign((level,) * 3, POLE, mode)}
    found = data.load(folder(tmp_path / "d", kinds), val_fraction=0)
    bar, pole = (found.train.images[found.train.labels == label][0].float() for label in (0, 1))
    assert (bar - pole).abs().max() > 100
    where = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    where[BAR] = True
    assert (bar - bar[:, :1, :1]).abs().amax(0).gt(100).equal(where)
    assert any("transparent in places" in note for note in found.notes)


def test_black_and_white_signs_lie_on_one_ground_that_hides_neither(tmp_path):
    both = {kind: [sign((v,) * 3, where) for v in (0, 255) * 3] for kind, where in (("bar", BAR), ("pole", POLE))}
    found = data.load(folder(tmp_path / "d", both), val_fraction=0)
    ground = {int(image[0, 0, 0]) for image in found.train.images}
    assert len(ground) == 1 and all(image.unique().numel() == 2 for image in found.train.images)
    assert found.form.ground in ground


def test_what_is_half_transparent_is_mixed_with_the_ground():
    image = np.full((SIDE, SIDE, 4), (200, 100, 0, 51), np.uint8)  # a fifth opaque
    found = pixels(encoded(fromarray(image)), "RGB")
    expected = torch.tensor([200, 100, 0]) / 5 + 255 * 4 / 5
    assert (found.float() - expected.view(3, 1, 1)).abs().max() <= 1
    opaque = np.full((SIDE, SIDE, 4), (200, 100, 0, 255), np.uint8)
    content, done = decode(encoded(fromarray(opaque)), ImageFormat("RGB", SIDE, SIDE))
    assert content[:3] == bytes((200, 100, 0)) and not done


def test_other_kinds_of_pictures_keep_their_pixels():
    checks = (RAMP % 2).astype(bool)
    bits = pixels(encoded(fromarray(checks)))
    assert torch.equal(bits[0] == 255, torch.from_numpy(checks)) and set(bits.unique().tolist()) == {0, 255}
    ink = PIL.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))  # red
    red = pixels(encoded(ink, "TIFF"), "RGB")
    assert red[0].min() > 200 and red[1:].max() < 50
    grey = PIL.new("LAB", (SIDE, SIDE), (round(53.585 * 2.55), 128, 128))  # 128 of sRGB has the lightness 53.585
    for mode, kind in (("RGB", np.uint8), ("L", np.uint8), ("F", np.float32)):
        levels = np.frombuffer(decode(encoded(grey, "TIFF"), ImageFormat(mode, SIDE, SIDE))[0], kind)
        assert np.abs(levels - 128.0).max() <= 2
    frames = [PIL.new("L", (SIDE, SIDE), level) for level in (10, 90)]
    for form in ("GIF", "TIFF"):
        content, done = decode(
            encoded(frames[0], form, save_all=True, append_images=frames[1:]), ImageFormat("L", SIDE, SIDE)
        )
        assert set(content) == {10} and "frames" in done


@pytest.mark.parametrize(
    "content",
    [
        png(2**31 - 1, 2**31 - 1, 8, 2),
        png(20_000, 20_000, 8, 2),
        png(10_000, 10_000, 8, 2),
        b"",
        b"\0\5\26\7\0\2\0\0Mac OS X",
        b"P5 99999999 99999999 255\n",
        b"P6 4 4 0\n",
        b"II*\0\xff\xff\xff\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        encoded(fromarray(SCENE))[:50],
        encoded(fromarray(SCENE), "TIFF")[:100],
        encoded(fromarray(SCENE), "GIF")[:40],
    ],
    ids=range(12),
)
@pytest.mark.parametrize("first", [True, False])
def test_a_broken_picture_is_one_sentence(content, first, tmp_path):
    whole = encoded(fromarray(SCENE))
    contents = [content, whole, whole] if first else [whole, whole, content]
    with pytest.raises(LayerwiseError, match=r"a/\d.png (is not a readable image|has ).*") as caught:
        data.load(folder(tmp_path / "d", {"a": contents, "b": whole}))
    assert "\n" not in str(caught.value)


def test_what_a_mac_adds_is_no_picture(tmp_path):
    whole = encoded(fromarray(SCENE))
    name = folder(tmp_path / "d" / "train", {"a": whole, "b": whole}).replace("/train", "")
    folder(tmp_path / "d" / "test", {"a": whole, "b": whole})
    expected = data.load(name, val_fraction=0)
    for extra in ("train/a/._0.png", "train/__MACOSX/a/._0.png", "__MACOSX/train/a/0.png", "train/.x/0.png", "._d.png"):
        (tmp_path / "d" / extra).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / extra).write_bytes(b"\0\5\26\7")
    found = data.load(name, val_fraction=0)
    assert found.classes == ("a", "b") and len(found.train) == len(expected.train) == 12 and len(found.test) == 12
    (tmp_path / "d" / "train" / "a" / "read.me").write_text("what this is")
    (tmp_path / "d" / "train" / "loose.png").write_bytes(whole)
    assert any(note.startswith("2 files under") for note in data.load(name, val_fraction=0).notes)


@pytest.mark.parametrize("size", [8.5, "8", 10**6, 0, -1])
def test_a_size_that_is_none_is_refused(size, tmp_path):
    whole = encoded(fromarray(SCENE))
    with pytest.raises(LayerwiseError, match="image size"):
        data.load(folder(tmp_path / "d", {"a": whole, "b": whole}), size=size)


def test_a_size_may_be_a_number_of_numpys(tmp_path):
    whole = encoded(fromarray(SCENE))
    assert data.load(folder(tmp_path / "d", {"a": whole, "b": whole}), size=np.int64(4)).shape == (3, 4, 4)
