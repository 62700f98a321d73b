"""`layerwise report DIR` on a folder from someone else: it writes in DIR only, reads files of DIR only, never hangs."""

import json
import os
import shutil
from xml.etree import ElementTree

import pytest

from layerwise import LayerwiseError
from layerwise.cli.main import main
from layerwise.report import reading

pytest.importorskip("matplotlib", reason="the report extra is not installed")
EVIL = "../../<b>&$x$\x07_é"


@pytest.fixture
def place(comparison, tmp_path):
    place = tmp_path / "outer" / "out"
    shutil.copytree(comparison, place)
    return place


def outside(place):
    return {path for path in place.parent.rglob("*") if place not in path.parents and path != place}


def refused(place, capsys):
    capsys.readouterr()
    assert main(["report", str(place)]) == 2
    err = capsys.readouterr().err.removeprefix("drawing the report\n")
    assert err.startswith("layerwise: ") and err.count("\n") == 1 and "unexpected" not in err
    return err


@pytest.mark.slow
def test_names_in_the_folder_never_become_paths(place):
    for file in place.glob("runs/*/*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if line["split"] == "test":
                line["block1/" + EVIL] = 0.5
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    row = {"rule": EVIL, "model": "../../" + EVIL, "depth": 4, "gradients": 10, "activations": 10}
    (place / "mine.json").write_text(json.dumps([row, row | {"depth": 8}]))
    assert main(["report", str(place)]) == 0
    assert outside(place) == set()
    figures = [file for file in (place / "figures").iterdir() if file.suffix == ".svg"]
    assert len(figures) == 22 + 2
    for file in figures:
        assert "<b>" not in file.read_text()
        ElementTree.parse(file)
    page = (place / "report.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page and "\x07" not in page


@pytest.mark.slow
def test_a_link_is_not_followed_out_of_the_folder(place, capsys, tmp_path):
    (tmp_path / "theirs").mkdir()
    secret = tmp_path / "theirs" / "secret"
    secret.write_text("mine")
    (place / "report.html.partial").symlink_to(secret)
    (place / "figures" / "layers_cka.svg").unlink()
    (place / "figures" / "layers_cka.svg").symlink_to(secret)
    assert main(["report", str(place)]) == 0
    assert secret.read_text() == "mine"
    shutil.rmtree(place / "figures")
    (place / "figures").symlink_to(tmp_path / "theirs")
    assert "is not a folder of its own" in refused(place, capsys)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["secret"]
    (place / "figures").unlink()
    shutil.move(place / "environment.json", tmp_path / "environment.json")
    (place / "environment.json").symlink_to(tmp_path / "environment.json")
    assert "environment.json" in refused(place, capsys)


@pytest.mark.parametrize("name", ["summary.json", "compare.json", "results.csv", "runs/backprop/seed0/metrics.jsonl"])
def test_pipes_folders_and_missing_files_are_a_sentence(place, capsys, name):
    (place / name).unlink()
    if name != "summary.json":
        assert name.rpartition("/")[2] in refused(place, capsys)
    os.mkfifo(place / name)
    assert name.rpartition("/")[2] in refused(place, capsys)
    (place / name).unlink()
    (place / name).mkdir()
    assert name.rpartition("/")[2] in refused(place, capsys)


@pytest.mark.slow
def test_a_pipe_beside_the_files_is_passed_over(place):
    os.mkfifo(place / "other.json")
    assert main(["report", str(place)]) == 0


DAMAGE = {
    "torn": b'{"rules": ',
    "binary": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
    "list": b"[]",
    "number": b"7",
    "null": b"null",
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["summary.json", "compare.json", "environment.json", "runs/sll/seed1/result.json"])
def test_damaged_json_is_a_sentence(place, capsys, name, damage):
    (place / name).write_bytes(DAMAGE[damage])
    assert name.rpartition("/")[2] in refused(place, capsys)


def test_tables_of_classes_are_square(place, capsys):
    file = place / "runs/sll/seed0/diagnostics.json"
    found = json.loads(file.read_text())
    found["confusion"]["block2"][3].pop()
    file.write_text(json.dumps(found))
    assert "blocks are of different classes" in refused(place, capsys)


def test_filters_are_pictures(place, capsys):
    file = place / "runs/sll/seed0/diagnostics.json"
    found = json.loads(file.read_text())
    found["filters"]["pixels"][1] = found["filters"]["pixels"][1][4:]
    file.write_text(json.dumps(found))
    assert "the filters are no pictures" in refused(place, capsys)


KINDS = {
    "summary.json": reading.Summary,
    "compare.json": reading.CompareRecord,
    "environment.json": reading.Machine,
    "runs/sll/seed0/result.json": reading.Result,
    "runs/sll/seed0/diagnostics.json": reading.Diagnostics,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_field_has_its_type(comparison, tmp_path, name):
    """Each value in turn becomes one of another type: it is refused, unless it is a field that no report uses."""
    whole, refusals = (comparison / name).read_text(), 0
    for path in leaves(json.loads(whole)):
        for value in ([[]], {"a": []}, -(10**400)):
            changed = target = json.loads(whole)
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
            (tmp_path / "file.json").write_text(json.dumps(changed))
            try:
                read = reading.read_record(tmp_path, "file.json", KINDS[name])
            except LayerwiseError as reason:
                refusals += "file.json is damaged" in str(reason)
            else:
                assert path[0] == "fixed" or path not in list(leaves(read)), path
    assert refusals > 20


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif path:
        yield path


@pytest.mark.parametrize("change", [
    {"depth": "4"}, {"depth": -1}, {"activations": None}, {"rule": ["sll"]}, {"rule": ""}, {"rule": "x" * 1000},
])  # fmt: skip
def test_rows_of_a_benchmark_are_checked(tmp_path, capsys, change):
    row = {"rule": "sll", "model": "mlp", "depth": 4, "gradients": 10, "activations": 10}
    (tmp_path / "mine.json").write_text(json.dumps([row, row | {"depth": 8} | change]))
    assert "mine.json is damaged" in refused(tmp_path, capsys)
