"""Every failure of the command line is one sentence, and answers that do not need torch do not import it."""

import errno
import importlib
import io
import os
import signal
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import pytest
from support.pages import ROOT
from support.runs import split, start

from layerwise import LayerwiseError, data, models, rules
from layerwise.cli import catalogue, early, flags, signals
from layerwise.cli import main as cli
from layerwise.cli.commands import Command
from layerwise.errors import say
from layerwise.runs.settings import load_recipe, recipe_names

ANSWERED = [
    *("", "--help", "--version", "--debug --version", "ls rules", "ls models", "ls data", "ls recipes"),
    *(
        "train --help",
        "compare --help",
        "bench --help",
        "bench memory --help",
        "bench speed --model vit --help",
        "bench scaling -h",
        "train --resume nowhere --help",
        "eval --help",
        "beliefs --help",
        "predict --help",
        "export --help",
        "validate --help",
        "report --help",
    ),
]
REFUSED = [
    *("ls", "ls rulez", "trian", "bench", "bench memori", "describe", "describe sl"),
    *("train --rule slll", "train --model=mpl", "train --data mnits", "train --recipe digit", "train --rule"),
    *("compare --rule sll:overlap=1 backpro --model mlp", "compare --rule sll,svpp", "compare --data mnits"),
    *("bench memory --rule sll slll", "bench speed --rule slll", "bench scaling --model mpl", "validate --rule slll"),
    *("train --lrr 3", "train --rule.wieght=3", "train --model.widht 3", "compare --sed 3", "compare --seed 3"),
    *("bench memory --depht 4", "bench speed --round 3", "bench scaling --rank 2"),
    *("eval nowhere", "beliefs nowhere", "predict nowhere x.png", "export nowhere x", "validate nowhere"),
    *(
        "report nowhere",
        "train --resume nowhere",
        "train --resume x --epochs 4",
        "eval",
        "report",
        "validate --model mpl",
        "eval x --batch-size no",
    ),
]


def test_the_light_answers_import_no_torch():
    """One process for all of them: none may import torch."""
    code = f"""
import sys
from layerwise.cli.main import main
import layerwise
for code, commands in ((0, {ANSWERED!r}), (2, {REFUSED!r})):
    for words in commands:
        assert main(words.split()) == code, words
        assert "torch" not in sys.modules, words
assert "Learner" in dir(layerwise) and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(REFUSED), done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr


def sentence(work, *arguments):
    """The refusal of a call."""
    with pytest.raises(LayerwiseError) as caught:
        work(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(("option", "later"), [
    ("rule", rules.get), ("model", models.options), ("data", data.load), ("recipe", load_recipe)
])  # fmt: skip
def test_an_early_refusal_has_the_words_of_the_later_one(option, later):
    for name in ("sl", "digit", "mnits", "", "x" * 400, "ünknown"):
        assert sentence(early.check_options, [f"--{option}", name], option) == sentence(later, name)
    for name in catalogue.rules() if option == "rule" else ():
        early.check_options([f"--{option}={name}"], option)


def test_what_is_opened_later_is_not_refused_early(tmp_path):
    """A path, and a name with a form: whether they exist is not known from their names."""
    names = ["x.csv", "hf:a/b", "imagefolder:x", "parquet:x", "C:/t.CSV"]
    early.check_names("data", names)
    early.check_names("recipe", ["mine.toml", "a/b.toml"])
    for name in names[2:]:
        assert "unknown" not in sentence(data.load, name)


@pytest.mark.parametrize("words", [
    *("--rule.weight=0.5 --batch_size 64 --no-channels-last --data.no-documents", "--rule=sll --rule.dropout 0.1"),
    *("--model vit --model.heads 2 --data.label-column x --json=- --replicas 2", "--rule my.py:R --rule.mine 3 --lr 1"),
    *("--model hf:folder --model.blocks 2", "--recipe mine.toml --rule.mine 1", "--rule svp --rule.weight 2 --out a"),
])  # fmt: skip
def test_an_option_that_there_is_or_that_foreign_code_may_have_is_not_refused_early(words):
    flags.check_flags("train", words.split())


def test_an_option_of_another_rule_is_refused_early():
    assert "--rule.surrogate" in sentence(flags.check_flags, "train", ["--rule", "backprop", "--rule.surrogate", "kl"])
    assert "did you mean --rule.weight" in sentence(flags.check_flags, "train", ["--rule.wieght", "kl", "--lr", "1"])
    assert "here it is --lr" in sentence(flags.check_flags, "train", ["--learning_rate", "1"])


def test_the_version_is_there_at_once():
    """The best of five processes, in their own processor time: other work on the machine does not count."""
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "layerwise", "--version"], check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.4


@pytest.mark.slow
def test_every_public_name_can_be_imported_and_nothing_else():
    code = """
