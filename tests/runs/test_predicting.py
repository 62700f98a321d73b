"""Prediction reads images and tables as training does, and refuses what it cannot read in one sentence."""

import csv
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import train

from layerwise import LayerwiseError, data
from layerwise.runs import building
from layerwise.runs.predicting import predictions

PIL = pytest.importorskip("PIL.Image", reason="the data extra is not installed")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def draw(index, mode):
    """A picture with noise in it, of a size and a kind of its own."""
    rng = np.random.default_rng(index)
    height, width = 8 + index % 3, 8 + 2 * (index % 2)
    if mode == "deep":
        return PIL.fromarray(rng.integers(0, 4096, (height, width), dtype=np.uint16)), {}
    if mode == "grey":
        return PIL.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)), {}
    channels = 4 if index % 3 == 0 else 3
    exif = PIL.Exif()
    exif[0x0112] = 1 + index % 8
    return PIL.fromarray(rng.integers(0, 256, (height, width, channels), dtype=np.uint8)), {"exif": exif}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs on folders of pictures: what they are called, their folder, the folder of the run."""
    base, runs = tmp_path_factory.mktemp("runs"), {}
    for mode in ("colour", "grey", "deep"):
        for index in range(24):
            (base / mode / f"train/{index % 2}").mkdir(parents=True, exist_ok=True)
            (base / mode / f"test/{index % 2}").mkdir(parents=True, exist_ok=True)
            picture, options = draw(index, mode)
            picture.save(base / mode / f"train/{index % 2}/{index}.png", **options)
            if index < 8:
                picture.save(base / mode / f"test/{index % 2}/{index}.png", **options)
        words = ["--data", f"imagefolder:{base / mode}", "--model.width", "8", "--steps", "1", "--batch-size", "8"]
        runs[mode] = base / mode, train(base / f"{mode}_run", *words, "--val-fraction", "0")
    return runs


@pytest.mark.parametrize("mode", ["colour", "grey", "deep"])
def test_a_picture_is_predicted_as_it_is_trained(trained, mode):
    folder, run = trained[mode]
    dataset = data.load(f"imagefolder:{folder}", val_fraction=0)
    options = {"seed": 0, "mean": dataset.mean, "std": dataset.std, "shuffle": False, "drop_last": False}
    ((x, _),) = data.Batches(dataset.test, 256, **options).epoch(0)
    probability, label = building.load_run(run, "cpu").learner(x).float().softmax(-1).max(-1)
    text, notes = predictions(run, folder / "test", "cpu")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["class"] for row in rows] == [dataset.classes[i] for i in label]
    assert [row["probability"] for row in rows] == [f"{p:.6f}" for p in probability.tolist()]
    assert not [note for note in notes if "left out" in note]


def test_a_row_is_predicted_as_it_is_trained(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(1e6 + rng.normal(), 1e-3 * rng.normal(), "ab"[i % 2]) for i in range(60)]
    (tmp_path / "t.csv").write_text("x,y,label\n" + "".join(f"{a!r},{b!r},{c}\n" for a, b, c in rows))
    words = ["--data", str(tmp_path / "t.csv"), "--model.width", "8", "--steps", "1", "--batch-size", "8"]
    run = train(tmp_path / "run", *words)
    dataset = data.load(str(tmp_path / "t.csv"))
    options = {"seed": 0, "mean": dataset.mean, "std": dataset.std, "shuffle": False, "drop_last": False}
    ((x, _),) = data.Batches(dataset.test, 256, **options).epoch(0)
    probability = building.load_run(run, "cpu").learner(x).float().softmax(-1).max(-1).values
    values = dataset.test.images.flatten(1).tolist()
    (tmp_path / "new.csv").write_text("y,x\n" + "".join(f"{b!r},{a!r}\n" for a, b in values))
    found = [
        row["probability"] for row in csv.DictReader(io.StringIO(predictions(run, tmp_path / "new.csv", "cpu")[0]))
    ]
    assert found == [f"{p:.6f}" for p in probability.tolist()]


def header(shape, kind="|u1", order=False):
    """The beginning of a .npy file that claims a shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": order, "shape": shape})
    return buffer.getvalue()


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros((2, 1, 8, 8)))
    return buffer.getvalue()


