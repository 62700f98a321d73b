"""The scripts of `benchmarks/`: they parse, and (slowly) they run."""

import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
from support.pages import ROOT

from layerwise.runs import environment
from layerwise.runs.arguments import train_options

SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def run(*words):
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_suite_for_a_gpu_runs_in_its_tiny_form(tmp_path):
    out = run("bash", ROOT / "benchmarks" / "gpu.sh", "--device", "cpu", "--out", tmp_path / "gpu")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert rows == [line for line in (tmp_path / "gpu" / "table.md").read_text().splitlines() if line.startswith("|")]
    assert [row.split()[1] for row in rows[2:]] == ["sll", "backprop"]
    assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert (tmp_path / "gpu" / "report.html").is_file()


def test_the_suite_for_a_gpu_refuses_what_it_has_not():
    for words, sentence in ((["--stage", "all"], "unknown stage all"), (["--fast", "1"], "unknown option --fast")):
        done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", *words], capture_output=True, text=True)
        assert done.returncode == 2 and sentence in done.stderr


def test_parts_of_a_data_set_are_read_as_the_whole(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    whole = {"text": [hashlib.sha256(str(i).encode()).hexdigest() * 4000 for i in range(30)]}  # 7 MiB
    (tmp_path / "a" / "b").mkdir(parents=True)
    pq.write_table(pa.table(whole), tmp_path / "a" / "b" / "train-00000-of-00001.parquet", compression="none")
    run(sys.executable, ROOT / "benchmarks" / "parts.py", tmp_path / "a", tmp_path / "out", "--mib", "2")
    parts = sorted((tmp_path / "out" / "b").iterdir())
    assert len(parts) > 1 and all(part.name.startswith("train-") for part in parts)
    assert [text for part in parts for text in pq.read_table(part)["text"].to_pylist()] == whole["text"]


CLAIM = """
question = "Does it learn?"
answer = "It has {tiny/sll}."
shown = ["tiny/sll"]

[grid.tiny]
title = "tiny"
about = "A grid for a test."
common = ["--model.width", "16", "--batch-size", "256", "--epochs", "1"]
rates = [1e-3, 1e-2]
tune_seed = 0
tune = ["--val-fraction", "0.1"]
final = ["--val-fraction", "0"]
seeds = [0, 1]

[grid.tiny.rules]
sll = ["--rule", "sll"]
diverging = ["--rule", "backprop", "--optimizer", "SGD", "--weight-decay", "1e38", "--schedule", "constant"]
"""


@pytest.mark.slow
def test_a_grid_keeps_what_is_finished(tmp_path):
    (tmp_path / "claim.toml").write_text(CLAIM)
    script = ROOT / "benchmarks" / "run.py"
    out = run(sys.executable, script, tmp_path, "--jobs", "2")
    assert "tiny-diverging-tuning-lr0.01-seed0: failed: " in out
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["row"], line["lr"], line["seed"]) for line in lines] == [
        *(("final", "sll", 0.01, seed) for seed in (0, 1)),
        *(("tuning", "sll", lr, 0) for lr in (0.001, 0.01)),
    ]
    assert lines[0]["command"] == (
        "layerwise train --model.width 16 --batch-size 256 --epochs 1 --rule sll --val-fraction 0 --lr 0.01 --seed 0 "
        "--threads 1"
    )
    assert lines[0]["machines"] == [json.loads(json.dumps(environment.machine()))]
    page = (tmp_path / "README.md").read_text()
    mean = f"{50 * sum(line['test_accuracy'] for line in lines[:2]):.2f}"
    assert f"It has {mean} ± " in page and "Rows without a finished run: diverging." in page
    assert environment.machine_in_words(environment.machine()) in page
    assert "tiny-sll-final" not in run(sys.executable, script, tmp_path)
    assert "tiny/sll seed 1: " in (out := run(sys.executable, script, tmp_path, "--check", "tiny/sll"))
    assert out.count(", equal") == 2
    (tmp_path / "results.jsonl").write_text(
        (tmp_path / "results.jsonl").read_text().replace('head/loss":', 'head/loss":1')
    )
    done = subprocess.run([sys.executable, script, tmp_path, "--check", "tiny/sll"], capture_output=True, text=True)
    assert done.returncode == 1 and "is stored" in done.stdout
    (tmp_path / "results.jsonl").unlink()
    run(sys.executable, script, tmp_path, "--grid", "tiny", "--device", "cpu")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines and all(line["command"].endswith("--threads 1 --device cpu") for line in lines)
    assert "had further options" not in (tmp_path / "README.md").read_text()
    done = subprocess.run([sys.executable, script, tmp_path, "--grid", "big"], capture_output=True, text=True)
    assert done.returncode == 2 and "has the grids tiny, not big" in done.stderr


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("evidence")


def grid(evidence, rates, scores, **options):
    """A grid of one row, `a`, and one that has its rate, `b`; `scores` are those on the validation split."""
    options = {
        "rates": rates,
        "seeds": [0],
        "rules": {"a": ["--rule", "sll"], "b": []},
        "tuned_as": {"b": "a"},
    } | options
    lines = [{"row": "a", "kind": "tuning", "lr": lr, "val_accuracy": score} for lr, score in scores.items()]
    return evidence.Grid("g", options, lines)