import layerwise
names = {name: getattr(layerwise, name) for name in layerwise.__all__}
assert layerwise.rules.create("sll").name == "sll" and layerwise.models.names()
assert names["create_rule"] is layerwise.rules.create
from layerwise import *
try:
    layerwise.Lerner
except AttributeError as reason:
    assert "Lerner" in str(reason)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_catalogue_is_that_of_the_classes():
    def first(text):
        return text.strip().partition("\n")[0]

    found = catalogue.rules()
    assert list(found) == [*rules.names(), *rules.FORMS]
    for name in rules.names():
        assert found[name] == f"{rules.get(name).locality:<13} {first(rules.get(name).__doc__)}"
    of_the_zoo = {name: first(models.describe(name)) for name in models.names()}
    assert catalogue.models() == of_the_zoo | models.outside.FORMS
    assert catalogue.data() == {name: data.describe(name) for name in data.names()}
    assert list(catalogue.recipes()) == recipe_names()
    assert all(catalogue.recipes()[name].startswith(load_recipe(name).about) for name in recipe_names())


RULE = '''
import torch
from layerwise.rules import Backprop

class Mine(Backprop):
    """A rule from elsewhere.

    More.
    """
    name = "mine"
    locality = "global"
'''


def test_the_catalogue_reads_a_rule_of_another_package_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "other-1.0.dist-info").mkdir()
    (tmp_path / "other-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    points = "[layerwise.rules]\nmine = other.rules:Mine\ngone = other.nothing:Gone\n"
    (tmp_path / "other-1.0.dist-info" / "entry_points.txt").write_text(points)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("raise ImportError('imported')")
    (tmp_path / "other" / "rules.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path)
    found = catalogue.rules()
    assert found["mine"].split(maxsplit=1) == ["global", "A rule from elsewhere."]
    assert "from the package other" in found["gone"]
    assert "other" not in sys.modules


# What goes wrong inside


def failing(monkeypatch, error):
    """A command that fails."""

    def command(argv):
        print("so far", flush=True)
        raise error

    monkeypatch.setattr(cli, "COMMANDS", {"fail": Command("support.failing:command", "fails")})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: type("module", (), {"command": command}))


@pytest.mark.parametrize(("error", "sentence"), [
    (ZeroDivisionError("no\nreason"), "unexpected ZeroDivisionError: no reason ("),
    (KeyError("x"), "unexpected KeyError: 'x' ("),
    (AssertionError(), "unexpected AssertionError ("),
    (RecursionError("deep"), "unexpected RecursionError"),
    (OSError(errno.ENOSPC, "No space left on device"), "could not write a file (No space left on device); free"),
    (OSError(errno.ENOSPC, "No space left on device", "a.txt"), "could not write a.txt (No space left"),
    (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "cannot use a.txt (Permission denied)"),
    (MemoryError(), "out of memory; use smaller batches"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "unexpected BrokenPipeError"),
])  # fmt: skip
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_whatever_fails_is_one_sentence(error, sentence, debug, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert cli.main([*debug, "fail"]) == 2
    out, err = capsys.readouterr()
    assert out == "so far\n"
    assert sentence in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("layerwise: ")
    assert ("Traceback" in err) == bool(debug)
    assert "cannot print" not in err
    if not debug:
        assert err.count("\n") == 1
    if "unexpected" in sentence:
        assert "line " in err and "please report it" in err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (cli.Terminated(), 143)])
