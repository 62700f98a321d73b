"""A comparison: the same for every rule, in any worker, and after any number of kills; failures are reported."""

import contextlib
import csv
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import COMPARE, TIMING, contents, result, split, start, weights

from layerwise import data, models, rules
from layerwise.cli.main import main
from layerwise.compare import grid as compare
from layerwise.compare import pool, rules_asked, tuning, worker
from layerwise.compare.grid_runs import GridRun
from layerwise.runs import arguments, building, progress
from layerwise.runs.options import TrainOptions, from_mapping, to_mapping, to_words
from layerwise.runs.settings import load_recipe

LABELS = ["sll", "sll:overlap=1", "backprop"]


def read_csv(folder, timing=False):
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if timing or k not in TIMING} for row in rows]


def cell(folder, rule, seed):
    return folder / "runs" / rule.replace(":", "-") / f"seed{seed}"


# What is asked for


def test_rules_have_their_options_behind_colons():
    common = TrainOptions(epochs=7)
    everything = set(rules.names())
    own_model = {"sid_cascade", "graph_forward", "noprop_dt", "noprop_ct", "noprop_fm", "stationary_feedback"}
    assert set(rules_asked.read_rules(["all"], common)) == everything - own_model
    found = rules_asked.read_rules(["sll,sll:overlap=1:weight=0/0.5", "backprop:lr=2e-3:clip=1"], common)
    assert list(found) == ["sll", "sll:overlap=1:weight=0/0.5", "backprop:lr=2e-3:clip=1"]
    plain, special, backprop = found.values()
    assert plain == common
    assert (special.rule.overlap, special.rule.weight, special.epochs) == (1, (0, 0.5), 7)
    assert (backprop.rule.name, backprop.lr, backprop.clip) == ("backprop", 2e-3, 1)


def test_a_rule_may_have_another_model_of_the_kind():
    common = from_mapping({"model": {"name": "sid_cascade", "depth": 5, "width": 32}})
    words = ["sid_cascade:alpha=1", "backprop", "backprop:model.depth=0:optimizer=sgd:weight-decay=5e-4"]
    sid, cascade, linear_head = rules_asked.read_rules(words, common).values()
    assert (sid.rule.alpha, sid.model, cascade.model) == (1, common.model, common.model)
    assert (linear_head.model.depth, linear_head.model.width) == (0, 32)
    assert (linear_head.optimizer, linear_head.weight_decay) == ("sgd", 5e-4)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_command_of_a_run_gives_its_options(data):
    """`to_words` against the real parser."""
    rule = data.draw(st.sampled_from(rules.names()))
    model = data.draw(st.sampled_from(models.names()))
    values = {"rule": {"name": rule}, "model": {"name": model, "width": 12 * data.draw(st.integers(1, 4))}}
    if rule == "sll":
        values["rule"] |= {
            "weight": data.draw(st.sampled_from([1.0, 0.5, 1e-5, [0.0, 1.0]])),
            "surrogate": data.draw(st.sampled_from(["kl", "none", "neg_log_bc"])),
            "dim": data.draw(st.sampled_from([None, 32])),
        }
    choices = {
        "augment": [[], ["flip", "crop"]],
        "lr": [1e-3, 1.2345e-5, 0.3],
        "clip": [None, 1.0],
        "steps": [None, 17],
        "compile": [False, True],
        "optimizer_options": [{}, {"momentum": 0.5, "eps": 1e-9}],
        "schedule": ["cosine", "onecycle"],
        "val_fraction": [0, 0.25],
        "out": [None, "a folder/x"],
        "threads": [None, 1],
    }
    for name, options in choices.items():
        values[name] = data.draw(st.sampled_from(options))
    options = from_mapping(load_recipe("digits").values | values)
    parsed = arguments.train_options(to_words(options), "train")
    assert to_mapping(parsed) == to_mapping(options)


