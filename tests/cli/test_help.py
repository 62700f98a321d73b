"""Help and completion: every option in a group, no wider than the terminal, with its default, and without torch."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.runs import SMALL, result, split

from layerwise import models, rules
from layerwise.cli import catalogue
from layerwise.cli.commands import BENCHES, COMMANDS, NAMES
from layerwise.cli.completion import SCRIPTS, candidates
from layerwise.cli.help import groups_of, help_of
from layerwise.cli.main import main
from layerwise.cli.options import options_of
from layerwise.runs.options import TrainOptions, from_mapping
from layerwise.runs.settings import FLAGS, load_recipe

ALL = {**COMMANDS, **BENCHES}


def listed(name, *words):
    return {option.flag: option for _, group in groups_of(name, ALL[name], words) for option in group}


@pytest.mark.parametrize("columns", [60, 80])
def test_every_help_fits_its_terminal_and_holds_no_formula(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns
    words = [[*split(name), "--help"] for name in ALL] + [["train", "--rule", rule, "-h"] for rule in rules.names()]
    for line in words:
        assert main(line) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= columns, line
        assert not re.search(r"[\\`]|\$[^(]", out), line
        assert f"usage: layerwise {line[0]}" in out


@pytest.mark.parametrize("name", ALL)
def test_the_help_has_every_option_that_is_parsed_once(name):
    """The table of groups names each class that declares options, and no option stands in two groups."""
    command = ALL[name]
    flags = [option.flag for _, group in groups_of(name, command, []) for option in group]
    assert max(Counter(flags).values(), default=1) == 1
    for where in command.groups.values():
        module, _, cls = where.partition(":")
        for field in dataclasses.fields(getattr(importlib.import_module(module), cls)):
            own = {"rules": "rule", **FLAGS}.get(field.name, field.name)
            assert f"--{own.replace('_', '-')}" in flags or field.name in command.hidden, field.name


def test_the_names_that_bring_options_are_entries_of_the_help():
    for option, commands in NAMES.items():
        for name in commands:
            assert f"--{option}" in listed(name), (option, name)
    assert "--resume" in listed("train")


@pytest.mark.parametrize(("words", "recipe"), [("", "digits"), ("--recipe shakespeare", "shakespeare")])
def test_defaults_are_those_of_the_recipe(words, recipe, tmp_path):
    mine = str(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text('targets = ["kind"]\n')
    options, found = from_mapping(load_recipe(recipe).values), listed("train", *split(words))
    assert found["--lr"].default == str(options.lr)
    assert found["--epochs"].default == str(options.epochs)
    assert found["--data"].default == options.data
    assert found["--rule"].default == rules.name_of(options.rule)
    assert listed("train", "--recipe", mine)["--data.label-column"].default == "kind"
    assert found["--model.depth"].default == str(options.model.depth)


@pytest.mark.parametrize("name", [*rules.names(), *models.names()])
def test_the_options_of_a_rule_and_a_model_are_the_fields_of_its_class(name):
    """Read from the source, they are what the imported dataclass has: names, defaults and choices."""
    kind = rules.get(name) if name in rules.names() else models.options(name)
    place = (catalogue.class_of_rule if name in rules.names() else catalogue.class_of_model)(name)
    found = {option.flag.removeprefix("--").replace("-", "_"): option for option in options_of(*place)}
    assert found.keys() == {field.name for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(kind):
        option = found[field.name]
        if isinstance(field.default, bool):
            assert option.value == ""
            assert option.default == ("on" if field.default else "off")
        elif isinstance(field.default, (int, float, str)) and field.default != "":
            assert option.default == str(field.default), field.name
        assert option.about, f"{name} does not say what {field.name} is"
        assert field.default in option.choices or not option.choices or field.default is None


def test_a_class_and_a_function_of_the_users_are_read_and_not_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "raise SystemExit\nclass Mine:\n    gain: float = 2.0\n    r'''Factor $\\gamma$.'''\n"
        "def net(shape, width: int = 8, *, outputs, deep=True): ...\n"
    )
    found = listed("train", "--rule", f"{file}:Mine", "--model", f"{file}:net")
    assert found["--rule.gain"][1:] == ("X", (), False, "2.0", "Factor γ.")
    assert found["--model.width"].default == "8"
    assert found["--model.deep"].value == ""
    assert {flag for flag in found if flag.startswith("--model.")} == {"--model.width", "--model.deep"}


def test_a_misspelt_name_is_refused_in_the_help_too(capsys):
    assert main(["train", "--rule", "slll", "--help"]) == 2
    assert "did you mean 'sll'" in capsys.readouterr().err


def processor_time(*words):
    """Seconds of a Python process with these arguments."""
    before = os.times()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("words", ["train --help", "train --rule sll --model vit --help", "bench scaling --help"])
def test_help_takes_less_than_half_a_second(words):
    """One process in three at least, in its own processor time; on a slower machine, what seven bare starts take."""
    for _ in range(3):
        seconds = processor_time("-m", "layerwise", *words.split())
        if seconds < max(0.5, 7 * processor_time("-c", "import argparse, dataclasses, json")):
            return
    pytest.fail(f"the help takes {seconds:.2f} s")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("tra", {"train"}),
        ("ls m", {"models"}),
        ("describe sl", {"sll"}),
        ("train --rule sl", {"sll"}),
        ("train --rule sll --model vi", {"vit"}),
        ("train --model vit --model.pa", {"--model.patch"}),
        ("train --rule=sl", {"--rule=sll"}),
        ("train --data mn", {"mnist"}),
        ("train --data text", {"text:"}),
        ("compare --rule sll backprop_c", {"backprop_checkpoint"}),
        ("compare --rule sll,backprop_c", {"sll,backprop_checkpoint"}),
        ("compare --rule sll:weight=2:over", {"sll:weight=2:overlap="}),
        ("bench memory --off", {"--offload", "--offload-folder"}),
        ("train --schedule o", {"onecycle"}),
        ("train --no-comp", {"--no-compile"}),
        ("eval ru", set()),
        ("nothing x", set()),
    ],
)
def test_what_may_come_next(words, found):
    assert set(candidates(words.split(" "))) == found


@pytest.mark.slow
def test_bash_completes(tmp_path):
    """In a real bash, which takes words apart at : and =."""
    lines = ["layerwise train --rule sl", "layerwise compare --rule sll:over", "layerwise train --data text:b"]
    (tmp_path / "layerwise").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m layerwise "$@"\n')
    (tmp_path / "layerwise").chmod(0o755)
    script = SCRIPTS["bash"] + "compopt() { :; }\n"
    for line in lines:
        script += f"COMP_LINE='{line}'; COMP_POINT={len(line)}; _layerwise; echo \"${{COMPREPLY[*]}}\"\n"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.stdout == "sll\noverlap=\n\n", done.stderr
    assert done.stderr == ""


@pytest.fixture
def shell(tmp_path):
    """Runs a script in a shell of the system in which `layerwise` is a command; gives what it printed."""
    (tmp_path / "layerwise").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m layerwise "$@"\n')
    (tmp_path / "layerwise").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def run(*words):
        if shutil.which(words[0]) is None:
            pytest.skip(f"{words[0]} is not installed")
        home = {"PATH": path, "HOME": str(tmp_path), "TERM": "dumb"}
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | home, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_fish_completes(shell):
    lines = ["train --rule sl", "compare --rule sll sll:over", "ls mod"]
    asked = "; ".join(f'complete -C "layerwise {line}"' for line in lines)
    assert shell("fish", "-c", f"{SCRIPTS['fish']}\n{asked}").split() == ["sll", "sll:overlap=", "models"]


ZSH = """\
zmodload zsh/zpty
zpty inner zsh -f -i
zpty -w inner 'PS1=; autoload -U compinit; compinit -u -D; eval "$(layerwise completion zsh)"; echo rea""dy'
zpty -r -m inner seen '*ready*'
for line in "layerwise train --rule sl" "layerwise compare --rule sll sll:over"; do
    zpty -w -n inner "$line"$'\\t'; sleep 5; zpty -w -n inner "@"
    zpty -r -m inner seen '*@*'; print -r -- "$seen"
    zpty -w -n inner $'\\C-u'
