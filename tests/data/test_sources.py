"""Files become pixels and labels: in memory, streamed, and from the cache."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.images import pa, png, pq, write_folder, write_parquet, write_split_parquet
from support.pixels import noise

from layerwise.data import Batches, InMemorySource, StreamedSource, load
from layerwise.data.machine import sklearn_digits
from layerwise.data.parquet import open_parquet
from layerwise.errors import LayerwiseError


def test_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.shape == (1, 8, 8) and data.classes == tuple("0123456789")
    assert len(data.test) == round(0.2 * 1797) and len(data.train) + len(data.val) + len(data.test) == 1797
    images = torch.cat([source.images for source in (data.train, data.val, data.test)])
    counts = torch.bincount(torch.cat([source.labels for source in (data.train, data.val, data.test)]))
    original = load_digits()
    pixels, labels = sklearn_digits()
    assert np.array_equal(pixels, np.round(original.images * 255 / 16)) and np.array_equal(labels, original.target)
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
        "1 of 11 train images are transparent in places and were given a white background",
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

    rows = open_parquet(path, 0)["train"]
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


# Real data

SHARED = Path(os.environ.get("LAYERWISE_DATA") or Path(__file__).parents[3] / "shared" / "data")
KNOWN = {  # published statistics of the training images; a limit between the bytes on disk and the decoded ones
    "mnist": ((1, 28, 28), 70_000, (0.1307,), (0.3081,), 30_000_000),
    "cifar10": ((3, 32, 32), 60_000, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 120_000_000),
}


@pytest.mark.slow
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