WRONG = [
    ("--rule sll backprup", "unknown rule 'backprup'; did you mean 'backprop'"),
    ("--rule sll sll", "--rule names sll twice"),
    ("--rule sll:weight=1:overlap=1:weight=2", "gives weight twice"),
    ("--rule sll:overlap", "write overlap=VALUE after the colon"),
    ("--rule sll:overlab=1", "no option 'overlab'; did you mean 'overlap'"),
    ("--rule sll:epochs=3", "no option 'epochs'"),
    ("--rule sll:overlap=much", "overlap = 'much' is not int"),
    ("--rule sll:lr=-1", "lr is -1"),
    ("--rule sll:seed=1", "no option 'seed'"),
    ("--rule sll:model.dept=1", "no option 'model.dept'; did you mean 'model.depth'"),
    ("--rule sll:model.depth=x", "depth = 'x' is not int"),
    ("--rule.overlap 1", "compare has no --rule.overlap, because it compares several rules"),
    ("--seed 1", "unknown options: --seed"),
    ("--seeds 0", "seeds is 0"),
    ("--jobs 0", "jobs is 0"),
    ("--tune 2 --val-fraction 0", "--tune chooses on the validation split"),
    ("--budget seconds", "--budget seconds needs its amount: give --seconds too"),
    ("--budget epochs --steps 3", "the budget is in epochs, so --steps cannot be given"),
    ("--seconds 3 --flops 1e9", "the budget is in seconds, so --flops cannot be given"),
    ("--flops 0", "--flops is 0.0; it must be larger than 0"),
    ("--device warp", "unknown device 'warp'"),
    ("--data digitz", "digitz"),
    ("--batch-size 100000", "batch size"),
]