done
zpty -d inner
"""  # `@` after what Tab has put: a space, or nothing where a value follows


@pytest.mark.slow
def test_zsh_completes(shell):
    seen = shell("zsh", "-f", "-c", ZSH).replace("\a", "")
    while "\b" in seen:  # a space that was put, taken back and put again
        seen = re.sub("[^\b]\b", "", seen, count=1)
    assert "layerwise train --rule sll @" in seen
    assert "layerwise compare --rule sll sll:overlap=@" in seen


@pytest.mark.parametrize("shell", SCRIPTS)
def test_each_shell_has_its_script(shell, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert out == SCRIPTS[shell]
    assert "completion --words" in out


def test_another_shell_is_one_sentence(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "name one shell: 'tcsh' is not one" in capsys.readouterr().err


def test_all_settings_of_a_run_have_a_group():
    """A field that is added to the settings of a run shows up in the help by itself."""
    own = {field.name for field in dataclasses.fields(TrainOptions)} - {"rule", "model"}
    assert {f"--{FLAGS.get(name, name).replace('_', '-')}" for name in own} <= listed("train").keys()
    assert "of several" not in help_of("export")


def test_json_takes_the_place_of_the_table_and_quiet_that_of_progress(tmp_path, capsys):
    words = ["train", *SMALL, "--steps", "3", "--out", str(tmp_path / "run")]
    assert main([*words, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["test_accuracy"] == result(tmp_path / "run")["test_accuracy"]
    assert main(["eval", str(tmp_path / "run"), "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert main(["eval", str(tmp_path / "run"), "--json", str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert "head/accuracy" in capsys.readouterr().out  # the table is printed too
    assert main(["validate", str(tmp_path / "run"), "--json"]) == 0
    assert all(found["holds"] for found in json.loads(capsys.readouterr().out))


def test_json_takes_no_argument_for_its_file(tmp_path, monkeypatch, capsys):
    """Wherever it stands on the line, what is no file of JSON stays what it was."""
    monkeypatch.chdir(tmp_path)
    assert main(["ls", "--json", "recipes"]) == 0
    assert "digits" in json.loads(capsys.readouterr().out)
    assert main(["ls", "--json", "a.json", "recipes"]) == 0
    assert main(["ls", "recipes", "--json=b"]) == 0
    assert json.loads(Path("a.json").read_text()) == json.loads(Path("b").read_text())
    assert main(["validate", "--json", "nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    for words, sentence in {
        "ls recipes --json c": "--json is followed by 'c', which does not end in .json; write --json=c",
        "doctor --json=": "--json= names no file",
    }.items():
        assert main(words.split()) == 2
        assert re.search(sentence, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b"]


def test_a_benchmark_prints_figures_for_programs(capsys):
    words = split("bench memory --rule sll --depths 2 --shape 1 8 8 --batch-size 4 --model.width 16 --json")
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert [row["depth"] for row in json.loads(out)] == [2]
    assert "sll mlp, 2 blocks: peak" in err
    assert "1 of 1" in err
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["rules", "models", "data", "recipes"])
def test_lists_fit_a_narrow_terminal_with_room_for_their_words(what, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["ls", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    indents = [len(line) - len(line.lstrip()) for line in lines if line.startswith(" ")]
    assert max(indents) <= 24  # at least 36 of 60 columns are left for a sentence


def test_tables_become_blocks_where_they_do_not_fit(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(split("bench memory --rule sll --depths 2 --shape 1 8 8 --batch-size 4 --model.width 16 --quiet")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0] == "sll"
    assert lines[1].split() == ["model", "mlp"]


def test_a_file_that_json_may_not_replace_is_refused_before_the_work(tmp_path, capsys):
    assert main(["train", *SMALL, "--steps", "3", "--out", str(tmp_path / "run"), f"--json={tmp_path}"]) == 2
    assert "it is a folder, not a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_old_names_are_answered_with_the_new_ones(capsys):
    assert main(split("compare --rules sll backprop")) == 2
    assert "here it is --rule;" in capsys.readouterr().err
    assert main(split("compare --rule.overlap 1")) == 2
    assert "follow its name and a colon" in capsys.readouterr().err
