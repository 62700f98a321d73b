"""Labels that are not classes: numbers and several labels in tables, masks of images, the included data sets."""

import csv

import numpy as np
import pytest
import torch
from support.images import PIL, pa, png, pq, refused
from support.pixels import noise

from layerwise.data import Batches, load
from layerwise.errors import LayerwiseError


def table(path, rows, names=("a", "b", "y", "z")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return str(path)


def rows(count=50):
    return [[i, i % 7, 10.5 + 2 * i, i % 2] for i in range(count)]


def test_a_column_of_numbers_stays_what_it_is(tmp_path):
    found = load(table(tmp_path / "t.csv", rows()), task="regression", val_fraction=0)
    labels = torch.cat([found.train.labels, found.test.labels]).flatten()
    assert labels.dtype == torch.float32 and sorted(labels.tolist()) == [10.5 + 2 * i for i in range(50)]
    assert found.classes == ("y",) and found.columns == ("a", "b", "z")
    own = found.train.labels.double().numpy()
    assert found.target_mean == pytest.approx(own.mean(0)) and found.target_std == pytest.approx(own.std(0))


def test_targets_that_are_all_equal_are_not_taken_for_close_ones(tmp_path):
    """The mean of 47 times 0.1 is not 0.1 in floating point, and their computed deviation not quite zero."""
    name = table(tmp_path / "t.csv", [[i, i % 7, 0.1, i % 2] for i in range(47)])
    assert load(name, task="regression", val_fraction=0).target_std == (1.0,)


def test_several_targets_are_columns_and_no_inputs(tmp_path):
    found = load(table(tmp_path / "t.csv", rows()), task="regression", targets=("z", "y"))
    assert found.classes == ("z", "y") and found.columns == ("a", "b") and found.train.labels.shape == (36, 2)
    assert len(found.target_mean) == len(found.target_std) == 2
    x, y = next(Batches(found.train, 8, seed=0, mean=found.mean, std=found.std).epoch(0))
    assert torch.equal(y[:, 0], (y[:, 1] - 10.5) / 2 % 2) and x.shape == (8, 2, 1, 1)


def test_several_labels_are_zeros_and_ones(tmp_path):
    name = table(tmp_path / "t.csv", [[i, i % 2, i % 3 == 0, 1] for i in range(30)])
    with pytest.raises(LayerwiseError, match="not a finite number"):  # True is a word
        load(name, task="multilabel", targets=("b", "y"))
    name = table(tmp_path / "t.csv", [[i, i % 2, int(i % 3 == 0), 1] for i in range(30)])
    found = load(name, task="multilabel", targets=("b", "y"))
    assert found.classes == ("b", "y") and set(found.train.labels.flatten().tolist()) == {0.0, 1.0}
    for options, match in (
        ({"task": "multilabel"}, "name those of"),
        ({"task": "multilabel", "targets": ("a", "b")}, r"line 4 of .*t\.csv has 2 in the column 'a'"),
        ({"task": "regression", "targets": ("q",)}, "no column 'q'"),
        ({"targets": ("b", "y")}, "2 columns of classes"),
        ({"task": "segmentation"}, "use --task classification or regression or multilabel"),
        ({"task": "regression", "label_noise": 0.1}, "label noise"),
    ):
        with pytest.raises(LayerwiseError, match=match):
            load(name, **options)


def test_images_in_parquet_have_numbers_as_labels(tmp_path):
    images, path = noise(20), tmp_path / "a.parquet"
    form = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": png(image), "path": None} for image in images], form)
    columns = {
        "image": cells,
        "age": pa.array([20.5 + i for i in range(20)]),
        "left": pa.array([i % 2 for i in range(20)]),
    }
    pq.write_table(pa.table(columns), path)
    found = load(f"parquet:{path}", task="regression", targets=("age",), val_fraction=0)
    assert found.classes == ("age",) and found.train.labels.shape == (16, 1)
    joined = torch.cat([found.train.labels, found.test.labels]).flatten().tolist()
    assert sorted(joined) == [20.5 + i for i in range(20)]
    both = load(f"parquet:{path}", task="regression", targets=("left", "age"))
    assert both.classes == ("left", "age")
    pq.write_table(pa.table(columns | {"age": pa.array([None] * 20, pa.float64())}), path)
    refused("row 0 of .* has None in column 'age'", f"parquet:{path}", task="regression", targets=("age",))
    long = pa.array([2**60 + i % 2 for i in range(20)])
    pq.write_table(pa.table(columns | {"age": long, "left": pa.array([2**60] * 20)}), path)
    refused("in column 'age' .* are the same as floating-point", f"parquet:{path}", task="regression", targets=("age",))
    assert load(f"parquet:{path}", task="regression", targets=("left",)).target_mean == (2**60,)
    refused("leave --data.label-column out", "digits", targets=("age",))


def write_masks(folder, count=12, side=8, suffix=".png", bright=1, skip=()):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    draw = np.random.default_rng(0)
    masks = []
    for i in range(count):
        mask = (draw.random((side, side)) > 0.5).astype(np.uint8)
        PIL.fromarray((mask * 200).astype(np.uint8)).save(folder / f"images/{i}.png")
        if i not in skip:
            PIL.fromarray(mask * bright).save(folder / f"masks/{i}{suffix}")
        masks.append(mask)
    return masks


def test_masks_lie_beside_images_under_the_same_names(tmp_path):
    masks = write_masks(tmp_path / "d", suffix=".bmp")
    found = load(f"imagefolder:{tmp_path / 'd'}", task="segmentation", val_fraction=0)
    assert found.classes == ("0", "1") and found.train.labels.dtype == torch.uint8
    assert len(found.train) + len(found.test) == 12
    for source in (found.train, found.test):  # each image is its own mask, brighter
        assert torch.equal(source.images[:, 0] // 200, source.labels)
    assert sum(int(part.labels.sum()) for part in (found.train, found.test)) == sum(int(m.sum()) for m in masks)
    _, y = next(Batches(found.train, 4, seed=0, mean=found.mean, std=found.std).epoch(0))
    assert y.dtype == torch.int64 and y.shape == (4, 8, 8)


def test_masks_are_resized_without_new_classes_and_white_is_a_class_where_there_is_nothing_else(tmp_path):
    write_masks(tmp_path / "train", bright=255)
    write_masks(tmp_path / "test", count=4, bright=255)
    found = load(f"imagefolder:{tmp_path}", task="segmentation", size=6)
    assert found.shape == (1, 6, 6) and found.train.labels.shape[1:] == (6, 6)
    assert set(found.train.labels.flatten().tolist()) == {0, 1} and len(found.test) == 4
    assert any("white is class 1" in note for note in found.notes)


def test_masks_that_cannot_be_used_are_named(tmp_path):
    write_masks(tmp_path / "a", skip=(3,))
    refused("3.png has no mask of the same name", f"imagefolder:{tmp_path / 'a'}", task="segmentation")
    write_masks(tmp_path / "b")
    PIL.new("RGB", (8, 8)).save(tmp_path / "b/masks/5.png")
    refused("5.png is a mask in colours", f"imagefolder:{tmp_path / 'b'}", task="segmentation")
    write_masks(tmp_path / "c", bright=0)
    refused("fewer than two classes", f"imagefolder:{tmp_path / 'c'}", task="segmentation")
    (tmp_path / "e/cats").mkdir(parents=True)
    refused("no folders images and masks", f"imagefolder:{tmp_path / 'e'}", task="segmentation")


def test_the_scenes_hold_each_digit_in_one_split_and_agree_on_what_is_there():
    flags, maps = (load("digit_scenes", task=task, val_fraction=0) for task in ("multilabel", "segmentation"))
    assert torch.equal(flags.train.images, maps.train.images) and maps.classes[1:] == flags.classes
    for part in ("train", "test"):
        labels, masks = getattr(flags, part).labels, getattr(maps, part).labels
        seen = torch.stack([(masks == digit + 1).flatten(1).any(1) for digit in range(10)], 1)
        assert torch.equal(seen, labels.bool()) and int(labels.sum(1).min()) >= 1 and int(labels.sum(1).max()) <= 3
        assert bool((getattr(maps, part).images[:, 0][masks > 0] >= 64).all())
    alone = [
        {image[mask > 0].numpy().tobytes() for image, mask in zip(part.images[:, 0], part.labels, strict=True)}
        for part in (maps.train, maps.test)
    ]
    assert not alone[0] & alone[1]


def test_diabetes_is_that_of_scikit_learn():
    found = load("diabetes", task="regression", val_fraction=0)
    assert len(found.train) + len(found.test) == 442 and found.columns[:2] == ("age", "sex")
    assert float(torch.cat([found.train.labels, found.test.labels]).mean()) == pytest.approx(152.13, abs=0.01)
    refused("use --task regression", "diabetes")