@pytest.mark.parametrize(
    ("rates", "scores", "text"),
    [
        ([0.1, 0.2, 0.4], {0.1: 0.5, 0.2: 0.6, 0.4: 0.5}, "0.2 (inside 3)"),
        ([0.1, 0.2, 0.4], {0.1: 0.7, 0.2: 0.6, 0.4: 0.5}, "0.1 (**edge**, lowest of 3)"),
        ([0.1, 0.2], {0.1: 0.5, 0.2: 0.6}, "0.2 (**edge**, highest of 2)"),
        ([0.1, 0.2, 0.4], {0.1: 0.1, 0.2: 0.6, 0.4: 0.6 - 1e-9}, "0.2 (inside 3; tied with 0.4)"),
        ([0.1, 0.2, 0.4], {0.1: 0.5, 0.2: 0.6}, "0.2 (inside 3)"),  # the highest diverged
        ([0.1], {}, "0.1 (not tuned)"),
    ],
)
def test_a_rate_says_how_it_was_chosen(evidence, rates, scores, text):
    found = grid(evidence, rates, scores)
    assert evidence.Row(found, "a").lr_text == text
    number, _, rest = text.partition(" (")
    assert evidence.Row(found, "b").lr_text == f"{number} (that of `a`; {rest}"


def test_a_machine_that_no_run_recorded_is_not_made_up(evidence):
    old = {"machines": [], "stored": {"environment": "cpu: Z80, 1 cores\ntorch 1\n", "source": "environment.txt"}}
    assert evidence.machine_of(old) == "Z80, 1 cores; torch 1"
    assert evidence.recorded_by(old) == "environment.txt, not by the run"
    assert evidence.machine_of({"machines": [], "stored": {"environment": None}}) == "not recorded"
    new = {"machines": [environment.machine() | {"commit": "abc", "packages": {"flwr": "1.2"}}]}
    assert evidence.machine_of(new) == environment.machine_in_words(environment.machine()) + ", flwr 1.2"
    assert evidence.recorded_by(new) == "the run itself, commit abc"


def test_a_folder_without_results_says_so_and_is_no_answer(evidence, tmp_path):
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "claim.toml").write_text(
        'question = "Does it?"\nanswer = "It has {g/a} %."\nshown = ["g/a"]\n[grid.g]\ntitle = "T"\nabout = "A."\n'
        'common = []\nrates = [1]\nfinal = []\nrules.a = ["--rule", "sll"]\n'
    )
    (later,) = evidence.planned(tmp_path)
    assert evidence.claims(tmp_path) == []
    assert later.readme().startswith("# Does it?\n\n**Not run yet.**") and "|" not in later.readme()
    assert "It has" not in later.readme() and "Rows: `a`." in later.readme()


@pytest.fixture
def pages(evidence):
    return importlib.import_module("collect").pages()


def test_every_figure_that_is_shown_is_that_of_its_folder(pages):
    stale = [str(file.relative_to(ROOT)) for file, text in pages.items() if file.read_text() != text]
    assert not stale, f"run python benchmarks/collect.py for {stale}"


def test_every_answer_has_a_command_that_gives_its_figures_again(evidence, pages):
    shown = (ROOT / "docs" / "results.md").read_text() + (ROOT / "README.md").read_text()
    folders = set(re.findall(r"benchmarks/([\w-]+)/README\.md", shown))
    claims = {claim.name: claim for claim in evidence.claims()}
    assert len(folders) > 25
    for name in folders:
        command = claims[name].toml.get("command", "python")
        assert any(line and not line.startswith("#") for line in command.splitlines()), name


def test_figures_that_are_run_again_are_compared_to_eight_digits(evidence):
    stored = {"head/accuracy": 0.75, "head/loss": 1.23456789, "lost": math.nan}
    assert evidence.equal(stored, stored | {"head/loss": 1.234567894, "lost": math.nan})
    assert not evidence.equal(stored, stored | {"head/loss": 1.2345680})
    assert not evidence.equal(stored, {"head/accuracy": 0.75})


def test_the_evidence_is_small():
    files = subprocess.run(["git", "-C", ROOT, "ls-files", "benchmarks"], capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("no checkout")
    assert len(files) < 300
    assert sum((ROOT / file).stat().st_size for file in files if (ROOT / file).exists()) < 4_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", sorted((ROOT / "benchmarks").glob("*/claim.toml")), ids=lambda file: file.parent.name
)
def test_every_grid_of_a_folder_is_legal(evidence, folder):
    claim = evidence.Claim(folder.parent)
    assert (claim.folder / "run.sh").exists() or claim.grids or claim.toml["command"].startswith("#")
    for found in claim.grids.values():
        for name in found.options["rules"]:
            own = next((word[3:] for word in found.options["common"] if word.startswith("hf:benchmarks/")), None)
            if own is not None and not (ROOT / own).exists():
                pytest.skip(f"{own} is made by {found.options['prepare']}, which needs a package")
            words = [*found.options["common"], *found.options["rules"][name], *found.options["final"]]
            assert train_options(words, "train").rule.name == evidence.Row(found, name).rule