SHAPE = (2, 1, 8, 8)
ARRAYS = {
    "an archive": (zipped(), "is not a readable .npy array"),
    "a header of 477 GiB": (header((8 * 10**9, 1, 8, 8)), "is not a readable .npy array"),
    "a header of more than there is": (header((10**30, 1, 8, 8)), "is not a readable .npy array"),
    "a negative shape": (header((-2, 1, 8, 8)) + b"\0" * 128, "holds no images"),
    "a pickle": (saved(np.array([[[[{}] * 8] * 8]], dtype=object)), "holds object, not numbers"),
    "a pickle that claims to be none": (header(SHAPE, "|O") + b"\0" * 1024, "holds object, not numbers"),
    "words": (saved(np.full(SHAPE, "a")), "holds .*, not numbers"),
    "complex numbers": (saved(np.zeros(SHAPE, np.complex64)), "holds complex64, not numbers"),
    "times": (saved(np.zeros(SHAPE, "m8[s]")), "not numbers"),
    "truth": (saved(np.zeros(SHAPE, bool)), "holds bool, not numbers"),
    "records": (saved(np.zeros(SHAPE, [("a", "u1")])), "not numbers"),
    "NaN": (saved(np.full(SHAPE, np.nan)), "holds NaN"),
    "above 255": (saved(np.full(SHAPE, 256)), "numbers outside 0 to 255"),
    "below 0": (saved(np.full(SHAPE, -0.5)), "numbers outside 0 to 255"),
    "brightness": (saved(np.linspace(0, 1, 128).reshape(SHAPE)), "holds numbers from 0 to 1; multiply them by 255"),
    "no images": (saved(np.zeros((0, 1, 8, 8))), "holds no images"),
    "flat": (saved(np.zeros(64)), "has shape \\(64,\\); the network takes \\(N, 1, 8, 8\\)"),
    "colour": (saved(np.zeros((2, 3, 8, 8))), "has shape \\(2, 3, 8, 8\\)"),
    "nothing": (b"", "is not a readable .npy array"),
    "text": (b"pixels", "is not a readable .npy array"),
    "a torn header": (header(SHAPE)[:40], "is not a readable .npy array"),
    "a header of code": (
        b"\x93NUMPY\x01\x00\x10\x00__import__('os')"[:26],
        "is not a readable .npy array",
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("digits") / "run", "--steps", "1", "--model.width", "8")


def refused(run, given, words):
    with pytest.raises(LayerwiseError, match=words) as caught:
        predictions(run, Path(given), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_holds_no_images_is_one_sentence(run, case, tmp_path):
    content, words = ARRAYS[case]
    (tmp_path / "a.npy").write_bytes(content)
    refused(run, tmp_path / "a.npy", words)


@pytest.mark.parametrize("kind", ["u1", "<i2", ">i4", "<f2", ">f8", "<u8", "g"])
def test_arrays_of_any_kind_of_number_are_the_same(run, kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE)
    np.save(tmp_path / "A.NPY", pixels)
    (tmp_path / "A.NPY.npy").rename(tmp_path / "A.NPY")
    np.save(tmp_path / "b.npy", np.asfortranarray(pixels.astype(kind)))
    assert predictions(run, tmp_path / "A.NPY", "cpu") == predictions(run, tmp_path / "b.npy", "cpu")


def test_what_is_no_file_is_refused_at_once(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.npy").mkdir()
    refused(run, tmp_path / "pipe.npy", "is a named pipe, not a file")
    refused(run, tmp_path / "pipe.png", "is a named pipe, not a file")
    refused(run, tmp_path / "folder.npy", "holds no images")
    refused(run, "/dev/zero", "is a device, not a file")
    refused(run, "x" * 300, "cannot be read")
    refused(run, "a\0b.png", "cannot be read")
    with zipfile.ZipFile(tmp_path / "a.png", "w") as file:
        file.writestr("x", "y")
    refused(run, tmp_path / "a.png", "a.png is not a readable image")


def test_a_folder_is_read_without_what_is_no_image(run, tmp_path):
    PIL.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "read.me").write_text("words")
    text, notes = predictions(run, tmp_path, "cpu")
    assert len(text.splitlines()) == 2 and any("1 files" in note for note in notes)


def test_checkpoints_from_before_the_form_was_kept_can_be_read(run):
    facts = building.load_run(run, "cpu").facts
    old = {name: value for name, value in vars(facts).items() if name != "form"}
    read = building.DataSignature.in_state({"data": old})
    assert (read.image_mode, read.ground) == ("L", 255)
    read.check(data.load("digits"))
    assert torch.tensor(read.mean).shape == (1,)


def test_prediction_tells_of_colours_with_more_bits_than_are_read(trained, tmp_path):
    run = trained["colour"][1]
    (tmp_path / "deep.ppm").write_bytes(b"P6 8 8 65535\n" + bytes(8 * 8 * 6))
    _, notes = predictions(run, tmp_path / "deep.ppm")
    assert "1 of 1 images have more than 8 bits per colour, of which the upper 8 are read" in notes
