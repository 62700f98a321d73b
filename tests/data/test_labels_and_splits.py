"""Labels and splits from files: every different word is a class, nothing is dropped without a note, and no file is read
that is not part of the data."""

import io
import json
import os
from decimal import Decimal

import numpy as np
import pytest
import torch
from support.images import PIL, pa, pq, refused

from layerwise import data
from layerwise.data.parquet import open_parquet


def png(level=0):
    buffer = io.BytesIO()
    PIL.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def table(labels, *, names=None, cells=None, kind=None):
    """A table of images whose level is the number of the row."""
    cells = [{"bytes": png(i), "path": None} for i in range(len(labels))] if cells is None else cells
    found = pa.table({"image": pa.array(cells, kind), "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        found = found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return found


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, found in splits.items():
        pq.write_table(found, folder / f"{split}-0.parquet")
    return f"parquet:{folder}"


LABELS = {
    "long ids": (pa.array([2**53, 2**53 + 1] * 10), (str(2**53), str(2**53 + 1))),
    "beyond int64": (pa.array([2**64 - 1, 2**64 - 2] * 10, pa.uint64()), (str(2**64 - 2), str(2**64 - 1))),
    "leading zeros": (pa.array(["007", "7", "07", "7 "] * 5), ("007", "07", "7", "7 ")),
    "like numbers": (pa.array(["1E5", "100000", "1_1", "11"] * 5), ("100000", "11", "1E5", "1_1")),
    "other digits": (pa.array(["１", "1"] * 10), ("1", "１")),
    "truth": (pa.array([True, False] * 10), ("False", "True")),
    "whole floats": (pa.array([3.0, 10.0] * 10), ("3", "10")),
    "half floats": (pa.array(np.array([3, 10] * 10, np.float16)), ("3", "10")),
    "categories": (pa.array(["b", "a"] * 10).dictionary_encode(), ("a", "b")),
    "categories of numbers": (pa.array([5, 4] * 10).dictionary_encode(), ("4", "5")),
    "large strings": (pa.array(["b", "a"] * 10, pa.large_string()), ("a", "b")),
    "decimals": (pa.array([Decimal(3), Decimal(10)] * 10), ("3", "10")),
    "bytes of numbers": (pa.array([1, 0] * 10, pa.uint8()), ("0", "1")),
}


@pytest.mark.parametrize("case", LABELS)
def test_as_many_classes_as_different_labels(case, tmp_path):
    labels, classes = LABELS[case]
    found = data.load(write(tmp_path / "d", train=table(labels), test=table(labels)), val_fraction=0)
    assert found.classes == classes
    for part in (found.train, found.test):
        stored = [labels[int(level)].as_py() for level in part.images[:, 0, 0, 0]]
        words = [str(int(v)) if isinstance(v, (float, Decimal)) else str(v) for v in stored]
        assert [found.classes[label] for label in part.labels] == words


BAD_LABELS = {
    "fractions": (pa.array([0.5, 1.0] * 4), "row 0 of .* has the label 0.5 in column 'label', which is not a class"),
    "floats that ids have merged in": (pa.array([2.0**53, 1.0] * 4), "give whole numbers, stored as such, or words"),
    "infinity": (pa.array([float("inf"), 1.0] * 4), "has the label inf"),
    "gaps": (pa.array([0.0, float("nan")] * 4), "row 1 of .* has no label"),
    "empty words": (pa.array(["a", ""] * 4), "row 1 of .* has no label"),
    "two spellings": (pa.array(["caf\u00e9", "cafe\u0301"] * 4), "spells the class .* in two ways"),
    "lists": (pa.array([[0], [1]] * 4), "column 'label' of .* holds list<.*>, not whole numbers or words"),
    "times": (pa.array([0, 1] * 4, pa.timestamp("s")), "column 'label' of .* holds timestamp"),
    "one class": (pa.array([True] * 8), "only the class 'True'"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_are_no_classes(case, tmp_path):
    labels, words = BAD_LABELS[case]
    refused(words, write(tmp_path / "d", train=table(labels)))


def test_numbers_of_rows_that_pandas_stores_are_no_labels(tmp_path):
    found = table([0, 1] * 10).rename_columns(["image", "species"])
    rows = pa.array(range(20))
    name = write(tmp_path / "d", train=found.append_column("__index_level_0__", rows))
    assert data.load(name).classes == ("0", "1")
    refused(
        "no label column",
        write(tmp_path / "d", train=found.drop_columns("species").append_column("__index_level_0__", rows)),
    )


def test_two_columns_of_one_name_are_told_of(tmp_path):
    twice = table([0, 1] * 4).append_column("label", pa.array([1, 0] * 4))
    refused("has several columns of the name 'label'", write(tmp_path / "d", train=twice))


@pytest.mark.parametrize("notes", ["[", "[]", '{"info": null}', '{"info": {"features": [1]}}'])
def test_damaged_notes_are_told_of(notes, tmp_path):
    found = table([0, 1] * 4).replace_schema_metadata({"huggingface": notes})
    refused("holds damaged metadata about its columns", write(tmp_path / "d", train=found))


@pytest.mark.parametrize("names", ["ab", [1, 2], ["a", "a"]])
def test_class_lists_that_are_none(names, tmp_path):
    words = "lists the class 'a' twice" if names == ["a", "a"] else "no list of words as the classes"
    refused(words, write(tmp_path / "d", train=table([0, 1] * 4, names=names)))


def test_shards_must_agree_on_the_classes(tmp_path):
    labels = [0, 1] * 4
    for second in (table(labels, names=["b", "a"]), table(labels, names=["a", "b", "c"]), table(labels)):
        write(tmp_path / "d", **{"train-1": table(labels, names=["a", "b"]), "train-2": second})
        refused("the class lists of .*train-1.* differ", f"parquet:{tmp_path / 'd'}")
    write(tmp_path / "d", **{"train-1": table(labels), "train-2": table(["0", "1"] * 4)})
    refused("the labels of .* are whole numbers and those of .* are words", f"parquet:{tmp_path / 'd'}")


def test_shards_may_differ_in_how_they_store_the_same(tmp_path):
    raw = [png(i) for i in range(8)]
    one = table(pa.array([0, 1] * 4, pa.int8()))
    two = table(pa.array([0.0, 1.0] * 4), cells=raw, kind=pa.binary())
    found = data.load(write(tmp_path / "d", **{"train-1": one, "train-2": two, "test": one}), val_fraction=0)
    assert found.classes == ("0", "1") and found.train.labels.tolist() == [0, 1] * 8
    assert found.train.images[:, 0, 0, 0].tolist() == list(range(8)) * 2


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_may_be_bytes_without_a_struct(kind, tmp_path):
    found = table([0, 1] * 4, cells=[png(i) for i in range(8)], kind=kind)
    read = data.load(write(tmp_path / "d", train=found, test=found), val_fraction=0)
    assert read.train.images[:, 0, 0, 0].tolist() == list(range(8))


# Splits


@pytest.mark.parametrize("held", [[-1] * 6, [None] * 6, [-1, None] * 3])
def test_a_test_split_with_withheld_labels_is_left_out(held, tmp_path):
    name = write(
        tmp_path / "d",
        train=table([0, 1] * 10, names=["a", "b"]),
        validation=table([1, 0] * 4, names=["a", "b"]),
        test=table(pa.array(held, pa.int64()), names=["a", "b"]),
    )
    found = data.load(name)
    assert found.test.labels.tolist() == [1, 0] * 4  # of the validation split
    assert len(found.train) == 18 and len(found.val) == 2
    assert any("withheld" in note for note in found.notes)
    (tmp_path / "d" / "validation-0.parquet").unlink()
    found = data.load(name, val_fraction=0)
    assert len(found.train) == 16 and len(found.test) == 4


def test_a_test_split_without_a_column_of_labels_is_left_out(tmp_path):
    name = write(tmp_path / "d", train=table([0, 1] * 10), test=table([0] * 4).select(["image"]))
    found = data.load(name, val_fraction=0)
    assert len(found.test) == 4 and len(found.train) == 16 and any("withheld" in note for note in found.notes)


def test_words_that_are_withheld(tmp_path):
    name = write(tmp_path / "d", train=table(["a", "b"] * 10), test=table(["", ""]))
    assert len(data.load(name, val_fraction=0).test) == 4


def test_a_label_withheld_among_others_is_told_of(tmp_path):
    refused(
        "row 1 of .*test-0.parquet has the negative label -1",
        write(tmp_path / "d", train=table([0, 1] * 10), test=table([0, -1, 1])),
    )
    refused("train-0.parquet has the negative label -1", write(tmp_path / "e", train=table([-1] * 10)))


def images(folder, counts):
    for kind, count in counts.items():
        (folder / kind).mkdir(parents=True)
        for index in range(count):
            (folder / kind / f"{index}.png").write_bytes(png(index))


def test_an_own_validation_split_is_what_is_selected_by(tmp_path):
    train, val, test = table([0, 1] * 10), table([1, 1, 0]), table([0, 0, 1, 1])
    found = data.load(write(tmp_path / "d", train=train, validation=val, test=test))
    assert found.val.labels.tolist() == [1, 1, 0]
    assert found.train.labels.tolist() == [0, 1] * 10 and found.test.labels.tolist() == [0, 0, 1, 1]
    assert any("own validation split of 3" in note for note in found.notes)
    whole = data.load(f"parquet:{tmp_path / 'd'}", val_fraction=0)
    assert whole.val is None and len(whole.train) == 20 and any("not used" in note for note in whole.notes)
    for split, count in (("Train", 6), ("val", 2), ("TEST", 3)):
        images(tmp_path / "f" / split, {"a": count, "b": count})
    found = data.load(f"imagefolder:{tmp_path / 'f'}")
    assert [len(part) for part in (found.train, found.val, found.test)] == [12, 4, 6]


def test_noise_reaches_an_own_validation_split_unless_it_is_to_stay_clean(tmp_path):
    name = write(tmp_path / "d", train=table([0, 1] * 10), validation=table([0, 1] * 5), test=table([0, 1]))
    noisy, clean = (data.load(name, label_noise=0.4, clean_validation=clean) for clean in (False, True))
    assert int((noisy.val.labels != torch.tensor([0, 1] * 5)).sum()) == 4
    assert clean.val.labels.tolist() == [0, 1] * 5
    assert noisy.test.labels.tolist() == clean.test.labels.tolist() == [0, 1]


def test_splits_and_folders_that_are_left_out_are_told_of(tmp_path):
    for split in ("train", "test", "extra"):
        images(tmp_path / "f" / split, {"a": 3, "b": 3})
    notes = data.load(f"imagefolder:{tmp_path / 'f'}", val_fraction=0).notes
    assert any("not splits" in note and "extra" in note for note in notes)
    images(tmp_path / "g" / "test", {"a": 3, "b": 3})
    refused("has no folder train, only test", f"imagefolder:{tmp_path / 'g'}")
    images(tmp_path / "h" / "train", {"a": 3, "b": 3})
    images(tmp_path / "h" / "Train", {"a": 3, "b": 3})
    refused("two folders of the split 'train'", f"imagefolder:{tmp_path / 'h'}")


def test_a_test_folder_of_loose_images_has_no_labels(tmp_path):
    images(tmp_path / "f" / "train", {"a": 5, "b": 5})
    (tmp_path / "f" / "test").mkdir()
    (tmp_path / "f" / "test" / "0.png").write_bytes(png())
    found = data.load(f"imagefolder:{tmp_path / 'f'}", val_fraction=0)
    assert len(found.test) == 2 and any("withheld" in note for note in found.notes)


def test_a_split_without_a_class_is_told_of_before_the_run(tmp_path):
    images(tmp_path / "f" / "train", {"a": 5, "b": 5, "c": 5})
    images(tmp_path / "f" / "test", {"c": 2, "a": 1})
    found = data.load(f"imagefolder:{tmp_path / 'f'}", val_fraction=0)
    assert found.classes == ("a", "b", "c") and found.test.labels.tolist() == [0, 2, 2]
    assert "1 of 3 classes have no sample in the test split: b" in found.notes
    images(tmp_path / "f" / "val", {"d": 1})
    refused("classes of .* differ between train \\(a, b, c\\) and val \\(d\\)", f"imagefolder:{tmp_path / 'f'}")
    found = data.load(write(tmp_path / "p", train=table([0, 2] * 10, names=["x", "y", "z"])), val_fraction=0)
    assert "1 of 3 classes have no sample in the training split: y" in found.notes
    refused("too few to take one from", write(tmp_path / "q", train=table([0, 1])))


# What is not part of the data


def test_a_cell_names_files_of_its_own_folder_only(tmp_path):
    (tmp_path / "d" / "pictures").mkdir(parents=True)
    for index in range(8):
        (tmp_path / "d" / "pictures" / f"{index}.png").write_bytes(png(10 * index))
    (tmp_path / "secret.png").write_bytes(png(99))
    (tmp_path / "d" / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "d" / "pipe.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    inside = [{"bytes": None, "path": f"pictures/{index}.png"} for index in range(8)]

    def load(path):
        cells = [*inside[:7], {"bytes": None, "path": path}]
        return write(tmp_path / "d", train=table([0, 1] * 4, cells=cells, kind=kind), test=table([0, 1]))

    for path in ("pictures/7.png", str(tmp_path / "d" / "pictures" / "7.png"), "./pictures/../pictures/7.png"):
        found = data.load(load(path), val_fraction=0)
        assert found.train.images[:, 0, 0, 0].tolist() == [10 * index for index in range(8)]
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "/dev/zero", "/etc/passwd", "a\0b"):
        refused("row 7 of .* names the file .*, which is not in the folder of the data", load(path))
    refused("row 7 of .* holds no image", load(None))
    refused("row 7 of .* holds no image", load(""))
    refused("there is no file .*; row 7 of .* names it", load("nothing.png"))
    refused("is a named pipe, not a file; row 7 of", load("pipe.png"))


def test_a_changed_file_that_a_cell_names_is_read_anew(tmp_path):
    (tmp_path / "d").mkdir()
    cells = [{"bytes": None, "path": "a.png"}] * 8
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    name = write(tmp_path / "d", train=table([0, 1] * 4, cells=cells, kind=kind), test=table([0, 1]))
    for level in (10, 20):
        (tmp_path / "d" / "a.png").write_bytes(png(level))
        os.utime(tmp_path / "d" / "a.png", ns=(level, level))
        assert data.load(name, val_fraction=0).train.images.unique().tolist() == [level]


def test_links_and_pipes_in_a_folder(tmp_path):
    images(tmp_path / "d", {"a": 6, "b": 6})
    (tmp_path / "secret.png").write_bytes(png(99))
    odd = tmp_path / "d" / "a" / "odd.png"
    odd.symlink_to("0.png")
    assert (
        sum(map(len, (lambda d: (d.train, d.test))(data.load(f"imagefolder:{tmp_path / 'd'}", val_fraction=0)))) == 13
    )
    for make, words in (
        (lambda: odd.symlink_to(tmp_path / "secret.png"), "odd.png lies outside the folder"),
        (lambda: odd.symlink_to("nowhere"), "there is no file .*odd.png"),
        (lambda: os.mkfifo(odd), "odd.png is a named pipe"),
        (lambda: odd.symlink_to("/dev/zero"), "odd.png is a device"),
    ):
        odd.unlink()
        make()
        refused(words, f"imagefolder:{tmp_path / 'd'}")
    odd.unlink()
    images(tmp_path / "elsewhere", {"c": 2})
    (tmp_path / "d" / "a" / "more").symlink_to(tmp_path / "elsewhere" / "c")
    refused("more is a link out of", f"imagefolder:{tmp_path / 'd'}")


@pytest.mark.parametrize("form", ["parquet", "imagefolder"])
def test_names_that_no_file_can_have(form, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("x" * 300, "a\0b", str(tmp_path / "pipe"), "/dev/zero", "line\nbreak"):
        refused(f"give {form}|cannot be read", f"{form}:{name}")
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "train.parquet")
    refused("named pipe|no images", f"{form}:{tmp_path / 'd'}")
    for root in ("a\0b", "x" * 300):
        refused("cannot be read", "mnist", root=root)


@pytest.mark.parametrize("name", [3, None, ["digits"], b"digit", "\0", ""])
def test_names_that_are_none(name):
    refused("unknown data set|is a folder|did you mean", name)


def test_a_parquet_file_that_claims_too_much(tmp_path, monkeypatch):
    name = write(tmp_path / "d", train=table([0, 1] * 4))

    def hungry(*_, **__):
        raise MemoryError

    monkeypatch.setattr(pq.ParquetFile, "read", hungry)
    refused("is not a readable parquet file", name)


def test_a_mapped_table_gives_the_same(tmp_path):
    pytest.importorskip("datasets", reason="the data extra is not installed")
    raw = table(pa.array(["b", "a"] * 4).dictionary_encode(), cells=[png(i) for i in range(8)], kind=pa.binary())
    write(tmp_path / "d", **{"train-1": raw, "train-2": raw, "test": raw})
    held, mapped = (open_parquet(tmp_path / "d", limit)["train"] for limit in (2**30, 0))
    assert held.values == mapped.values and [held.read(i) for i in range(16)] == [mapped.read(i) for i in range(16)]
    assert held.where(9) == mapped.where(9)


def test_cora_that_is_damaged_is_one_sentence(tmp_path):
    (tmp_path / "cora").mkdir()
    file = tmp_path / "cora" / "cora.npz"
    np.savez(file, data=np.ones(1), indices=np.zeros(1, int), indptr=np.array([0, 1]), shape=np.array([2**40, 2**40]))
    refused("cora.npz is not a readable file of Cora", "cora", root=tmp_path)
    np.savez(file, data=np.array([{}], object))
    refused("cora.npz is not a readable file of Cora", "cora", root=tmp_path)
    file.unlink()
    os.mkfifo(file)
    refused("is a named pipe", "cora", root=tmp_path)


# What people call their splits


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [
        ("Training", "Testing", None),
        ("training", "testing", "validation"),
        ("seg_train", "seg_test", None),
        ("seg_train/seg_train", "seg_test/seg_test", None),  # as an archive unpacks into a folder of its own
        ("training_set", "test_set", "ValSet"),
        ("trainA", "testA", None),
        ("train2017", "test2017", "val2017"),
        ("TRAIN", "eval", "dev"),
        ("train", "test", "eval"),
        ("chest train images", "chest test images", "chest valid images"),
    ],
)
def test_a_folder_is_a_split_whatever_its_spelling(train, test, val, tmp_path):
    for name, count in ((train, 6), (test, 3), (val, 4)):
        if name:
            images(tmp_path / "d" / name, {"a": count, "b": count})
    found = data.load(f"imagefolder:{tmp_path / 'd'}", val_fraction=0.25)
    assert found.classes == ("a", "b")
    assert len(found.test) == 6
    assert (len(found.train), len(found.val)) == ((12, 8) if val else (9, 3))


def test_a_dev_split_is_used(tmp_path):
    images(tmp_path / "d" / "train", {"a": 6, "b": 6})
    images(tmp_path / "d" / "dev", {"a": 3, "b": 3})
    found = data.load(f"imagefolder:{tmp_path / 'd'}", val_fraction=0)
    assert (len(found.train), len(found.test)) == (12, 6)
    assert any("'dev' is used as the test split" in note for note in found.notes)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("fold1", "fold2"), "all hold the same folders"),
        (("part_a", "part_b", "part_c"), "call one of them train"),
        (("dev", "eval"), "has no folder train, only dev, eval"),
        (("train_a", "train_b"), "two folders of the split 'train'"),
        (("train", "training"), "two folders of the split 'train'"),
    ],
)
def test_folders_that_look_like_splits_are_no_classes(names, sentence, tmp_path):
    for name in names:
        images(tmp_path / "d" / name, {"x": 3, "y": 3})
    refused(sentence, f"imagefolder:{tmp_path / 'd'}")


