"""The folder of a run: one process at a time, nothing deleted too early, nothing lost without a message."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.runs import SMALL, contents, lines, result, split, train, weights

from layerwise import LayerwiseError, rules
from layerwise.cli.main import main
from layerwise.runs import checkpoint, folders, writing
from layerwise.runs.folders import Claim, check_unchanged, read_options
from layerwise.runs.options import TrainOptions, to_mapping

WORDS = split("--steps 4 --save-every 2")


def begin(folder, *words):
    return main(["train", *SMALL, *WORDS, "--out", str(folder), *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished") / "run", *WORDS)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


class Crash(BaseException):
    """Stands for SIGKILL: no handler runs."""


@contextmanager
def crashing(monkeypatch, name, error=Crash):
    """A context in which writing this file ends in an error, half-written."""
    real = writing.write_atomically

    def write(path, content):
        if path.name == name:
            path.with_name(path.name + ".partial").write_text(content[:10])
            raise error
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("layerwise.runs.training.write_atomically", write)
        yield


@pytest.mark.parametrize("inside", [".", "deep/er"])
def test_overwrite_does_not_replace_the_current_folder(run, monkeypatch, capsys, inside):
    (run / inside).mkdir(parents=True, exist_ok=True)
    before = contents(run)
    monkeypatch.chdir(run / inside)
    assert begin("." if inside == "." else run, "--overwrite") == 2
    assert "go to another folder first" in capsys.readouterr().err
    assert contents(run) == before


def test_overwrite_keeps_what_the_new_run_needs(run, capsys):
    """Its own data lie in the folder that is to be deleted."""
    table = run / "rows.csv"
    table.write_text("a,label\n" + "".join(f"{i % 7},{i % 2}\n" for i in range(800)))
    before = contents(run)
    assert begin(run, "--overwrite", "--data", str(table)) == 2
    assert "which the run needs, lies in" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.parametrize("what", ["folder", "file"])
def test_overwrite_deletes_nothing_beside_the_run(run, capsys, what):
    aside = run.with_name(f".{run.name}.replaced")
    mine = aside / "mine.txt" if what == "folder" else aside
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("precious")
    before = contents(run)
    assert begin(run, "--overwrite") == 2
    assert "is not a run and is not deleted; move it away" in capsys.readouterr().err
    assert mine.read_text() == "precious"
    assert contents(run) == before


def test_what_a_killed_deletion_has_left_is_deleted(run):
    aside = run.with_name(f".{run.name}.replaced")
    (aside / "checkpoints").mkdir(parents=True)
    (aside / "metrics.jsonl").write_text("")
    assert begin(run, "--overwrite") == 0
    assert not aside.exists()


def test_overwrite_follows_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert begin(tmp_path / "link", "--overwrite", "--seed", "7") == 0
    assert result(run)["seed"] == 7
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link"}


@pytest.mark.parametrize("words", [["--overwrite"], []])
def test_a_live_run_is_left_alone(run, capsys, words):
    before = contents(run)
    claim = Claim(run)
    assert begin(run, *words) == 2
    assert main(["train", "--resume", str(run)]) == 2
    claim.release()
    assert capsys.readouterr().err.count("another run is running in") == 2
    assert contents(run) == before
    assert main(["train", "--resume", str(run)]) == 0


def test_a_refused_run_gives_its_claim_up(run, capsys):
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").unlink()
    assert main(["train", "--resume", str(run)]) == 2
    assert "every checkpoint" in capsys.readouterr().err
    assert begin(run, "--overwrite") == 0


def test_a_run_that_was_killed_at_its_beginning_can_begin_again(tmp_path, monkeypatch, finished):
    folder = tmp_path / "run"
    with crashing(monkeypatch, "config.json"), pytest.raises(Crash):
        begin(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json.partial"}
    assert begin(folder) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(finished).values(), strict=True))


def test_a_replacement_that_was_killed_has_deleted_nothing(run, monkeypatch):
    before = contents(run)
    with crashing(monkeypatch, "config.json"), pytest.raises(Crash):
        begin(run, "--overwrite")
    assert contents(folders.set_aside(run)) == before
    assert begin(run, "--overwrite") == 0
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_replacement_on_a_full_disk_puts_the_old_run_back(run, monkeypatch, capsys):
    before = contents(run)
    with crashing(monkeypatch, "config.json", LayerwiseError("could not write (No space left on device).")):
        assert begin(run, "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert contents(run) == before
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_names_that_are_taken_meanwhile_are_passed_over(tmp_path, monkeypatch):
    """Two runs without a name that begin at once get a folder each."""
    monkeypatch.chdir(tmp_path)
    claims = [folders.new_folder(TrainOptions()) for _ in range(3)]
    names = [claim.folder.name for claim in claims]
    assert names == ["digits-mlp-sll-seed0", "digits-mlp-sll-seed0-2", "digits-mlp-sll-seed0-3"]


# What is lost is told


def emptied(run):
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)


def deleted(run):
    shutil.rmtree(run / "checkpoints")


def a_file(run):
    deleted(run)
    (run / "checkpoints").write_text("")


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("damage", [emptied, deleted, a_file])
def test_lost_checkpoints_do_not_begin_a_run_anew(run, capsys, damage, done):
    damage(run)
    if not done:
        (run / "result.json").unlink()
        (run / "model.safetensors").unlink()
    before = contents(run)
    assert main(["train", "--resume", str(run)]) == 2
    assert "checkpoints" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without rights")
@pytest.mark.parametrize("part", [".", "config.json", "checkpoints", "checkpoints/step-000000004/state.json"])
def test_what_may_not_be_read_is_not_absent(run, monkeypatch, part):
    for path in run.parents:
        if "pytest-of" in str(path):
            path.chmod(0o755)
    (run / part).chmod(0)
    os.seteuid(65534)
    try:
        reading = read_options if "checkpoint" not in part else lambda run: checkpoint.load_latest(run / "checkpoints")
        with pytest.raises(LayerwiseError, match="Permission denied") as caught:
            reading(run)
        assert not isinstance(caught.value, checkpoint.CorruptCheckpoint)
    finally:
        os.seteuid(0)


# Names that no folder can have


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "a\0b", "/proc/run"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for words in (["--out", name], ["--out", name, "--overwrite"]):
        assert main(["train", *SMALL, *WORDS, *words]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "choose another --out" in err, err
    assert main(["train", "--resume", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", [".", "..", "x" * 300, "a\0b", "no/such/file", "run/config.json/x"])
def test_a_file_that_cannot_be_written_is_refused(run, capsys, monkeypatch, name):
    monkeypatch.chdir(run.parent)
    before = contents(run.parent)
    assert main(["export", str(run), name]) == 2
    assert "could not write" in capsys.readouterr().err
    assert contents(run.parent) == before


CONFIGS = {
    "text": b"lr = 3",
    "deep": b"[" * 50_000,
    "no text": b"\xff\xfe{}",
    "twice": b'{"lr": 0.1, "lr": 0.2}',
    "digits": b'{"epochs": ' + b"9" * 5000 + b"}",
    "huge": b'{"lr": 1' + b"0" * 400 + b"}",
    "huge whole number": b'{"seed": 1' + b"0" * 400 + b"}",
    "infinite": b'{"lr": 1e999}',
    "no number": b'{"lr": NaN}',
    "list": b"[]",
    "rule": b'{"rule": {"name": ["sll"]}}',
    "model": b'{"model": {"name": null}}',
    "type": b'{"augment": "flip"}',
    "threads": b'{"threads": 1000000}',
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("command", [["train", "--resume"], ["eval"], ["validate"]])
def test_a_damaged_config_is_one_sentence(run, capsys, command, name):
    (run / "config.json").write_bytes(CONFIGS[name])
    before = contents(run)
    code = main([*command, str(run)])
    assert code in ((1, 2) if command == ["validate"] else (2,))
    out, err = capsys.readouterr()
    assert len(max((out + err).splitlines(), key=len)) < 600
    assert contents(run) == before


def test_half_a_line_and_foreign_lines_of_the_log_are_dropped(run):
    wanted = lines(run)
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '[1]\n{"step": "x", "split": "val"}\n' + "[" * 9999 + '\n{"step": 3, "sp')
    assert main(["train", "--resume", str(run)]) == 0
    assert lines(run) == wanted


def test_a_full_disk_is_told_of_the_log(run, monkeypatch, capsys):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("layerwise.runs.log.open_to_append", lambda *_: Full())
    assert main(["train", "--resume", str(run)]) == 2
    assert "metrics.jsonl (No space left on device); free space" in capsys.readouterr().err


# Updates and what they cost


def test_memory_counts_the_optimizers_state_also_when_batches_accumulate(tmp_path, finished):
    """Adam keeps two numbers per parameter from its first update on, however many batches that takes."""
    accumulating = train(tmp_path / "run", *split("--steps 7 --accumulate 3"))
    once, summed = (result(folder)["memory_mib"] for folder in (finished, accumulating))
    assert summed["optimizer"] == once["optimizer"] > once["parameters"]
    assert summed["gradients"] >= once["gradients"]


def test_the_last_batches_make_an_update_of_their_own(tmp_path):
    """3 batches and --accumulate 4 are one update: the one of 3 batches and --accumulate 3."""
    words = split("--steps 3 --schedule constant --rule backprop --optimizer sgd")
    left, exact = (train(tmp_path / n, *words, "--accumulate", n) for n in ("4", "3"))
    first, second = weights(left), weights(exact)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-7)
    config = json.loads((left / "config.json").read_text())
    assert config["accumulate"] == 4
    assert main(["train", "--resume", str(left)]) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(left).values(), first.values(), strict=True))


def test_an_option_of_a_rule_that_is_newer_than_the_checkpoint_had_its_default():
    """As one of the run itself; another value of it, or of an older option, is another run."""
    options = TrainOptions(rule=rules.create("sll"))
    trained = json.loads(json.dumps(to_mapping(options)))
    del trained["rule"]["weight"], trained["model"]["width"], trained["clip"]
    check_unchanged(options, trained, Path("run"))
    for changed in (rules.create("sll", weight=0.5), rules.create("sll", overlap=1)):
        with pytest.raises(LayerwiseError, match="is of another run"):
            check_unchanged(TrainOptions(rule=changed), trained, Path("run"))
