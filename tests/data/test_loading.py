"""Data sets by name: those of the hub, and errors in one sentence."""

import os
import struct
import sys

import pytest
import torch
from support.images import pa, png, pq, refused, write_folder, write_parquet, write_split_parquet
from support.pixels import noise

from layerwise.data import describe, load, names
from layerwise.errors import LayerwiseError


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
    refused("only the class '1'", f"parquet:{path}")


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
    refused("only the class 'cat'", f"imagefolder:{tmp_path}")
    (tmp_path / "dog").mkdir()
    refused("class folder .*dog holds no images", f"imagefolder:{tmp_path}")
    (tmp_path / "dog" / "a.png").write_bytes(b"text")
    refused("dog/a.png is not a readable image", f"imagefolder:{tmp_path}")


def test_missing_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", noise(4), [0, 1] * 2)
    missing = {"mnist": ["datasets"], "digits": ["sklearn", "sklearn.datasets"], f"parquet:{tmp_path}": ["pyarrow"]}
    for name, modules in missing.items():
        with monkeypatch.context() as patch:
            for module in modules:
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


@pytest.mark.parametrize("name", ["../things", "/etc", "a/b/c", "a\nb", "./a", "a/", "~/a", "a b", "-x"])
def test_the_hub_is_asked_for_names_alone(name, monkeypatch):
    """`datasets` would read a folder of that path."""
    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", pytest.fail)
    refused("is not the name of a data set on the Hugging Face hub", f"hf:{name}")


def test_a_folder_here_is_not_taken_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", pytest.fail)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refused("is a folder here, too", "hf:owner/name")


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import layerwise.data",
        "import layerwise.cli.main as m; m.main('train --steps 1 --out run'.split())",
    ],
)
def test_what_is_not_needed_is_not_imported(code, tmp_path):
    import subprocess

    heavy = ("datasets", "PIL", "sklearn", "pandas", "pyarrow")
    code = f"import sys; {code}; print([m for m in {heavy} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
