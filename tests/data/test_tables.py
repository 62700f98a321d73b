"""Tables: what a CSV file holds reaches the network as standardised numbers; runs train and predict on it."""

import csv
import json
import os
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.runs import split

from layerwise import LayerwiseError, data, models
from layerwise.cli.main import main
from layerwise.data.encoding import Encoding

NAMES = ("height", "weight", "label")


def write(path, rows, names=NAMES):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return str(path)


def blobs(path, samples=120, classes=("ant", "bee", "cat")):
    """Two columns of very different size, one cloud per class."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(samples):
        kind = i % len(classes)
        rows.append([1e6 + kind + 0.2 * draw.normal(), 1e-3 * (kind**2 + 0.2 * draw.normal()), classes[kind]])
    return write(path, rows), np.array([row[:2] for row in rows]), [row[2] for row in rows]


def test_a_table_is_split_and_standardised_by_its_training_rows(tmp_path):
    name, values, labels = blobs(tmp_path / "t.csv")
    found = data.load(name)
    assert found.classes == ("ant", "bee", "cat") and found.columns == NAMES[:2] and found.shape == (2, 1, 1)
    assert (len(found.train), len(found.val), len(found.test)) == (86, 10, 24)
    assert any("no test split" in note for note in found.notes)
    kept = found.train.images.flatten(1).numpy()
    assert np.allclose(found.mean, kept.mean(0), rtol=1e-12) and np.allclose(found.std, kept.std(0), rtol=1e-6)
    stored = {(row[0], row[1]): label for row, label in zip(values.tolist(), labels, strict=True)}
    for part in (found.train, found.val, found.test):
        for row, label in zip(part.images.flatten(1).tolist(), part.labels.tolist(), strict=True):
            assert stored[tuple(row)] == found.classes[label]
    (batch,) = data.Batches(found.train, 86, seed=0, mean=found.mean, std=found.std, shuffle=False).epoch(0)
    assert batch[0].dtype == torch.float32
    # In float32 alone a mean of a million would cost five digits.
    assert np.allclose(batch[0].flatten(1).numpy(), (kept - kept.mean(0)) / kept.std(0), atol=1e-5)
    assert torch.equal(found.train.images.flatten(1), torch.from_numpy(kept))  # nothing was changed in place


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "-1", "9"], ("-1", "9", "10")),
        (["1.0", "2", "1", "2.0"], ("1", "1.0", "2", "2.0")),
        (["007", "7", "1E5", "100000"], ("007", "7", "100000", "1E5")),
        (["9007199254740993", "9007199254740992", "2", "-3"], ("-3", "2", "9007199254740992", "9007199254740993")),
        (["1_1", "11", "１１", "x"], ("11", "1_1", "x", "１１")),
        (["True", "true", "nanny", "inf"], ("True", "inf", "nanny", "true")),
        (["b", "10", "b", "9"], ("10", "9", "b")),
        ([" yes", "no", "yes ", "no"], ("no", "yes")),
    ],
)
def test_whole_numbers_are_classes_in_their_order_and_words_in_theirs(tmp_path, labels, classes):
    rows = [[i, 0, label] for i, label in enumerate(labels * 10)]
    found = data.load(write(tmp_path / "t.csv", rows))
    assert found.classes == classes
    assert found.std[1] == 1  # a constant column
    for row, label in zip(found.train.images[:, 0].flatten().tolist(), found.train.labels.tolist(), strict=True):
        assert classes[label] == labels[int(row) % 4].strip()


def test_marks_blank_lines_quotes_and_the_place_of_the_label_do_not_matter(tmp_path):
    (tmp_path / "t.csv").write_bytes('\ufeff"target","a, b"\r\nx," 1.5e1"\r\n\r\ny,2\r\nx,3\r\ny,4\r\n'.encode())
    found = data.load(str(tmp_path / "t.csv"), val_fraction=0)
    assert found.classes == ("x", "y") and found.columns == ("a, b",)
    rows = [row for part in (found.train, found.test) for row in part.images.flatten().tolist()]
    assert sorted(rows) == [2, 3, 4, 15]


WRONG = {
    "no file": (None, "there is no file"),
    "rowless": ("a,label\n", "holds no rows"),
    "empty": ("", "holds no rows"),
    "label": ("a,b\n1,2\n3,4\n", "no label column among its columns a, b; name the one to use 'label'"),
    "nothing else": ("label\nx\ny\n", "no column but 'label'"),
    "twice": ("a,a,label\n1,2,x\n3,4,y\n", "two columns called 'a'"),
    "ragged": ("a,label\n1,x\n2\n", "line 3 of .* has 1 cells, and the first line 2 names"),
    "gap": ("a,label\n1,x\n,y\n", "line 3 of .* has '' in column 'a', which is not a finite number"),
    "word": ("a,label\nred,x\n2,y\n", "line 2 of .* has 'red' in column 'a'"),
    "infinite": ("a,label\n1,x\ninf,y\n", "'inf' in column 'a'"),
    "unlabelled": ("a,label\n1,x\n2,\n", "line 3 of .* has no label in column 'label'"),
    "regression": ("a,y\n1,0.5\n2,1.25\n", "has the label 0.5 in column 'y', which is not a class"),
    "one class": ("a,y\n1,x\n2,x\n", "only the class 'x'"),
    "semicolons": (b"a;b;label\n1;red;x\n3;4;y\n", "line 2 of .* has 'red' in column 'b'"),
    "binary": (b"\xff\xfe\x00a\x00", "is not a readable CSV file"),
    "zeros": (b"\xffa\x00", "is not a readable CSV file"),
    "all faults": (
        "a,b,label\n1,red,x\n2,,y\n3,4\n5,6,\n7,8,x\n",
        "t.csv has 4 faults: line 4 has 2 cells, .*; line 2 has 'red' in column 'b'.*; line 3 has '' in column 'b'.*; "
        "line 5 has no label in column 'label'; correct the lines, or fill gaps with --data.gaps",
    ),
    "many faults": ("a,label\n" + "red,x\nblue,y\n" * 9, "t.csv has 18 faults: .*; and 12 more; "),
    "underlined": ("a,label\n1_1,x\n2,y\n", "line 2 of .* has '1_1' in column 'a', which is not a finite number"),
    "full-width": ("a,label\n１,x\n2,y\n", "in column 'a', which is not a finite number"),
    "beyond floats": ("a,label\n1e999,x\n2,y\n", "'1e999' in column 'a', which is not a finite number"),
    "not a number": ("a,label\nnan,x\n2,y\n", "'nan' in column 'a'"),
    "comma": ('a,label\n"1,5",x\n2,y\n', "'1,5' in column 'a'"),
    "spaced": ("a,label\n1 2,x\n2,y\n", "'1 2' in column 'a'"),
    "long ids": (
        "a,label\n9007199254740993,x\n9007199254740992,y\n",
        "9007199254740993 and 9007199254740992 in column 'a' .* are the same as floating-point numbers",
    ),
    "nameless": ("a,,label\n1,0.5,x\n2,0.7,y\n", "column 2 of .* has no name; name it, or take it out"),
    "label twice": ("a,label,label\n1,x,x\n2,y,x\n", "two columns called 'label'"),
    "two spellings": ("a,label\n1,caf\u00e9\n2,cafe\u0301\n", "spells the class .* in two ways"),
    "NUL": (b"a,label\n\x00,x\n2,y\n", "in column 'a', which is not a finite number"),
    "one row per class": ("a,label\n1,x\n2,y\n3,z\n", "too few to take one from"),
    "huge": ("a,y\n1e300,x\n-1e300,y\n1e300,x\n-1e300,y\n", "too large for a mean and a standard deviation"),
}


ROWS = "größe,b,label\n" + "".join(f"{i}.5,{i * i % 7},{'xy'[i % 2]}\n" for i in range(40))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_one_sentence_before_anything_is_written(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, sentence = WRONG[case]
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LayerwiseError, match=sentence):
        data.load("t.csv", val_fraction=0)
    assert main(["train", "--data", "t.csv", "--val-fraction", "0"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("layerwise: ")
    assert [path.name for path in tmp_path.iterdir()] == (["t.csv"] if content is not None else [])


def test_a_column_of_row_numbers_is_no_feature(tmp_path):
    rows = [[i, float(i % 7) / 2, i % 2] for i in range(40)]
    shuffled = [rows[i * 7 % 40] for i in range(40)]
    for names, body in (
        (("", "a", "label"), rows),
        (("Unnamed: 0", "a", "label"), rows),
        ((" ", "a", "label"), shuffled),  # a table that was shuffled before it was written
    ):
        found = data.load(write(tmp_path / "t.csv", body, names), val_fraction=0)
        assert found.columns == ("a",)
        assert any("column 1 of" in note and "numbers the rows" in note for note in found.notes)
    found = data.load(write(tmp_path / "t.csv", rows, ("id", "a", "label")), val_fraction=0)
    assert found.columns == ("id", "a") and any("column 'id'" in note for note in found.notes)
    (tmp_path / "t.csv").write_text("a,label,\n" + "".join(f"{i % 7},{i % 2},\n" for i in range(20)))
    found = data.load(str(tmp_path / "t.csv"), val_fraction=0)
    assert found.columns == ("a",) and any("no content" in note for note in found.notes)


@pytest.mark.parametrize("name", ["run_12:30.csv", "TABLE.CSV", "C:\\tables\\t.csv", "a: b.Csv"])
def test_a_path_that_ends_in_csv_is_a_table_whatever_else_is_in_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, [[i, i * i % 5, i % 2] for i in range(20)])
    assert data.load(name, val_fraction=0).columns == data.load(tmp_path / name, val_fraction=0).columns == NAMES[:2]
    assert data.describe(name) == data.describe("PATH.csv")


@pytest.mark.slow
def test_the_time_grows_with_the_columns_not_with_their_square(tmp_path):
    wide = 60_000
    names = [f"c{i}" for i in range(wide)] + ["label"]
    cells = ",".join(["1"] * wide)
    (tmp_path / "t.csv").write_text(",".join(names) + "\n" + "".join(f"{cells},{kind}\n" for kind in "xyxyxy"))
    started = time.process_time()
    found = data.load(str(tmp_path / "t.csv"), val_fraction=0)
    assert len(found.columns) == wide
    assert time.process_time() - started < 5  # the square of it takes minutes


def test_what_is_no_file_of_text_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "folder.csv", "nothing.csv", "n" * 300 + ".csv", "a\0.csv", "line\nbreak.csv"):
        with pytest.raises(LayerwiseError, match="give the path of a CSV file") as caught:
            data.load(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(LayerwiseError, match="is a device, not a file"):
        data.load(_linked(tmp_path / "zero.csv"))
    with (tmp_path / "sparse.csv").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(LayerwiseError, match="is held in memory"):
        data.load(str(tmp_path / "sparse.csv"))


def _linked(path):
    path.symlink_to("/dev/zero")
    return str(path)


@pytest.mark.parametrize("words", ["--augment crop", "--image-size 4"])
def test_a_row_is_no_image(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blobs(tmp_path / "t.csv")
    assert main(["train", "--data", "t.csv", "--batch-size", "16", *words.split()]) == 2
    assert "of a table are not images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.slow
def test_boosting_trains_on_a_table_and_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, values, labels = blobs(tmp_path / "t.csv")
    words = split("train --rule boosted --rule.updates 15 --model mlp --model.width 16 --data t.csv --batch-size 64")
    assert main([*words, *split("--steps 45 --lr 0.02 --save-every 1000 --out run")]) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_accuracy"] > 0.95
    assert main(["eval", "run"]) == 0
    capsys.readouterr()
    # To predict, no label is needed, and other columns and their order do not matter.
    write(tmp_path / "new.csv", [["?", b, a] for a, b in values.tolist()], ["note", "weight", "height"])
    assert main(["predict", "run", "new.csv"]) == 0
    told = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["input"] for row in told] == [str(i) for i in range(120)]
    assert np.mean([row["class"] == label for row, label in zip(told, labels, strict=True)]) > 0.95
    write(tmp_path / "less.csv", [[1, 2]], ["height", "mass"])
    assert main(["predict", "run", "less.csv"]) == 2
    assert "less.csv has no column 'weight'; its columns are height, mass" in capsys.readouterr().err
    blobs(tmp_path / "t.csv", samples=150)
    assert main(["train", "--resume", "run"]) == 2
    assert "t.csv has changed since the run began" in capsys.readouterr().err


@pytest.mark.slow
def test_views_of_rows_teach_without_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blobs(tmp_path / "t.csv")
    words = split("train --rule ssl_local --model.width 16 --data t.csv --batch-size 64 --steps 40 --lr 0.02 --out run")
    assert main([*words, "--save-every", "1000"]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] > 0.5  # of three classes


@pytest.mark.parametrize("word", ["nan", "NaN", "null", "NULL", "", "  ", "<NA>", "N/A"])
def test_a_missing_label_is_no_class(word, tmp_path):
    write(tmp_path / "t.csv", [[i, i * i % 5, "ab"[i % 2] if i != 7 else word] for i in range(20)])
    with pytest.raises(LayerwiseError, match=r"line 9 of .* has no label in column 'label'"):
        data.load(str(tmp_path / "t.csv"), val_fraction=0)


@pytest.mark.parametrize("words", [("NA", "b"), ("None", "some")])
def test_a_class_that_may_be_a_missing_label_is_told_of(words, tmp_path):
    write(tmp_path / "t.csv", [[i, i * i % 5, words[i % 2]] for i in range(20)])
    found = data.load(str(tmp_path / "t.csv"), val_fraction=0)
    assert set(found.classes) == set(words)
    assert [note for note in found.notes if "looks like a missing label" in note and words[0] in note]


def test_a_table_that_was_saved_twice_has_two_columns_of_row_numbers(tmp_path):
    body = [[i, i, i * i % 5, i % 2] for i in range(20)]
    found = data.load(write(tmp_path / "t.csv", body, ("Unnamed: 0.1", "Unnamed: 0", "a", "label")), val_fraction=0)
    assert found.columns == ("a",)
    assert sum("numbers the rows" in note for note in found.notes) == 2


def test_targets_that_single_precision_would_merge_are_refused(tmp_path):
    """Sixty of them lie within half of a step of float32 at 1.7e9, which is 128."""
    large = write(tmp_path / "large.csv", [(i % 7, i % 5, 1_700_000_000 + i) for i in range(60)])
    with pytest.raises(LayerwiseError, match="column 'label' are so large compared with their differences"):
        data.load(large, task="regression")
    small = write(tmp_path / "small.csv", [(i % 7, i % 5, i / 3) for i in range(60)])
    assert data.load(small, task="regression").train.labels.unique().numel() > 30
    same = write(tmp_path / "same.csv", [(i % 7, i % 5, 1_700_000_001) for i in range(60)])
    data.load(same, task="regression")  # nothing to merge


def test_long_whole_numbers_with_a_point_are_told_apart_too(tmp_path):
    rows = [(f"{10**16 + i % 2}.0", i, "ab"[i % 2]) for i in range(40)]
    with pytest.raises(LayerwiseError, match="are the same as floating-point numbers"):
        data.load(write(tmp_path / "long.csv", rows))


def test_a_network_that_answers_nan_has_no_accuracy_and_no_predictions(tmp_path, capsys):
    table = write(tmp_path / "rows.csv", [(i % 7, i % 5, "ab"[i % 2]) for i in range(120)])
    words = f"train --data {table} --model.width 8 --batch-size 32 --steps 1 --threads 1"
    broken = split(f"{words} --lr 1e30 --optimizer sgd --schedule constant --out {tmp_path / 'broken'}")
    assert main(broken) == 2
    assert "the network answers with NaN" in capsys.readouterr().err
    assert not (tmp_path / "broken" / "result.json").exists()
    assert main(split(f"{words} --out {tmp_path / 'run'}")) == 0
    far = write(tmp_path / "far.csv", [(1, 2), ("1e39", 2)], NAMES[:2])
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), far]) == 2
    out, err = capsys.readouterr()
    assert "output for the input 1 is not finite" in err and not out


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (ROWS.replace(",", ";").encode(), "separated by semicolons"),
        (ROWS.replace(",", "\t").encode(), "separated by tabs"),
        (ROWS.replace(",", "|").encode(), "separated by bars"),
        (ROWS.replace(",", ";").replace(".5", ",5").encode(), "read as decimal points"),
        (ROWS.encode("utf-16"), "read as UTF-16"),
        (ROWS.encode("cp1252"), "is not UTF-8 and is read as Windows-1252"),
    ],
)
def test_separator_and_encoding_are_found_and_told(content, note, tmp_path):
    (tmp_path / "usual.csv").write_text(ROWS, encoding="utf-8")
    (tmp_path / "t.csv").write_bytes(content)
    usual, found = data.load(tmp_path / "usual.csv"), data.load(tmp_path / "t.csv")
    assert any(note in said for said in found.notes)
    assert torch.equal(found.train.images, usual.train.images)
    assert (found.classes, found.columns) == (usual.classes, usual.columns)


def test_words_and_gaps_become_numbers_by_the_training_rows_alone(tmp_path):
    """One-hot by hand, the mean by hand: over the rows of the training split, and no others."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 100, (60,), generator=draw).tolist()
    rows = [["" if i % 7 == 0 else str(sizes[i]), "red" if i % 3 else "blue", "ab"[i % 2]] for i in range(60)]
    (tmp_path / "t.csv").write_text("size,colour,kind\n" + "\n".join(map(",".join, rows)))
    found = data.load(tmp_path / "t.csv", targets=["kind"], handling=data.Handling("onehot", "mean"))
    assert found.columns == ("size", "colour=blue", "colour=red")
    plain = data.load(tmp_path / "t.csv", targets=["kind"], handling=data.Handling("onehot", "median"))
    train = found.train.images.flatten(1)
    gaps = train[:, 0] != plain.train.images.flatten(1)[:, 0]  # where the two fill differently
    known = train[~gaps, 0]
    assert 0 < int(gaps.sum()) < len(train)
    torch.testing.assert_close(train[gaps, 0], known.mean().expand(int(gaps.sum())))
    for part in (found.train, found.val, found.test):
        values = part.images.flatten(1)
        assert torch.equal(values[:, 1] + values[:, 2], torch.ones(len(values)).double())
    assert found.test.images.flatten(1)[:, 0].isfinite().all()
    torch.testing.assert_close(torch.tensor(found.mean).double(), train.mean(0))