# The last is found by a worker, which has to start first.
@pytest.mark.parametrize(
    ("words", "sentence"),
    [pytest.param(*row, id=row[0], marks=pytest.mark.slow if row == WRONG[-1] else ()) for row in WRONG],
)
def test_wrong_use_is_one_sentence_and_leaves_nothing(words, sentence, tmp_path, capsys):
    assert main(["compare", "--seeds", "1", *split(words), "--out", str(tmp_path / "out")]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("layerwise: ") and sentence in last
    assert not before or "--batch-size" in words  # noticed while a step of each rule is made for its cost
    assert not (tmp_path / "out").exists()


# What is the same for every rule


def test_rules_start_from_the_same_weights_and_see_the_same_batches(tmp_path):
    words = split("--rule sll local_ce backprop backprop_checkpoint --model.width 16 --batch-size 512")
    options = arguments.train_options(words, "compare", base=compare.CompareOptions, hidden=("rule",))
    grid = compare.Grid(options)
    grid.chosen = {label: grid.rules[label] for label in grid.rules}
    seen = []
    for one in grid.finals()[:4]:
        dataset = building.load_data(one.options)
        batches, _, _ = building.split_batches(one.options, dataset, torch.device("cpu"))
        learner = building.build_learner(one.options, building.DataSignature.of(dataset), torch.device("cpu"), 3)
        seen.append((learner.network.state_dict(), [x for epoch in (0, 1) for x, _ in batches.epoch(epoch)]))
    for state, inputs in seen[1:]:
        assert all(torch.equal(state[name], seen[0][0][name]) for name in state)
        assert all(torch.equal(a, b) for a, b in zip(inputs, seen[0][1], strict=True))


def test_a_cell_is_what_its_own_command_gives(comparison, tmp_path):
    """Bit for bit, though a worker has trained other cells before it."""
    for label in LABELS[1:]:
        found = cell(comparison, label, 1)
        words = split(result(found)["command"])[2:]
        words[words.index("--out") + 1] = str(tmp_path / label)
        assert main(["train", *words]) == 0
        alone = weights(tmp_path / label)
        assert all(torch.equal(alone[name], tensor) for name, tensor in weights(found).items())
        assert main(["validate", str(found)]) == 0


def test_results_are_those_of_the_runs(comparison):
    rows = read_csv(comparison, timing=True)
    assert [(row["rule"], row["seed"]) for row in rows] == [(label, str(seed)) for label in LABELS for seed in (0, 1)]
    for row in rows:
        found = result(cell(comparison, row["rule"], row["seed"]))
        assert row["status"] == "ok"
        for name in ("test_accuracy", "val_accuracy", "test_loss", "train_seconds", "flops_per_step"):
            assert float(row[name]) == found[name]
        assert float(row["peak_mib"]) == found["memory_mib"]["peak"]
        assert float(row["flops"]) == found["flops_per_step"] * found["steps"]
        correct = np.load(cell(comparison, row["rule"], row["seed"]) / "test_correct.npy")
        assert correct.mean() == pytest.approx(found["test_accuracy"], abs=1e-6)  # sums of the batches are in float32
    table, deeper, sentences = (comparison.parent / "stdout").read_text().split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == LABELS
    assert [line.split()[0] for line in deeper.splitlines()[1:]] == LABELS
    assert "At 64 blocks" in sentences and "No learning rate was tuned" in sentences
    assert [line.partition(":")[0] for line in sentences.splitlines()[-2:]] == ["files", "report"]


def test_the_summary_is_the_statistics_of_the_rows(comparison):
    found = json.loads((comparison / "summary.json").read_text())["rules"]
    accuracy = {}
    for row in read_csv(comparison):
        accuracy.setdefault(row["rule"], []).append(float(row["test_accuracy"]))
    for label in LABELS:
        spread = found[label]["test_accuracy"]
        assert spread["mean"] == pytest.approx(statistics.fmean(accuracy[label]))
        assert spread["sd"] == pytest.approx(statistics.stdev(accuracy[label]))
        assert spread["n"] == 2
    differences = [a - b for a, b in zip(accuracy["sll"], accuracy["backprop"], strict=True)]
    paired = found["sll"]["difference_to_backprop"]
    assert paired["mean"] == pytest.approx(statistics.fmean(differences))
    assert (paired["n"], paired["low"], paired["high"]) == (2, None, None)  # two seeds are too few for an interval
    assert paired["samples"] == len(data.load("digits").test)
    assert found["backprop"]["difference_to_backprop"] is None


def test_the_record_names_command_machine_and_packages(comparison):
    record = json.loads((comparison / "compare.json").read_text())
    assert record["command"].startswith("layerwise compare --rule sll,sll:overlap=1 backprop --seeds 2")
    machine = json.loads((comparison / "environment.json").read_text())
    assert machine["torch"] == torch.__version__
    assert machine["packages"]["torch"] == torch.__version__.partition("+")[0] or "+" in machine["packages"]["torch"]
    assert {"sll", "backprop"} < record["plan"].keys()


# Statistics and trials


def test_trials_are_one_fixed_list_that_fills_the_square():
    options = TrainOptions(lr=0.01, weight_decay=0.1)
    trials = tuning.trial_options(options, 20)
    assert tuning.trial_options(options, 5) == trials[:5]
    assert trials[0] == options
    assert tuning.trial_options(options, 0) == []
    places = [(math.log10(t.lr / 0.01), math.log10(t.weight_decay / 0.1)) for t in trials[1:]]
    assert all(-1 < x < 1 and -1 < y < 1 for x, y in places)
    for sign_x in (-1, 1):
        for sign_y in (-1, 1):
            assert sum(x * sign_x >= 0 and y * sign_y >= 0 for x, y in places) >= 3


def test_the_best_trial_is_that_of_the_validation_split():
    found = [{"val_accuracy": a, "val_loss": b} for a, b in ((0.5, 1.0), (0.7, 2.0), (0.7, 1.5), (0.7, 1.5))]
    assert tuning.choose([None, *found]) == 3
    assert tuning.choose([None, None]) is None


# Killed and repeated


BLOWS = [[signal.SIGKILL], [signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]]


@pytest.mark.slow
@pytest.mark.parametrize("blows", BLOWS, ids=len)
def test_stopped_at_any_moment_and_repeated_it_gives_the_same(comparison, tmp_path, blows):
    """Stopped, then run to the end with another number of jobs; what was finished is not run again."""
    draw, folder = random.Random(len(blows)), tmp_path / "out"
    finished = {}
    for count, blow in enumerate(blows, 1):
        process = start(*COMPARE, "--no-report", "--jobs", "2", "--out", folder)
        deadline = time.monotonic() + 120
        while len(list(folder.glob("runs/*/*/result.json"))) < count:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(blow)
        err = process.communicate()[1]
        if blow == signal.SIGINT and process.returncode:  # 0 where a busy machine has let it finish before
            assert (process.returncode, err.splitlines()[-1]) == (130, "layerwise: stopped.")
        for file in folder.glob("runs/*/*/result.json"):
            finished.setdefault(file, file.stat().st_mtime_ns)
    half = cell(folder, "backprop", 1)  # last of the list
    if not (half / "result.json").exists():  # as a crash in the middle of a run leaves it
        half.mkdir(parents=True, exist_ok=True)
        (half / "metrics.jsonl").write_text('{"step": 3, "spl')
        (half / "config.json.partial").write_text("{")
    assert main([*COMPARE, "--no-report", "--jobs", "1", "--out", str(folder)]) == 0
    assert {file.stat().st_mtime_ns for file in finished} == set(finished.values())
    assert read_csv(folder) == read_csv(comparison)
    for label in LABELS:
        ours, theirs = (weights(cell(place, label, 0)) for place in (folder, comparison))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_repeating_a_finished_comparison_runs_nothing(comparison, capsys, tmp_path):
    folder = tmp_path / "out"  # other tests read the comparison at the same time
    shutil.copytree(comparison, folder)
    before = contents(folder / "runs")
    rows = read_csv(folder, timing=True)
    assert main([*COMPARE, "--no-report", "--out", str(folder)]) == 0
    assert contents(folder / "runs") == before
    assert read_csv(folder, timing=True) == rows


def test_other_options_in_the_same_folder_are_refused(comparison, capsys, tmp_path):
    before = contents(comparison)
    assert main([*COMPARE, "--lr", "0.5", "--out", str(comparison)]) == 2
    assert "holds a comparison with lr = 0.001, not 0.5" in capsys.readouterr().err
    assert contents(comparison) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*COMPARE, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_comparisons_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "PATIENCE", 0.2)
    with compare.claimed(tmp_path):
        assert main([*COMPARE, "--out", str(tmp_path)]) == 2
    assert "another comparison is running in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[" * 3000, '{"fixed": 3}', "[]", '{"fixed": {}, "plan": {"sll": 7}}', "\udcff"])
