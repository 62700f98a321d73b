"""The scripts of `benchmarks/`: they parse, and (slowly) they run."""

import csv
import json
import os
import subprocess
import sys

import pytest
from support.pages import ROOT

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


GRID = """
title = "tiny"
about = "A grid for a test."
common = ["--model.width", "16", "--batch-size", "256", "--epochs", "1"]
rates = [1e-3, 1e-2]
tune_seed = 0
tune = ["--val-fraction", "0.1"]
final = ["--val-fraction", "0"]
seeds = [0, 1]

[rules]
sll = ["--rule", "sll"]
diverging = ["--rule", "backprop", "--optimizer", "SGD", "--weight-decay", "1e38", "--schedule", "constant"]
"""


@pytest.mark.slow
def test_a_grid_keeps_what_is_finished(tmp_path):
    (tmp_path / "grid.toml").write_text(GRID)
    out = run(sys.executable, ROOT / "benchmarks" / "grid.py", tmp_path, "--jobs", "2")
    assert "tune-diverging-lr0.01-seed0: failed: " in out
    names = sorted(path.name for path in (tmp_path / "raw").iterdir())
    assert names == [*(f"final-sll-lr0.01-seed{s}" for s in (0, 1)), "tune-sll-lr0.001-seed0", "tune-sll-lr0.01-seed0"]
    results = [json.loads((tmp_path / "raw" / name / "result.json").read_text()) for name in names[:2]]
    assert results[0]["command"] == (
        "layerwise train --model.width 16 --batch-size 256 --epochs 1 --rule sll --val-fraction 0 --lr 0.01 --seed 0 "
        "--threads 1"
    )
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert row["test_mean"] == f"{50 * sum(result['test_accuracy'] for result in results):.2f}"
    again = run(sys.executable, ROOT / "benchmarks" / "grid.py", tmp_path)
    assert "final-sll" not in again
