"""README.md and the examples, word by word: every block is run as a newcomer would run it."""

import re
import runpy
import shlex
import shutil
import tomllib

import pytest
import torch
from support.pages import ROOT, blocks, layerwise, run_page

from layerwise import rules
from layerwise.compare import grid as compare
from layerwise.compare.depth import USUAL, held_at
from layerwise.report.summary import columns
from layerwise.runs import arguments

README = ROOT / "README.md"
COMMANDS = [line for language, text, _ in blocks(README) if language == "sh" for line in text.splitlines()]
SET_UP = [line for line in COMMANDS if line.startswith("python3 -m venv")]
ACTIVATION = ". .venv/bin/activate"
MAIN = ".venv/bin/layerwise compare --epochs 10 --out runs/first"
TOUR = [line for line in COMMANDS if line not in (*SET_UP, ACTIVATION)]


def test_the_python_block_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="the hf extra (transformers) is not installed")
    monkeypatch.chdir(tmp_path)
    assert "python" in [language for language, _, _ in blocks(README)]
    run_page(README)


def test_there_are_two_set_up_commands_of_one_line_each():
    run, test = (line.split(" && ") for line in SET_UP)
    assert run[0] == test[0] == "python3 -m venv .venv"
    install = ".venv/bin/pip install -c constraints.txt -e "
    assert run[1] == install + "'.[report]'"
    assert test[1] == install + "'.[test]'"
    assert run[2:] == [MAIN]
    assert test[2:] == [".venv/bin/pytest"]


def test_commands_after_the_set_up_are_typed_in_the_activated_environment():
    assert COMMANDS[COMMANDS.index(SET_UP[0]) + 1] == ACTIVATION


def test_other_ways_to_install_name_parts_that_are_there():
    ways = next(text for language, text, _ in blocks(README) if language == "bash")
    parts = {part for found in re.findall(r"\.\[([\w,]+)\]", ways) for part in found.split(",")}
    legal = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = re.findall(r"`(\w+)`", README.read_text().partition("Extras are ")[2].partition("\n\n")[0])
    assert parts <= set(legal)
    assert {*told} | {"test", "docs"} == set(legal)


def test_the_number_of_rules_is_that_of_the_table():
    assert f" {len(rules.names())} rules, local and global" in README.read_text().replace("\n", " ")


@pytest.mark.slow
def test_the_shown_end_of_the_main_job_is_what_it_prints():
    """Names and memory to the digit; times and accuracies are those of one machine."""
    shown = next(text for language, text, _ in blocks(README) if language == "text").splitlines()
    options = compare.Grid(
        arguments.train_options(shlex.split(MAIN)[2:], "compare", compare.CompareOptions, hidden=("rule",))
    ).rules
    named = re.split(r"  +", shown[0])
    assert tuple(named) == columns()
    assert [line.split()[0] for line in shown[1 : 1 + len(options)]] == [*options]
    at = next(i for i, line in enumerate(shown) if line.startswith("act. + grad."))
    depths = tuple(int(words.split()[0]) for words in re.split(r"  +", shown[at])[1:])
    assert depths == USUAL
    for line in shown[at + 1 : at + 1 + len(options)]:
        label, *mib = line.split()
        held = held_at(options[label], depths[:2])
        assert [f"{held[str(depth)] / 2**20:.2f}" for depth in depths[:2]] == mib[:2], label


def test_the_constraints_are_exact_and_cover_every_direct_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    wanted = re.findall(r'"([a-z0-9-]+)(?:\[\w+\])?>=', (ROOT / "pyproject.toml").read_text())
    assert {*wanted} - {"hatchling"} <= {name.lower().replace("_", "-") for name in pins}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the tour's user has: the checkout's own text and pictures."""
    folder = tmp_path_factory.mktemp("tour")
    shutil.copy(README, folder)
    shutil.copytree(ROOT / "examples" / "digits", folder / "examples" / "digits")
    return folder


def test_the_tour_needs_no_data_that_a_checkout_does_not_have():
    given = [words[words.index("--data") + 1] for line in TOUR if "--data" in (words := shlex.split(line))]
    assert given == ["text:README.md"]
    inputs = [words[3] for line in TOUR if (words := shlex.split(line, comments=True))[1] == "predict"]
    assert [*filter(None, (word for word in inputs if not word.startswith("--")))] == ["examples/digits"]


@pytest.mark.parametrize(
    "command",
    # CI runs the main job as a stage of its own, too.
    [
        pytest.param(line, marks=[pytest.mark.slow] if line == MAIN or "bench speed" in line or "/text" in line else [])
        for line in (MAIN, *TOUR)
    ],
    ids=lambda command: command.partition("#")[0],
)
def test_every_command_works_as_printed(command, folder, monkeypatch):
    """In order, in one folder; training is cut short."""
    monkeypatch.chdir(folder)
    words = shlex.split(command, comments=True)
    if words[1] == "compare":
        if command != MAIN:  # one of them is enough
            asked = arguments.train_options(words[2:], "compare", compare.CompareOptions, hidden=("rule",))
            assert compare.Grid(asked).options.seeds == 2
            return
        words += shlex.split("--seeds 1 --steps 2 --model.width 16 --no-report")
    if words[1] == "train" and "--resume" not in words:
        words += ["--steps", "4", "--model.width", "16"]
    code, output = layerwise(shlex.join(words))
    assert code == 0, output
    assert output.strip()


def test_the_loop_of_ones_own_learns():
    torch.manual_seed(0)
    assert runpy.run_path(str(ROOT / "examples" / "own_loop.py"))["main"](epochs=2) > 0.5
    assert len((ROOT / "examples" / "own_loop.py").read_text().splitlines()) < 45


def test_the_rule_of_ones_own_trains_every_block():
    example = runpy.run_path(str(ROOT / "examples" / "own_rule.py"))
    losses = example["main"](steps=40)
    assert losses[-1] < 0.5 * losses[0]

    torch.manual_seed(0)
    model = example["create"]("mlp", (1, 8, 8), 10, depth=2, width=16, activation="tanh")
    before = {name: p.clone() for name, p in model.named_parameters()}
    example["Learner"](model, example["DirectFeedback"]()).step(torch.randn(8, 1, 8, 8), torch.arange(8))
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.slow
def test_the_picture_is_drawn_from_the_measured_files(tmp_path):
    pytest.importorskip("matplotlib")
    plot = runpy.run_path(str(ROOT / "benchmarks" / "memory-flat-in-depth" / "plot.py"))
    plot["draw"](plot["read"](ROOT / "benchmarks" / "memory-flat-in-depth"), tmp_path / "memory.svg")
    text = (tmp_path / "memory.svg").read_text()
    assert "prefers-color-scheme:dark" in text
    assert "<title>" in text
    assert ">sll, local_ce<" in text
    assert ">backprop with checkpoints<" in text