def test_a_damaged_record_is_refused(tmp_path, capsys, text):
    (tmp_path / "compare.json").write_bytes(text.encode(errors="surrogateescape"))
    assert main([*COMPARE, "--out", str(tmp_path)]) == 2
    assert re.fullmatch(
        r"layerwise: .*compare.json is damaged .*; remove the folder, or choose another --out\.\n",
        capsys.readouterr().err,
    )


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    """A parent that dies by SIGKILL in the middle of a long task; its worker holds a lock until it has ended."""
    code = f"""
import fcntl, os, time
from pathlib import Path
from layerwise.compare import pool
lock = open({str(tmp_path / "lock")!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with pool.WorkerPool(1, Path({str(tmp_path / "log")!r}), lock.fileno()) as workers:
    worker = workers._worker()
    print(worker.pid, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    with (tmp_path / "lock").open("w") as lock:
        while True:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)


# Failures, budgets, tuning

BROKEN = """
import os
from dataclasses import dataclass
import torch
from layerwise.rules import Backprop
from layerwise.rules.backprop import Backprop as Base

@dataclass(frozen=True)
class Broken(Base):
    how: str = "nan"
    name = "broken"
    def signal(self, at):
        signal = super().signal(at)
        if at.training and at.site.is_head:
            if self.how == "nan":
                signal.loss = signal.loss * float("inf")
            if self.how == "memory":
                torch.empty(2**60)
            if self.how == "killed" and os.path.exists(os.environ["KILL"]):
                os.kill(os.getpid(), 9)
            if self.how == "fault":
                raise ZeroDivisionError("no reason at all")
        return signal
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A package with a rule that fails as it is told to, found through its entry point."""
    place = tmp_path / "site"
    (place / "broken-1.0.dist-info").mkdir(parents=True)
    (place / "broken-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (place / "broken-1.0.dist-info" / "entry_points.txt").write_text("[layerwise.rules]\nbroken = broken:Broken\n")
    (place / "broken.py").write_text(BROKEN)
    (tmp_path / "kill").touch()
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("KILL", str(tmp_path / "kill"))
    return tmp_path / "kill"


@pytest.mark.slow
def test_failed_cells_are_told_and_the_others_go_on(broken, tmp_path, capsys):
    words = split("compare --rule broken:how=killed broken backprop --seeds 1 --steps 4 --model.width 8 --jobs 1")
    words += ["--no-report", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    out, err = capsys.readouterr()
    rows = {row["rule"]: row for row in read_csv(tmp_path / "out")}
    reasons = {
        "broken": "has a non-finite loss or gradient at step 0",
        "broken:how=killed": "was ended by SIGKILL",
    }
    for rule, reason in reasons.items():
        assert (rows[rule]["status"], rows[rule]["test_accuracy"]) == ("failed", "")
        assert reason in rows[rule]["reason"]
        assert f"{rule} seed 0: failed: " in err
        assert reason in out
    assert rows["backprop"]["status"] == "ok"

    broken.unlink()  # now there is enough memory, so to speak
    assert main(words) == 1
    err = capsys.readouterr().err
    assert {row["rule"]: row["status"] for row in read_csv(tmp_path / "out")}["broken:how=killed"] == "ok"
    assert "broken seed 0" not in err  # diverged once, diverged for ever: not run again
    assert "backprop seed 0" not in err


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("nan", "diverged", "non-finite loss"),
        ("memory", "memory", "out of memory ("),
        ("fault", "mistake", "ZeroDivision"),
    ],
)
def test_a_worker_gives_the_reason(broken, tmp_path, how, kind, reason):
    options = from_mapping({"rule": {"name": "broken", "how": how}, "steps": 2, "out": str(tmp_path / "run")})
    answer = worker.answer({"do": "train", "options": to_mapping(options), "command": ""})
    assert answer["kind"] == kind
    assert reason in answer["reason"]
    assert answer["reason"].count("\n") == 0
    assert ("Traceback" in answer.get("traceback", "")) == (kind in ("memory", "error"))


@pytest.mark.slow
def test_tuning_within_a_budget_of_flops(tmp_path, capsys):
    folder = tmp_path / "out"
    words = split("compare --rule backprop backprop_checkpoint --seeds 1 --flops 2e7 --tune 3 --lr 0.02")
    words += split("--model.width 16 --batch-size 128 --no-report --jobs 1 --out")
    assert main([*words, str(folder)]) == 0
    plan = json.loads((folder / "compare.json").read_text())["plan"]
    rows = {row["rule"]: row for row in read_csv(folder)}
    for rule, row in rows.items():
        trials = [result(folder / "trials" / rule / f"trial{i}") for i in range(3)]
        assert {trial["steps"] for trial in trials} == {int(row["steps"])}
        assert int(row["steps"]) == 2e7 // int(row["flops_per_step"])
        assert int(row["flops_per_step"]) == plan[rule]["flops_per_step"]
        best = max(trials, key=lambda trial: (trial["val_accuracy"], -trial["val_loss"]))
        config = json.loads((folder / "trials" / rule / f"trial{trials.index(best)}" / "config.json").read_text())
        assert (float(row["lr"]), float(row["weight_decay"])) == (config["lr"], config["weight_decay"])
        assert config["seed"] == compare.TUNE_SEED
    assert int(rows["backprop"]["steps"]) > int(rows["backprop_checkpoint"]["steps"])  # which runs forward twice


def test_seconds_become_steps_once(tmp_path):
    words = [*split("--rule backprop --seconds 2 --out"), str(tmp_path)]
    options = arguments.train_options(words, "compare", compare.CompareOptions, hidden=("rule",))
    grid = compare.Grid(options)
    grid.plan = {"backprop": {"seconds_per_step": 0.03}}
    assert grid._budgeted("backprop").steps == 66


# Processes and progress


def test_jobs_fit_cores_and_memory(monkeypatch):
    monkeypatch.setattr(pool, "cores", lambda: 8)
    monkeypatch.setattr(pool, "free_memory", lambda: 10 * 2**30)
    assert pool.default_jobs(100, 0) == 8
    assert pool.default_jobs(3, 0) == 3
    assert pool.default_jobs(100, 0, threads=4) == 2
    assert pool.default_jobs(100, 2 * 2**30) == 1
    assert pool.default_jobs(100, 100 * 2**30) == 1
    assert pool.default_jobs(100, 0, accelerator=True) == 1
    monkeypatch.setattr(pool, "free_memory", lambda: None)
    assert pool.default_jobs(100, 100 * 2**30) == 8


def test_time_left_is_that_of_the_work_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.GridProgress(100.0, 3, "grid") as grid:
        grid.skipped(20.0)
        assert grid.left() == "?"
        grid.begun("a", 40.0, lambda: 0.5)
        now[0] += 30
        assert grid.left() == "1:30"  # 20 of 80 in 30 s
        now[0] += 10
        grid.ended("a", "a is done")
    assert capsys.readouterr().err.splitlines() == ["grid", "a is done · 2 of 3 · 0:40 left"]


def test_a_torn_line_of_the_log_is_no_progress(tmp_path):
    one = GridRun("sll", "sll seed 0", TrainOptions(out=str(tmp_path)))
    assert one.last_step() == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "split": "train"}\n{"step": 7, "sp')
    assert one.last_step() == 5