def test_splits_below_the_classes_are_no_classes(tmp_path):
    for name in ("cat", "dog"):
        images(tmp_path / "d" / name, {"train": 3, "test": 3})
    refused("put train and test above the classes", f"imagefolder:{tmp_path / 'd'}")


@pytest.mark.parametrize("inner", [("left", "right"), ("2019", "2020", "2021")])
def test_classes_may_hold_the_same_folders(inner, tmp_path):
    for name in ("cat", "dog"):
        images(tmp_path / "d" / name, dict.fromkeys(inner, 4))
    found = data.load(f"imagefolder:{tmp_path / 'd'}", val_fraction=0)
    assert found.classes == ("cat", "dog")
    assert torch.bincount(torch.cat([found.train.labels, found.test.labels])).tolist() == [4 * len(inner)] * 2
    assert any("are the classes, and all hold the same folders" in note for note in found.notes)


def test_splits_without_class_folders_are_no_classes(tmp_path):
    images(tmp_path / "d", {"training": 3, "testing": 3})
    refused("holds no folder per class", f"imagefolder:{tmp_path / 'd'}")


@pytest.mark.parametrize(
    "classes",
    [("bullet_train", "steam_train"), ("training", "walking"), ("invalid", "valid"), ("contest", "test_tube")],
)
def test_classes_may_hold_words_of_splits(classes, tmp_path):
    images(tmp_path / "d", dict.fromkeys(classes, 5))
    assert data.load(f"imagefolder:{tmp_path / 'd'}", val_fraction=0).classes == classes


