"""A comparison whose folder is damaged, repeated: its runs are trained again, and no figure of another run is taken."""

import csv
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.runs import COMPARE, TIMING

from layerwise.cli.main import main
from layerwise.compare.grid_runs import GridRun, discard_damaged
from layerwise.errors import LayerwiseError
from layerwise.measure.validate import run_findings
from layerwise.report import page
from layerwise.runs.folders import read_options
from layerwise.runs.options import TrainOptions


@pytest.fixture
def folder(comparison, tmp_path):
    """A copy of a finished comparison."""
    return shutil.copytree(comparison, tmp_path / "out")


def run_in(folder, place="runs/sll/seed0"):
    return GridRun("sll", "sll seed 0", replace(read_options(folder / place), out=str(folder / place)))


def rows(folder):
    table = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMING} for row in table]


def edited(file, *path, value):
    whole = at = json.loads(file.read_text())
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    file.write_text(json.dumps(whole))


def replaced_by_folder(file):
    file.unlink()
    file.mkdir()


def replaced_by_pipe(file):
    file.unlink()
    os.mkfifo(file)


DAMAGES = {
    "result of another seed": lambda own, other: shutil.copy(other / "result.json", own),
    "log of another seed": lambda own, other: shutil.copy(other / "metrics.jsonl", own),
    "outcomes of another seed": lambda own, other: shutil.copy(other / "test_correct.npy", own),
    "options of another seed": lambda own, other: shutil.copy(other / "config.json", own),
    "accuracy": lambda own, other: edited(own / "result.json", "test_accuracy", value=0.99),
    "validation": lambda own, other: edited(own / "result.json", "val_accuracy", value=0.99),
    "loss": lambda own, other: edited(own / "result.json", "test_loss", value=0.5),
    "validation loss": lambda own, other: edited(own / "result.json", "val_loss", value=0.5),
    "no number": lambda own, other: edited(own / "result.json", "test_accuracy", value="high"),
    "half a result": lambda own, other: (own / "result.json").write_text('{"steps": 1'),
    "no outcomes": lambda own, other: (own / "test_correct.npy").unlink(),
    "no options": lambda own, other: (own / "config.json").unlink(),
    "a folder": lambda own, other: replaced_by_folder(own / "result.json"),
    "a pipe": lambda own, other: replaced_by_pipe(own / "metrics.jsonl"),
    "other outcomes": lambda own, other: np.save(own / "test_correct.npy", np.ones(359, bool)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_of_a_finished_run_is_found_and_its_folder_discarded(folder, name, capsys):
    own, other = folder / "runs/sll/seed0", folder / "runs/sll/seed1"
    whole = GridRun("sll", "sll seed 0", TrainOptions(out=str(own)))
    assert whole.damage() is None
    DAMAGES[name](own, other)
    discard_damaged([whole], folder)
    assert "note: sll seed 0 is trained again, because " in capsys.readouterr().err
    assert not own.exists()
    assert other.exists()


def test_a_damaged_failure_is_discarded_and_a_whole_one_kept(folder):
    own = folder / "runs/sll/seed0"
    run = run_in(folder)
    shutil.rmtree(own)
    own.mkdir()
    (own / "failed.json").write_text('{"kind": "diverged", "reason": "x"}')
    discard_damaged([run], folder)
    assert run.settled
    (own / "failed.json").write_text('{"kind": 3}')
    discard_damaged([run], folder)
    assert not own.exists()


def test_links_between_runs_and_out_of_the_folder(folder, tmp_path):
    """A link to another run is removed, and what it leads to is kept; one out of the folder is refused."""
    own, other = folder / "runs/sll/seed0", folder / "runs/sll/seed1"
    run = run_in(folder)
    shutil.rmtree(own)
    own.symlink_to("seed1")
    discard_damaged([run], folder)
    with pytest.raises(LayerwiseError, match="holds a run with seed = 1, not 0"):
        run.check()
    edited(other / "result.json", "test_loss", value=0.5)
    discard_damaged([run], folder)
    assert (other / "result.json").exists()
    assert not own.is_symlink()
    outside = tmp_path / "outside"
    other.rename(outside)
    own.symlink_to(outside)
    with pytest.raises(LayerwiseError, match=r"seed0 is a link out of .*out; put the folder itself there"):
        discard_damaged([run], folder)
    assert (outside / "result.json").exists()


@pytest.mark.slow
def test_the_repeated_command_gives_the_table_of_the_first(folder, capsys, monkeypatch):
    monkeypatch.setattr(page, "write_report", lambda folder: folder)  # drawing takes long
    before = rows(folder)
    results = [folder / f"runs/sll/seed{seed}/result.json" for seed in (0, 1)]
    texts = [file.read_text() for file in results]
    for file, text in zip(results, reversed(texts), strict=True):
        file.write_text(text)
    edited(folder / "runs/backprop/seed0/diagnostics.json", "command", value="layerwise train")
    assert main([*COMPARE, "--jobs", "1", "--out", str(folder)]) == 0
    said = capsys.readouterr().err
    for seed in (0, 1):
        assert f"sll seed {seed} is trained again, because" in said
    assert "diagnostics.json is damaged (it is of another run); the run is diagnosed again" in said
    assert rows(folder) == before
    assert json.loads((folder / "runs/backprop/seed0/diagnostics.json").read_text())["command"] != "layerwise train"


@pytest.mark.parametrize(
    ("file", "path", "sentence"),
    [
        (
            "summary.json",
            ("rules", "sll", "test_accuracy", "mean"),
            "summary.json has other figures of sll than its runs",
        ),
        ("summary.json", ("rules", "sll", "n"), "summary.json has other figures of sll than its runs"),
        ("runs/sll/seed0/diagnostics.json", ("command",), "diagnostics.json is damaged (it is of another run)"),
        ("runs/sll/seed0/result.json", ("test_loss",), "one of them is of another run"),
    ],
)
def test_a_report_of_files_that_do_not_belong_together_is_refused(folder, file, path, sentence, capsys):
    edited(folder / file, *path, value="x" if path == ("command",) else 1)
    assert main(["report", str(folder)]) == 2
    assert sentence in capsys.readouterr().err


def test_validate_compares_the_files_too(folder):
    own, other = folder / "runs/sll/seed0", folder / "runs/sll/seed1"
    assert all(holds for holds, _ in run_findings(own))
    shutil.copy(other / "metrics.jsonl", own)
    assert [words for holds, words in run_findings(own) if not holds and "metrics.jsonl" in words]