def test_stopped_is_a_word_and_the_signals_code(error, code, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert cli.main(["fail"]) == code
    assert capsys.readouterr().err == "layerwise: stopped.\n"


HOSTILE = "a\nb\x1b[2J\x07\u202ec"


def test_what_is_said_is_one_printable_line(capsys, monkeypatch):
    """A name may move the cursor of a terminal, or look like a second sentence."""
    monkeypatch.setattr(cli, "_run", lambda words: (_ for _ in ()).throw(FileNotFoundError(2, "none", HOSTILE)))
    assert cli.main([]) == 2
    monkeypatch.undo()
    assert cli.main(["train", f"--{HOSTILE}", "3"]) == 2
    say(f"note: {HOSTILE}")
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    assert r"a\nb\x1b[2J\x07\u202ec" in lines[0]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_no_control_characters_from_names_and_texts(terminal):
    """A file or a pipe gets the text as it is; the colours of the help stay."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    text = f"\x1b[1mhelp\x1b[0m\t{HOSTILE}\x9b2J\x1b]0;title\n"
    cli.Output(stream).write(text)
    shown = r"\x1b[2J\x07\u202ec\x9b2J\x1b]0;title" + "\n"
    assert stream.getvalue() == (f"\x1b[1mhelp\x1b[0m\ta\nb{shown}" if terminal else text)


def test_debug_is_taken_off_anywhere_on_the_line(capsys):
    assert cli.main(split("ls data --debug")) == 0
    assert cli.main(split("ls --debug dota")) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def _listening():
    """SIGINT is answered, also in a job that a shell has started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_listening")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_an_import_waits_for_its_end(number, tmp_path, monkeypatch, capsys):
    """Half of a module would fail in other ways: the import ends first, and then the command, with its code."""
    (tmp_path / "slow_module.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.05)\ndone = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_module", raising=False)

    def command(words):
        import slow_module

        seen.append(slow_module.done)
        time.sleep(5)

    seen = []
    monkeypatch.setattr(cli, "_run", command)
    began = time.monotonic()
    assert cli.main([]) == 128 + number and seen == [True]
    assert time.monotonic() - began < 4
    assert capsys.readouterr().err == "layerwise: stopped.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("_listening")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_that_never_ends_is_left_in_the_end(number, tmp_path, monkeypatch, capsys):
    (tmp_path / "endless_module.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), {int(number)})\nfor _ in range(500):\n    time.sleep(0.01)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    monkeypatch.setattr(cli, "_run", lambda words: importlib.import_module("endless_module"))
    began = time.monotonic()
    assert cli.main([]) == 128 + number
    assert 0.2 < time.monotonic() - began < 3
    assert capsys.readouterr().err == "layerwise: stopped.\n"


@pytest.mark.slow
def test_sigterm_ends_a_comparison_with_its_code(tmp_path):
    process = start(*split("compare --seeds 2 --epochs 500 --no-report --jobs 1 --out"), tmp_path / "out")
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, err.splitlines()[-1]) == (143, "layerwise: stopped.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output_is_told_as_such(unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "layerwise", "ls", "data"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (2, "layerwise: cannot print (No space left on device).\n")


def test_ctrl_c_while_the_command_line_is_imported_ends_it_without_a_traceback(monkeypatch, capsys):
    """The script imports it in the same way as `python -m layerwise`."""

    class Stopping(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "layerwise.cli.main", Stopping("layerwise.cli.main"))
    monkeypatch.delitem(sys.modules, "layerwise.__main__", raising=False)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("layerwise.__main__")
    assert stop.value.code == 130 and capsys.readouterr().err == "layerwise: stopped.\n"
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"layerwise": "layerwise.__main__:main"}


def test_a_character_that_standard_output_cannot_encode_is_told_as_such(monkeypatch, capsys):
    module = type("module", (), {"command": lambda argv: print("a\xe9")})
    monkeypatch.setattr(cli, "COMMANDS", {"tell": Command("support.telling:command", "tells")})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert cli.main(["tell"]) == 2
    sentence = r"cannot print the character '\xe9' in ascii, the encoding of standard output; set PYTHONIOENCODING="
    assert capsys.readouterr().err == f"layerwise: {sentence}utf-8.\n"