def tables(folder, counts):
    for name, count in counts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([0, 1] * count), folder / f"{name}.parquet")
    return f"parquet:{folder}"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training", "testing"),
        ("Mnist-Training", "Mnist-Testing"),
        ("trainset", "testset"),
        ("train_full", "dev"),
        ("training/0", "validation/0"),
    ],
)
def test_a_parquet_file_is_of_the_split_that_its_name_says(train, test, tmp_path):
    found = data.load(tables(tmp_path / "d", {train: 6, test: 3}), val_fraction=0)
    assert (len(found.train), len(found.test)) == (12, 6)


@pytest.mark.parametrize("names", [("first", "second"), ("main/0", "rest/0"), ("faces", "faces-new")])
def test_parquet_files_that_name_no_split_are_not_joined(names, tmp_path):
    refused("cannot tell the splits of", tables(tmp_path / "d", dict.fromkeys(names, 4)))


def test_dev_and_eval_are_no_training_split(tmp_path):
    refused("has no training split, only", tables(tmp_path / "d", {"dev": 4, "eval": 4}))


@pytest.mark.parametrize(
    "names",
    [
        ("data-00000-of-00002", "data-00001-of-00002"),
        ("0000", "0001"),
        ("faces1", "faces2"),
        ("part-0-0b1c2d3e-1111-2222-3333-444455556666", "part-1-aaaaaaaa-1111-2222-3333-444455556666"),
    ],
)
def test_numbered_parts_are_one_table(names, tmp_path):
    found = data.load(tables(tmp_path / "d", dict.fromkeys(names, 10)), val_fraction=0)
    assert len(found.train) + len(found.test) == 40


@pytest.mark.parametrize("word", ["nan", "NaN", "null", " "])
def test_a_missing_label_of_a_parquet_file_is_no_class(word, tmp_path):
    refused("row 1 of .* has no label", write(tmp_path / "d", train=table(["a", word, "b"] * 4)))