def test_a_word_that_only_the_test_rows_have_is_all_zeros():
    cells = np.array([["red"], ["blue"]], dtype=object)
    learned = Encoding.fitted(["colour"], cells, data.Handling("onehot"))
    assert learned.numbers(np.array([["green"]], dtype=object)).flatten().tolist() == [0.0, 0.0]


def from_weights_alone(file, rows):
    """Predictions from nothing but a file of weights and what its metadata says; rows of (size, colour)."""
    with safe_open(file, "pt") as opened:
        about = {name: json.loads(text) for name, text in opened.metadata().items()}
    inputs = []
    for size, colour in rows:
        cells = {"size": size, "colour": colour}
        numbers = {}
        for name, words, fill in about["encoding"]:
            cell = cells[name] or fill
            numbers |= {f"{name}={word}": float(cell == word) for word in words} if words else {name: float(cell)}
        inputs.append([numbers[name] for name in about["columns"]])
    x = (torch.tensor(inputs) - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    model = models.create("mlp", about["shape"], len(about["classes"]), width=16)
    model.load_state_dict(load_file(file))
    return [about["classes"][i] for i in model.eval()(x[:, :, None, None].float()).argmax(1)]


def test_a_run_predicts_rows_with_words_and_gaps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ["" if i % 5 == 0 else f"{i},5" for i in range(80)]
    rows = ["colour;size;kind", *(f"{('blue', 'red')[i % 2]};{size};{i % 2}" for i, size in enumerate(sizes))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    words = split("--data t.csv --data.label-column kind --data.categories onehot --data.gaps median --steps 60")
    words += split("--lr 0.01 --batch-size 16 --model.width 16 --out run")
    assert main(["train", *words]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["categories"], config["gaps"], config["targets"]) == ("onehot", "median", ["kind"])
    (tmp_path / "new.csv").write_text("size,colour\n,red\n3,blue\n7.5,red\n")
    capsys.readouterr()
    assert main(["predict", "run", "new.csv"]) == 0
    told = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(",")[1] for line in told] == ["1", "0", "1"]
    by_hand = from_weights_alone(tmp_path / "run" / "model.safetensors", [("", "red"), ("3", "blue"), ("7.5", "red")])
    assert [line.split(",")[1] for line in told] == by_hand
    (tmp_path / "new.csv").write_text("size,colour\nbig,red\n")
    assert main(["predict", "run", "new.csv"]) == 2
    assert "line 2 of new.csv has 'big' in column 'size', which holds numbers" in capsys.readouterr().err
    assert main(["eval", "run"]) == 0  # the data are read again, and are the same
    assert "head/accuracy" in capsys.readouterr().out


def test_what_is_told_of_numbers_is_told_beside_words_and_gaps_too(tmp_path):
    """Ids beyond 2^53, columns that count the rows, and the line of a cell, with --data.categories and --data.gaps."""
    both = data.Handling("onehot", "median")
    rows = [[100 + i if i % 4 else "", 0.5 * i, ("red", "", "blue")[i % 3], i % 2] for i in range(60)]
    names = ("id", "half", "colour", "label")
    notes = data.load(write(tmp_path / "t.csv", rows, names), handling=both).notes
    assert [note for note in notes if "counts the rows" in note and "'id'" in note]
    assert not [note for note in notes if "'half'" in note or "'colour'" in note]
    for row in rows:
        row[0] = row[0] and 2**53 + row[0]
    with pytest.raises(LayerwiseError, match=r"in column 'id' of .* are the same as floating-point numbers"):
        data.load(write(tmp_path / "t.csv", rows, names), handling=both)
    told = {}
    for strange in range(30):  # a word among the numbers of the rows that are not trained on
        rows = [[i % 5, i % 7 if i != strange else "many", i % 2] for i in range(30)]
        try:
            data.load(write(tmp_path / "t.csv", rows), handling=both)
        except LayerwiseError as error:
            told[strange] = str(error)
    assert 0 < len(told) < 15
    assert all(f"line {row + 2} of {tmp_path / 't.csv'} has 'many' in column" in said for row, said in told.items())
    rows = [[i % 5, 2 if i == 3 else i % 2, i % 2] for i in range(40)]
    with pytest.raises(LayerwiseError, match=r"line 5 of .* has 2 in the column 'weight', which is not 0 or 1"):
        data.load(write(tmp_path / "t.csv", rows), task="multilabel", targets=["weight", "label"])


@pytest.mark.parametrize("words", ["--data.categories onehot", "--data.gaps mean"])
def test_images_have_no_words_and_no_gaps(words, capsys):
    assert main(["train", *words.split()]) == 2
    assert "is not a table of numbers and words; leave --data.categories and --data.gaps out" in capsys.readouterr().err


def test_another_column_with_a_usual_name_of_labels_is_told_of(tmp_path):
    rows = [(i * 1.5, i % 3, "xy"[i % 2]) for i in range(40)]
    write(tmp_path / "t.csv", rows, ("a", "target", "label"))
    path = str(tmp_path / "t.csv")
    (told,) = [note for note in data.load(path, val_fraction=0).notes if "label-column" in note]
    assert "are those of column 'label', and column 'target' is one of the numbers" in told
    write(tmp_path / "t.csv", rows, ("a", "b", "label"))
    assert not [note for note in data.load(path, val_fraction=0).notes if "label-column" in note]
