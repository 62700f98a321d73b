"""Data sets, sources, batches and augmentations."""

import io
import json
import math
import os
import struct
import sys
from pathlib import Path

import pytest
import torch

from layerwise.data import (
    Batches,
    InMemorySource,
    StreamedSource,
    crop,
    cutout,
    describe,
    flip,
    load,
    names,
    stratified_split,
)
from layerwise.data import rows as rows_module
from layerwise.errors import LayerwiseError

PIL = pytest.importorskip("PIL.Image", reason="the data extra is not installed")
pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)


def noise(count, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def png(image):
    """A (C, H, W) uint8 image as a PNG file."""
    channels, height, width = image.shape
    pixels = bytes(image.permute(1, 2, 0).flatten().tolist())
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    buffer = io.BytesIO()
    PIL.frombytes(mode, (width, height), pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, *, classes=None, image="image", label="label"):
    """A parquet file of encoded images, with Hugging Face's feature notes where `classes` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data if isinstance(data, bytes) else png(data), "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(cells, kind), label: pa.array(labels)})
    if classes is not None:
        features = {image: {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def write_split_parquet(folder, **options):
    """20 training and 10 test images of two classes; returns the pixels."""
    train, test = noise(20), noise(10, seed=1)
    write_parquet(folder / "train-0.parquet", train, [i % 2 for i in range(20)], **options)
    write_parquet(folder / "test-0.parquet", test, [i % 2 for i in range(10)], **options)
    return train, test


def write_folder(path, images, suffix=".png"):
    path.mkdir(parents=True)
    for index, image in enumerate(images):
        (path / f"{index:03}{suffix}").write_bytes(png(image))


def numbered(count, side=4):
    """A source whose sample i is full of the value i and has the label i."""
    values = torch.arange(count)
    return InMemorySource(values.to(torch.uint8)[:, None, None, None].repeat(1, 1, side, side), values)


def plain(source, batch_size, **options):
    return Batches(source, batch_size, **{"seed": 0, "mean": (0.0,), "std": (1.0,)} | options)


def labels_of(batches, epoch, start=0):
    return torch.cat([y for _, y in batches.epoch(epoch, start)]).tolist()


# Batches


def test_order_is_a_pure_function_of_seed_and_epoch():
    batches = plain(numbered(40), 10)
    first = labels_of(batches, 3)
    torch.rand(5)  # the global generator has no say
    labels_of(batches, 0)
    assert labels_of(batches, 3) == first == labels_of(plain(numbered(40), 10), 3)
    assert sorted(first) == list(range(40))
    assert labels_of(batches, 4) != first
    assert labels_of(plain(numbered(40), 10, seed=1), 3) != first


def test_images_stay_with_their_labels():
    for x, y in plain(numbered(40), 10).epoch(0):
        torch.testing.assert_close(x, (y / 255.0)[:, None, None, None].expand_as(x))


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_later_start_gives_the_same_bits(start):
    source = InMemorySource(noise(52), torch.arange(52))
    batches = plain(source, 10, augment=("flip", "crop", "cutout"), mean=(0.5,) * 3, std=(0.2,) * 3)
    whole, tail = list(batches.epoch(2)), list(batches.epoch(2, start))
    assert len(whole) == 5 and len(tail) == 5 - start
    for (x, y), (u, v) in zip(whole[start:], tail, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_augmentation_differs_between_epochs_and_batches():
    source = InMemorySource(noise(1).repeat(64, 1, 1, 1), torch.zeros(64, dtype=torch.int64))
    batches = plain(source, 32, augment=("crop",), mean=(0.0,) * 3, std=(1.0,) * 3)
    (a, _), (b, _) = batches.epoch(0)
    c, _ = next(batches.epoch(1))
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_evaluation_reads_everything_in_order():
    batches = plain(numbered(23), 10, shuffle=False, drop_last=False)
    assert len(batches) == 3
    assert labels_of(batches, 0) == labels_of(batches, 1) == list(range(23))
    dropping = plain(numbered(23), 10, shuffle=False)
    assert len(dropping) == 2
    assert labels_of(dropping, 0) == list(range(20))


def test_normalisation_is_the_textbook_formula():
    source = InMemorySource(noise(6), torch.arange(6))
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    x, y = next(Batches(source, 6, seed=0, mean=mean, std=std).epoch(0))
    expected = (source.images[y] / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    torch.testing.assert_close(x, expected)


def test_channels_last_changes_the_layout_only():
    source = InMemorySource(noise(6), torch.arange(6))
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    x, _ = next(plain(source, 6, **options).epoch(0))
    z, _ = next(plain(source, 6, channels_last=True, **options).epoch(0))
    assert x.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, z)


def test_wrong_batches_are_refused():
    with pytest.raises(LayerwiseError, match="batch size 512 is larger than the 40 training samples; use --batch-size"):
        plain(numbered(40), 512)
    with pytest.raises(LayerwiseError, match="batch size 0"):
        plain(numbered(40), 0)
    with pytest.raises(LayerwiseError, match=r"unknown augmentation 'flop'; did you mean 'flip'.*flip, crop, cutout"):
        plain(numbered(40), 4, augment=("flop",))
    with pytest.raises(LayerwiseError, match="one value of each per channel"):
        plain(numbered(40), 4, mean=(0.1, 0.2))
    for start in (-1, 11):
        with pytest.raises(LayerwiseError, match="epoch of 10 batches"):
            next(plain(numbered(40), 4).epoch(0, start))


# Augmentations


def test_flip_gives_the_image_or_its_mirror_half_the_time():
    images = noise(400, side=6)
    out = flip(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 200) < 5 * math.sqrt(100)  # five standard deviations of a fair coin


@pytest.mark.parametrize(("height", "width", "pad"), [(32, 32, 4), (8, 12, 1), (4, 4, 1)])
def test_crop_is_a_window_of_the_padded_image(height, width, pad):
    images = torch.randint(1, 256, (600, 2, height, width), dtype=torch.uint8)
    out = crop(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8)
    found = torch.zeros(600, dtype=torch.int64)
    used = set()
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, :, top : top + height, left : left + width]
            match = (window == out).flatten(1).all(1)
            found += match
            if match.any():
                used.add((top, left))
    assert (found == 1).all()
    assert {top for top, _ in used} == {left for _, left in used} == set(range(2 * pad + 1))


def test_cutout_zeroes_one_square_around_a_pixel():
    height, width, side = 16, 20, 8
    images = torch.full((500, 3, height, width), 7, dtype=torch.uint8)
    out = cutout(images, torch.Generator().manual_seed(0))
    # All the holes there can be, one per centre, cut off at the border.
    holes = {}
    for y in range(height):
        for x in range(width):
            hole = torch.zeros(height, width, dtype=torch.bool)
            hole[max(0, y - side // 2) : y + side // 2, max(0, x - side // 2) : x + side // 2] = True
            holes[bytes(hole.flatten().tolist())] = (y, x)
    centres = set()
    for image in out:
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        assert set(image.unique().tolist()) <= {0, 7}
        centres.add(holes[bytes((image[0] == 0).flatten().tolist())])
    assert len({y for y, _ in centres}) == height and len({x for _, x in centres}) == width


# Splits


def test_stratified_split_keeps_the_proportions():
    labels = torch.tensor([0] * 101 + [1] * 53 + [2] * 7 + [3])[torch.randperm(162)]
    for fraction in (0.1, 0.25, 0.9):
        rest, part = stratified_split(labels, fraction, seed=0)
        assert sorted(rest.tolist() + part.tolist()) == list(range(162))
        for label, count in enumerate((101, 53, 7, 1)):
            taken = int((labels[part] == label).sum())
            assert abs(taken - fraction * count) < 1 or count == 1
            assert taken < count
    assert len(stratified_split(labels, 0.25, seed=0)[1]) == round(0.25 * 162)
    assert torch.equal(stratified_split(labels, 0.25, 5)[1], stratified_split(labels, 0.25, 5)[1])
    assert not torch.equal(stratified_split(labels, 0.25, 5)[1], stratified_split(labels, 0.25, 6)[1])


def test_splits_are_disjoint_and_test_depends_on_no_option(tmp_path):
    """The pixel of each image is its number, so that we can see where each image went."""
    write_parquet(tmp_path / "all.parquet", numbered(100).images, [i % 4 for i in range(100)])

    def members(source):
        return set(source.images[:, 0, 0, 0].tolist())

    data = load(f"parquet:{tmp_path}", val_fraction=0.25)
    parts = [members(source) for source in (data.train, data.val, data.test)]
    assert [len(part) for part in parts] == [60, 20, 20]
    assert set.union(*parts) == set(range(100))
    assert torch.bincount(data.val.labels).tolist() == torch.bincount(data.test.labels).tolist() == [5] * 4
    assert any("no test split" in note for note in data.notes)

    other = load(f"parquet:{tmp_path}", val_fraction=0.5, seed=9)
    assert torch.equal(other.test.images, data.test.images)
    same = load(f"parquet:{tmp_path}", val_fraction=0.25)
    assert torch.equal(same.val.images, data.val.images)
    reseeded = load(f"parquet:{tmp_path}", val_fraction=0.25, seed=1)
    assert members(reseeded.val) != parts[1]
    whole = load(f"parquet:{tmp_path}", val_fraction=0)
    assert whole.val is None and members(whole.train) == parts[0] | parts[1]


def test_mean_and_std_come_from_the_training_part_only(tmp_path):
    write_split_parquet(tmp_path)
    data = load(f"parquet:{tmp_path}", val_fraction=0.5)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_a_constant_channel_has_std_one(tmp_path):
    write_parquet(tmp_path / "a.parquet", torch.full((10, 1, 4, 4), 51, dtype=torch.uint8), [0, 1] * 5)
    data = load(f"parquet:{tmp_path}")
    assert data.mean == pytest.approx((0.2,)) and data.std == (1.0,)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_validation_fraction_out_of_range(fraction):
    with pytest.raises(LayerwiseError, match="not in \\[0, 1\\)"):
        load("digits", val_fraction=fraction)


def test_fewer_training_samples_leave_the_other_splits_and_the_shares_of_the_classes_alone():
    whole, few = load("digits"), load("digits", train_samples=200)
    assert len(few.train) == 200
    assert torch.equal(few.val.images, whole.val.images)
    assert torch.equal(few.test.images, whole.test.images)
    known = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(*whole.train.batch(torch.arange(1294)), strict=True)
    }
    assert all((i.numpy().tobytes(), int(y)) in known for i, y in zip(*few.train.batch(torch.arange(200)), strict=True))
    expected = 200 * torch.bincount(whole.train.labels) / len(whole.train)
    assert (torch.bincount(few.train.labels) - expected).abs().max() <= 1
    again, other = load("digits", train_samples=200), load("digits", train_samples=200, seed=1)
    assert torch.equal(few.train.images, again.train.images)
    assert not torch.equal(few.train.images, other.train.images)
    assert torch.equal(load("digits", train_samples=1294).train.images, whole.train.images)


@pytest.mark.parametrize("count", [0, 9, 1295])
def test_a_number_of_training_samples_that_is_not_there_is_refused(count):
    with pytest.raises(LayerwiseError, match=f"train_samples is {count}; give a number from 10"):
        load("digits", train_samples=count)


def test_validation_fraction_of_no_sample(tmp_path):
    write_split_parquet(tmp_path)
    with pytest.raises(LayerwiseError, match="is no sample; raise it or use 0"):
        load(f"parquet:{tmp_path}", val_fraction=0.01)


# Sources


def test_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.shape == (1, 8, 8) and data.classes == tuple("0123456789")
    assert len(data.test) == round(0.2 * 1797) and len(data.train) + len(data.val) + len(data.test) == 1797
    images = torch.cat([source.images for source in (data.train, data.val, data.test)])
    counts = torch.bincount(torch.cat([source.labels for source in (data.train, data.val, data.test)]))
    original = load_digits()
    assert counts.tolist() == torch.bincount(torch.from_numpy(original.target)).tolist()
    # Half a grey level of rounding per pixel, at the very most.
    assert (images / 255).double().mean().item() == pytest.approx(original.images.mean() / 16, abs=0.5 / 255)
    assert images.max() == 255


def test_parquet_gives_back_the_pixels(tmp_path):
    train, test = write_split_parquet(tmp_path, classes=["cat", "dog"], image="picture", label="kind")
    data = load(f"parquet:{tmp_path}", val_fraction=0)
    assert data.classes == ("cat", "dog") and data.shape == (3, 8, 8) and data.notes == ()
    assert torch.equal(data.train.images, train) and torch.equal(data.test.images, test)
    assert data.test.labels.tolist() == [0, 1] * 5


def test_string_and_gapped_integer_labels(tmp_path):
    write_parquet(tmp_path / "a" / "x.parquet", noise(12), ["pear", "apple", "fig"] * 4)
    write_parquet(tmp_path / "b" / "x.parquet", noise(12), [10, 2, 30] * 4)
    fruit = load(f"parquet:{tmp_path / 'a'}", val_fraction=0)
    assert fruit.classes == ("apple", "fig", "pear")
    numbers = load(f"parquet:{tmp_path / 'b' / 'x.parquet'}", val_fraction=0)
    assert numbers.classes == ("2", "10", "30")
    where = {bytes(image.flatten().tolist()): value for image, value in zip(noise(12), [10, 2, 30] * 4, strict=True)}
    for image, label in zip(numbers.train.images, numbers.train.labels.tolist(), strict=True):
        assert numbers.classes[label] == str(where[bytes(image.flatten().tolist())])


def test_cifar100_uses_the_fine_labels(tmp_path):
    cells = [{"bytes": png(image), "path": None} for image in noise(8)]
    table = pa.table({"img": cells, "fine_label": [0, 1] * 4, "coarse_label": [0] * 8})
    features = {
        "img": {"_type": "Image"},
        "fine_label": {"names": ["apple", "bee"], "_type": "ClassLabel"},
        "coarse_label": {"names": ["thing"], "_type": "ClassLabel"},
    }
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder = tmp_path / "cifar100" / "cifar100"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    data = load("cifar100", root=tmp_path, val_fraction=0)
    assert data.classes == ("apple", "bee") and data.test.labels.tolist() == [0, 1] * 4


def test_images_of_other_sizes_and_colours_are_fitted_and_noted(tmp_path):
    green = torch.zeros(3, 8, 16, dtype=torch.uint8)
    green[1] = 200
    alpha = torch.cat([noise(1)[0], torch.zeros(1, 8, 8, dtype=torch.uint8)])
    images = [*noise(8), green, alpha, noise(1, channels=1)[0]]
    write_parquet(tmp_path / "train.parquet", images, [0, 1] * 5 + [0])
    write_parquet(tmp_path / "test.parquet", images[:2], [0, 1])
    data = load(f"parquet:{tmp_path}", val_fraction=0)
    assert data.shape == (3, 8, 8)
    assert torch.equal(data.train.images[8], green[:, :, :8])  # a centre crop of one colour
    assert (data.train.images[9] == 255).all()  # all of it is transparent, so nothing but its ground shows
    assert torch.equal(data.train.images[10], images[10].expand(3, 8, 8))
    assert data.notes == (
        "1 of 11 train images were resized to 8x8",
        "1 of 11 train images were converted to RGB",
        "1 of 11 train images are transparent in places and were laid on a white ground",
    )
    assert load(f"parquet:{tmp_path}", val_fraction=0).notes == data.notes  # from the cache too
    assert load(f"parquet:{tmp_path}", size=4).shape == (3, 4, 4)
    with pytest.raises(LayerwiseError, match="image size 0"):
        load(f"parquet:{tmp_path}", size=0)


def test_streamed_equals_in_memory(tmp_path):
    pytest.importorskip("datasets", reason="the data extra is not installed")
    train, test = noise(60), noise(10, seed=1)
    for part in range(2):  # two files, so that rows cross a file's end
        part_labels = [i % 3 for i in range(30)]
        write_parquet(tmp_path / f"train-{part}.parquet", train[30 * part : 30 * part + 30], part_labels)
    write_parquet(tmp_path / "test.parquet", test, [0, 1] * 5)
    held = load(f"parquet:{tmp_path}", val_fraction=0.2)
    streamed = load(f"parquet:{tmp_path}", val_fraction=0.2, size=8, in_memory_limit=0)
    assert isinstance(held.train, InMemorySource) and isinstance(streamed.train, StreamedSource)
    assert any("streamed" in note for note in streamed.notes)
    assert (streamed.mean, streamed.std, streamed.shape) == (held.mean, held.std, held.shape)
    for part in ("train", "val", "test"):
        a, b = getattr(held, part), getattr(streamed, part)
        everything = torch.arange(len(a))
        assert len(a) == len(b)
        assert all(torch.equal(u, v) for u, v in zip(a.batch(everything), b.batch(everything), strict=True))
    options = {"seed": 3, "augment": ("flip", "crop"), "mean": held.mean, "std": held.std}
    for start in (0, 5):
        pairs = zip(
            Batches(held.train, 4, **options).epoch(1, start),
            Batches(streamed.train, 4, **options).epoch(1, start),
            strict=True,
        )
        assert [torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs] == [True] * (12 - start)
    assert load(f"parquet:{tmp_path}", in_memory_limit=0).shape == (3, 224, 224)


def test_a_streamed_epoch_may_be_left_early_and_reports_a_broken_image(tmp_path):
    pytest.importorskip("datasets", reason="the data extra is not installed")
    images = [png(image) for image in noise(40)]
    images[25] = b"no image"
    write_parquet(tmp_path / "train.parquet", images[:20], [0, 1] * 10)
    write_parquet(tmp_path / "train-b.parquet", images[20:], [0, 1] * 10)
    write_parquet(tmp_path / "test.parquet", images[:4], [0, 1] * 2)
    # The file is judged by its headers; take the broken one out of their sight.
    source = load_without_header_check(tmp_path)
    batches = Batches(source, 4, seed=0, mean=(0.0,) * 3, std=(1.0,) * 3, shuffle=False)
    epoch = batches.epoch(0)
    next(epoch)
    epoch.close()
    with pytest.raises(LayerwiseError, match=r"row 5 of .*train-b.parquet is not a readable image"):
        list(batches.epoch(0))


def load_without_header_check(path):
    from layerwise.data.pictures import ImageFormat

    rows = rows_module.open_parquet(path, 0)["train"]
    order = torch.tensor([*range(20, 40), *range(20)])  # files are read by name: train-b before train
    return StreamedSource(rows, torch.tensor(rows.values), ImageFormat("RGB", 8, 8), order)


def test_imagefolder(tmp_path):
    cats, dogs = noise(6), noise(4, seed=1)
    write_folder(tmp_path / "train" / "dog", dogs)
    write_folder(tmp_path / "train" / "cat", cats)
    write_folder(tmp_path / "val" / "cat", cats[:1])
    write_folder(tmp_path / "val" / "dog", dogs[:1])
    data = load(f"imagefolder:{tmp_path}", val_fraction=0)
    assert data.classes == ("cat", "dog")
    assert torch.equal(data.train.images, torch.cat([cats, dogs]))
    assert data.train.labels.tolist() == [0] * 6 + [1] * 4
    assert torch.equal(data.test.images, torch.stack([cats[0], dogs[0]]))
    assert "'val' is used as the test split" in data.notes[0]
    flat = load(f"imagefolder:{tmp_path / 'train'}", val_fraction=0)
    assert len(flat.train) == 8 and len(flat.test) == 2


# The cache


def cache_file(tmp_path):
    (found,) = (tmp_path / "cache" / "layerwise" / "decoded").iterdir()
    return found


def test_cache_is_used_and_a_damaged_one_is_rebuilt(tmp_path, monkeypatch):
    images = noise(10)
    write_parquet(tmp_path / "data" / "a.parquet", images, [0, 1] * 5)
    name = f"parquet:{tmp_path / 'data'}"
    expected = load(name)
    file = cache_file(tmp_path)
    intact = file.read_bytes()
    torn = bytearray(intact)
    torn[-1] ^= 1
    for damage in (b"", intact[:-100], bytes(torn), b"x" * 1000):
        file.write_bytes(damage)
        again = load(name)
        assert torch.equal(again.train.images, expected.train.images)
        assert cache_file(tmp_path).stat().st_size == len(intact)

    from layerwise.data import sources

    monkeypatch.setattr(sources, "_decode", lambda *_: pytest.fail("decoded in spite of the cache"))
    assert torch.equal(load(name).train.images, expected.train.images)


def test_cache_follows_the_file(tmp_path):
    path = tmp_path / "data" / "a.parquet"
    write_parquet(path, noise(10), [0, 1] * 5)
    before = load(f"parquet:{path}", val_fraction=0)
    write_parquet(path, noise(10, seed=7), [0, 1] * 5)
    os.utime(path, ns=(1, 1))
    after = load(f"parquet:{path}", val_fraction=0)
    assert not torch.equal(before.train.images, after.train.images)


def test_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    write_parquet(tmp_path / "a.parquet", noise(10), [0, 1] * 5)
    assert len(load(f"parquet:{tmp_path}", val_fraction=0).train) == 8


# Mistakes


def refused(match, name, **options):
    with pytest.raises(LayerwiseError, match=match) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def test_unknown_names():
    refused("unknown data set 'mnsit'; did you mean 'mnist'.*digits, mnist, fashion_mnist, cifar10, cifar100", "mnsit")
    refused("unknown data set 'parquet:'", "parquet:")
    with pytest.raises(LayerwiseError, match="unknown data set 'nought'"):
        describe("nought")
    assert all("\n" not in describe(name) for name in names())
    assert describe("imagefolder:somewhere") == describe("imagefolder:PATH")


def test_broken_parquet_files_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, noise(10), [0, 1] * 5)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"PAR1 is not all it takes"):
        path.write_bytes(content)
        refused("a.parquet is not a readable parquet file", f"parquet:{tmp_path}")
    # A whole footer over pages that are damaged.
    footer = struct.unpack("<I", whole[-8:-4])[0]
    path.write_bytes(b"PAR1" + b"\xff" * (len(whole) - 12 - footer) + whole[-8 - footer :])
    refused("a.parquet is not a readable parquet file", f"parquet:{path}")
    write_parquet(path, noise(0), pa.array([], pa.int64()))
    refused("a.parquet holds no rows", f"parquet:{path}")


def test_a_broken_image_is_named(tmp_path):
    whole = png(noise(1)[0])
    for broken in (b"", b"text", whole[:60]):
        write_parquet(tmp_path / "a.parquet", [whole] * 3 + [broken], [0, 1] * 2)
        refused("row 3 of .*a.parquet is not a readable image", f"parquet:{tmp_path}")


def test_missing_and_ambiguous_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1.0], "label": [0]}), path)
    refused("no image column among its columns x, label", f"parquet:{path}")
    cell = [{"bytes": png(noise(1)[0]), "path": None}]
    pq.write_table(pa.table({"image": cell, "weight": [1.0]}), path)
    refused("no label column among its columns image, weight", f"parquet:{path}")
    pq.write_table(pa.table({"image": cell, "colour": [1], "shape": [1]}), path)
    refused("several label columns \\(colour, shape\\)", f"parquet:{path}")


def test_bad_labels(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, noise(4), [0, 1, -1, 0])
    refused("row 2 of .* negative label -1", f"parquet:{path}")
    write_parquet(path, noise(4), [0, 1, None, 0])
    refused("row 2 of .* has no label", f"parquet:{path}")
    write_parquet(path, noise(4), [0, 1, 2, 0], classes=["a", "b"])
    refused("row 2 of .* has the label 2, which is none of the 2 classes", f"parquet:{path}")
    write_parquet(path, noise(4), [1] * 4)
    refused("the one class '1'", f"parquet:{path}")


def test_classes_that_differ_between_train_and_test(tmp_path):
    write_parquet(tmp_path / "a" / "train.parquet", noise(4), [0, 1] * 2, classes=["a", "b"])
    write_parquet(tmp_path / "a" / "test.parquet", noise(4), [0, 1] * 2, classes=["b", "a"])
    refused("classes of .* differ between train \\(a, b\\) and test \\(b, a\\)", f"parquet:{tmp_path / 'a'}")
    write_parquet(tmp_path / "b" / "train.parquet", noise(4), ["a", "b"] * 2)
    write_parquet(tmp_path / "b" / "test.parquet", noise(4), ["a", "c"] * 2)
    refused("'c', which is none of the 2 classes", f"parquet:{tmp_path / 'b'}")


def test_missing_places(tmp_path, monkeypatch):
    refused("does not exist", f"parquet:{tmp_path / 'nowhere'}")
    refused("no \\*.parquet file under", f"parquet:{tmp_path}")
    refused("is not a folder", f"imagefolder:{tmp_path / 'nowhere'}")
    refused("data root names .*nowhere", "mnist", root=tmp_path / "nowhere")
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path / "nowhere"))
    refused("LAYERWISE_DATA names .*nowhere", "mnist")


def test_splits_that_cannot_be_told(tmp_path):
    write_parquet(tmp_path / "test.parquet", noise(4), [0, 1] * 2)
    refused("no training split, only test", f"parquet:{tmp_path}")
    write_parquet(tmp_path / "more.parquet", noise(4), [0, 1] * 2)
    refused("cannot tell the split of .*more.parquet", f"parquet:{tmp_path}")


def test_bad_imagefolders(tmp_path):
    refused("no images under", f"imagefolder:{tmp_path}")
    write_folder(tmp_path / "cat", noise(2))
    refused("the one class 'cat'", f"imagefolder:{tmp_path}")
    (tmp_path / "dog").mkdir()
    refused("class folder .*dog holds no images", f"imagefolder:{tmp_path}")
    (tmp_path / "dog" / "a.png").write_bytes(b"text")
    refused("dog/a.png is not a readable image", f"imagefolder:{tmp_path}")


def test_missing_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", noise(4), [0, 1] * 2)
    for module, name in (("datasets", "mnist"), ("sklearn.datasets", "digits"), ("pyarrow", f"parquet:{tmp_path}")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused("not installed; run pip install 'layerwise\\[data\\]'", name)


def test_hub(tmp_path, monkeypatch, capfd):
    """What the hub gives, with the download itself left out."""
    datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
    train, test = write_split_parquet(tmp_path / "hub", classes=["a", "b"])
    asked = []

    def fetch(repository):
        asked.append(repository)
        splits = {split: str(tmp_path / "hub" / f"{split}-0.parquet") for split in ("train", "test")}
        return datasets.load_dataset("parquet", data_files=splits, cache_dir=str(tmp_path / "hf"))

    real = datasets.load_dataset
    fetching = iter([True])

    def once(*arguments, **options):
        return fetch(*arguments) if next(fetching, False) else real(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", once)
    data = load("hf:someone/things", val_fraction=0)
    assert asked == ["someone/things"] and data.classes == ("a", "b")
    assert torch.equal(data.train.images, train) and torch.equal(data.test.images, test)
    assert capfd.readouterr() == ("", "")

    def unreachable(repository):
        raise ConnectionError(f"Couldn't reach '{repository}' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused("cannot get ylecun/mnist .*Couldn't reach.*network, or set LAYERWISE_DATA", "mnist", root=tmp_path)
    refused("cannot get no/such .*check the name and the network$", "hf:no/such")


# Real data

SHARED = Path(os.environ.get("LAYERWISE_DATA") or Path(__file__).parents[3] / "shared" / "data")
KNOWN = {  # published statistics of the training images; a limit between the bytes on disk and the decoded ones
    "mnist": ((1, 28, 28), 70_000, (0.1307,), (0.3081,), 30_000_000),
    "cifar10": ((3, 32, 32), 60_000, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 120_000_000),
}


@pytest.mark.parametrize("name", KNOWN)
def test_real_data(name):
    """Streamed, since decoding all of it takes longer than a fast test may."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {name} under {SHARED}; set LAYERWISE_DATA to a folder that holds it")
    shape, count, mean, std, limit = KNOWN[name]
    data = load(name, root=SHARED, size=shape[1], in_memory_limit=limit)
    assert data.shape == shape and len(data.classes) == 10
    assert len(data.train) + len(data.val) + len(data.test) == count and len(data.test) == 10_000
    # Estimated from 2,000 images, whose means scatter by about 0.12: five standard errors.
    assert data.mean == pytest.approx(mean, abs=0.013) and data.std == pytest.approx(std, abs=0.013)
    assert all((torch.bincount(part.labels) > 0.08 * len(part)).all() for part in (data.train, data.val, data.test))


def test_import_is_light():
    import subprocess

    code = (
        "import sys, layerwise.data; "
        "print([m for m in ('datasets', 'PIL', 'sklearn', 'pyarrow', 'safetensors') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
