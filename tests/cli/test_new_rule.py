"""`layerwise new-rule`: what it writes trains, passes its own tests, and is found by name."""

import runpy
import sys
from pathlib import Path

import pytest

from layerwise.cli import new_rule
from layerwise.cli.main import main


@pytest.fixture
def written(tmp_path, capsys):
    assert main(["new-rule", "my_rule", str(tmp_path)]) == 0
    assert f"--rule {tmp_path / 'my_rule.py'}:MyRule" in capsys.readouterr().out
    return tmp_path


def outcomes(folder, monkeypatch):
    """Which of the written tests pass."""
    monkeypatch.syspath_prepend(folder)
    found = {}
    for name, test in runpy.run_path(str(folder / "test_my_rule.py")).items():
        if name.startswith("test_"):
            try:
                test()
                found[name] = True
            except AssertionError:
                found[name] = False
    del sys.modules["my_rule"]  # another test would find a package of that name
    return found


def test_its_own_tests_pass_and_fail_where_the_rule_is_broken(written, monkeypatch):
    whole = outcomes(written, monkeypatch)
    assert len(whole) == 3 and all(whole.values())
    rule = written / "my_rule.py"
    rule.write_text(rule.read_text().replace("self.weight * F.cross_entropy", "0.0 * F.cross_entropy"))
    assert outcomes(written, monkeypatch) != whole


@pytest.mark.parametrize("there", [True, False])
def test_the_command_that_tests_it_works_without_the_test_extra(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(new_rule, "find_spec", lambda name: object() if there else None)
    assert main(["new-rule", "my_rule", str(tmp_path)]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "test it" in line)
    assert ("pip install pytest && pytest " in told) is not there


def test_it_is_trained_by_name(written, capsys):
    words = f"train --rule {written / 'my_rule.py'}:MyRule --rule.weight 2 --steps 2 --out {written / 'run'}"
    assert main(words.split()) == 0, capsys.readouterr().err
    assert "my_rule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "takes a name"),
        (["a", "b", "c"], "takes a name"),
        (["--out", "x"], "takes a name"),
        (["My-Rule"], "cannot be the name of a rule"),
        (["../x"], "cannot be the name of a rule"),
        (["class"], "cannot be the name of a rule"),
        (["sll"], "there is a rule 'sll' already"),
        (["fine", "no/such"], "there is no folder"),
        (["torch"], "would hide the Python package 'torch'"),
        (["typing"], "would hide the Python package 'typing'"),
    ],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-rule", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["my_rule.py", "test_my_rule.py"])
def test_nothing_is_overwritten(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    assert main(["new-rule", "my_rule", str(tmp_path)]) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


def test_a_killed_command_is_repeated(tmp_path, monkeypatch, capsys):
    """SIGKILL may come before, between and after the two files: no half of a file, and the next attempt writes all."""

    class Killed(BaseException):
        pass

    whole = tmp_path / "whole"
    whole.mkdir()
    assert main(["new-rule", "killed_rule", str(whole)]) == 0
    wanted = {file.name: file.read_text() for file in whole.iterdir()}
    replace = Path.replace
    for survived in range(2):
        folder, done = tmp_path / str(survived), []

        def killed(path, target, done=done, survived=survived):
            if len(done) == survived:
                raise Killed
            done.append(target)
            return replace(path, target)

        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(Killed):
                main(["new-rule", "killed_rule", str(folder)])
        left = {file.name: file.read_text() for file in folder.iterdir() if file.suffix == ".py"}
        assert left.items() <= wanted.items() and len(left) == survived
        assert main(["new-rule", "killed_rule", str(folder)]) == 0, capsys.readouterr().err
        assert {file.name: file.read_text() for file in folder.iterdir()} == wanted
    assert main(["new-rule", "killed_rule", str(whole)]) == 2  # a finished rule stays as it is
