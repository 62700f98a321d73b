"""The command line: every command, what it prints and which files it writes."""

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import SMALL, contents, lines, result, split, start, train

from layerwise import __version__, data, models, rules
from layerwise.cli.main import COMMANDS, main
from layerwise.runs import building, checkpoint
from layerwise.runs.settings import recipe_names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("cli") / "run", "--steps", "10", "--lr", "0.01", "--save-every", "5")


def printed(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


# Help and lists


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys, words):
    out = printed(capsys, *words)
    assert all(f"\n  {command} " in out for command in COMMANDS)


def test_version(capsys):
    assert printed(capsys, "--version") == f"{__version__}\n"


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("rules", [*rules.names(), *rules.FORMS]),
        ("models", [*models.names(), *models.outside.FORMS]),
        ("data", data.names()),
        ("recipes", recipe_names()),
    ],
)
def test_ls_gives_a_line_each(capsys, what, names):
    rows = [row.split(maxsplit=1) for row in printed(capsys, "ls", what).splitlines()]
    assert [row[0] for row in rows] == list(names)
    assert all(len(row[1]) > 20 for row in rows)


@pytest.mark.parametrize("name", rules.names())
def test_describe_tells_what_a_rule_is(capsys, name):
    rule, out = rules.get(name), printed(capsys, "describe", name)
    assert out.startswith(f"{name}\n")
    for fact in ("locality", "backpropagation", "boundary", "memory", "source", "restrictions"):
        assert f"\n{fact} " in out
    whole = " ".join(out.split())
    assert rule.locality in whole
    assert rule.source in whole
    assert rule.boundary in whole
    for field in dataclasses.fields(rule):
        assert f"--rule.{field.name.replace('_', '-')}" in out or f"--rule.[no-]{field.name.replace('_', '-')}" in out


@pytest.mark.parametrize("columns", [60, 80])
def test_describe_fits_the_terminal_and_its_formulas_are_plain_text(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in rules.names():
        out = printed(capsys, "describe", name)
        assert max(map(len, out.splitlines())) <= columns, name
        assert not re.search(r"[\\${}]", out), name
        assert not re.search(r"\b(mathrm|frac|qquad|leftarrow|lVert|rVert)\b", out), name


@pytest.mark.slow
def test_a_rule_that_is_not_backprop_says_so(capsys):
    for name in rules.names():
        whole = "through the whole network" in printed(capsys, "describe", name)
        assert whole == (rules.get(name).locality == "global")


# Eval, predict, validate


def test_eval_repeats_the_figures_of_the_run(run, capsys, tmp_path):
    out = printed(capsys, "eval", run, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["head/accuracy"] == pytest.approx(result(run)["test_accuracy"], abs=1e-6)
    assert figures["head/loss"] == pytest.approx(result(run)["test_loss"], rel=1e-5)
    assert ["head/accuracy", f"{figures['head/accuracy']:.4f}"] in [line.split() for line in out.splitlines()]
    printed(capsys, "eval", run, "--split", "val", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["head/accuracy"] == pytest.approx(result(run)["val_accuracy"], abs=1e-6)


def test_eval_does_not_depend_on_the_batch_size(run, capsys):
    assert printed(capsys, "eval", run) == printed(capsys, "eval", run, "--batch-size", "100")


def test_eval_changes_no_file(run, capsys):
    before = contents(run)
    printed(capsys, "eval", run)
    assert contents(run) == before


def test_an_unfinished_run_is_evaluated_with_a_note(run, capsys, tmp_path):
    (run / "result.json").rename(tmp_path / "result.json")
    try:
        assert main(["eval", str(run)]) == 0
    finally:
        (tmp_path / "result.json").rename(run / "result.json")
    assert capsys.readouterr().err == (
        "layerwise: note: the run is not finished: these are its weights after step 10\n"
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight test digits as PNG files and as an array, and what the learner says to them."""
    pil = pytest.importorskip("PIL.Image", reason="the data extra is not installed")
    folder = tmp_path_factory.mktemp("pictures")
    digits = data.load("digits").test.images[:8]
    (folder / "png").mkdir()
    for i, image in enumerate(digits):
        pil.fromarray(image[0].numpy()).save(folder / "png" / f"{i}.png")
    np.save(folder / "digits.npy", digits.numpy())
    return folder


def classes_of(run, images):
    digits = data.load("digits")
    learner = building.load_run(run).learner
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (digits.mean, digits.std))
    probabilities = learner((images.float() / 255 - mean) / std).softmax(-1)
    return [digits.classes[i] for i in probabilities.argmax(-1)], probabilities.amax(-1).tolist()


@pytest.mark.parametrize("form", ["png", "digits.npy", "png/3.png"])
def test_predict_gives_the_learners_classes(run, pictures, capsys, form):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, "predict", run, pictures / form))))
    images = data.load("digits").test.images[:8]
    if form.endswith(".png"):
        images = images[3:4]
    classes, probabilities = classes_of(run, images)
    assert [row["class"] for row in rows] == classes
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities, abs=1e-5)
    names = {"png": [str(pictures / "png" / f"{i}.png") for i in range(8)], "digits.npy": list("01234567")}
    assert [row["input"] for row in rows] == names.get(form, [str(pictures / form)])


def test_predict_writes_a_file(run, pictures, capsys, tmp_path):
    wanted = printed(capsys, "predict", run, pictures / "digits.npy")
    assert printed(capsys, "predict", run, pictures / "digits.npy", "--out", tmp_path / "out.csv") == ""
    assert (tmp_path / "out.csv").read_text() == wanted


def test_predict_needs_no_data_set(run, pictures, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    assert len(printed(capsys, "predict", run, pictures / "digits.npy").splitlines()) == 9


@pytest.mark.parametrize("rule", ["sll", "local_ce", "backprop", "sid_cascade"])
def test_validate_finds_the_declared_properties(capsys, rule):
    model = rule if rule == "sid_cascade" else "mlp"
    out = printed(capsys, "validate", "--rule", rule, "--model", model)
    assert all(line.startswith("ok  ") for line in out.splitlines())
    assert ("no group's signal leaves a gradient" in out) == (rule != "backprop")
    assert ("bit for bit" in out.splitlines()[-1]) == (rule == "local_ce")


def test_validate_notices_a_leak(capsys, monkeypatch):
    """Gradients that are not freed are still there when the next block steps."""
    monkeypatch.setattr("layerwise.core.groups.Group.free", lambda self: None)
    assert main(["validate", "--rule", "local_ce"]) == 2
    assert "FAIL  no group's signal" in capsys.readouterr().out


def test_validate_reads_a_run(run, capsys):
    out = printed(capsys, "validate", run)
    assert [line[:4].strip() for line in out.splitlines()] == ["ok"] * 8
    assert "step-000000010 matches its digest" in out


def test_validate_finds_a_damaged_file(run, capsys):
    file = run / "checkpoints" / "step-000000005" / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        assert main(["validate", str(run)]) == 2
    finally:
        file.write_bytes(whole)
    out = capsys.readouterr().out
    assert [line[:4] for line in out.splitlines()].count("FAIL") == 1
    assert "step-000000005 is damaged" in out


OTHERS = {
    "metrics.jsonl": [b"\xff", b'{"step": "x"}\n', None],
    "result.json": [b"[]", b'{"steps": 1', b"{}"],
    "model.safetensors": [b"", None, "other weights"],
    "test_correct.npy": [b"", b"\x93NUMPY", "other outcomes"],
    "checkpoints": ["other options", "no state of a run"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_validate_looks_at_every_file_and_whether_it_is_of_this_run(run, tmp_path, capsys, name):
    for damage in OTHERS[name]:
        copy = shutil.copytree(run, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        file = copy / name
        if damage == "other weights":
            save_file({n: t + 1 for n, t in load_file(file).items()}, file)
        elif damage == "other outcomes":
            np.save(file, ~np.load(file))
        elif name == "checkpoints":
            state = checkpoint.load_latest(file)[0]
            shutil.rmtree(file)
            options = {**state["options"], "seed": 77}
            checkpoint.save(file, 10, {**state, "options": options} if damage == "other options" else {"learner": {}})
        elif damage is None:
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(damage)
        assert main(["validate", str(copy)]) == 2
        failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
        assert failed and all(name.rstrip("s") in line for line in failed), (damage, failed)


# Bench

BENCH = split("--shape 1 8 8 --batch-size 4 --threads 1 --model.width 16")


def test_bench_memory_counts_exactly(capsys, tmp_path):
    """MLP of depth d on 64 pixels, 10 classes: 65*16 + (d-1)*17*16 + 17*10 weights; SLL adds d-1 projections."""
    file = tmp_path / "memory.json"
    printed(capsys, "bench", "memory", *BENCH, "--depths", "2,5", "--rule", "sll", "backprop", "--json", file)
    rows = json.loads(file.read_text())
    assert [(row["rule"], row["depth"]) for row in rows] == [("sll", 2), ("sll", 5), ("backprop", 2), ("backprop", 5)]
    for row in rows:
        parts = ["parameters", "optimizer", "gradients", "activations"]
        assert list(row) == ["rule", "model", "depth", "offload", *parts, "peak"]
        assert row["peak"] == sum(row[part] for part in parts)
        depth, weights = row["depth"], 65 * 16 + (row["depth"] - 1) * 17 * 16 + 17 * 10
        assert row["parameters"] == 4 * (weights + ((depth - 1) * 10 * 16 if row["rule"] == "sll" else 0))
        assert row["optimizer"] == 4 * (2 * weights + 2 * (depth + 1))  # AdamW: two moments, a counter per tensor
    few, many = rows[2:]
    assert many["gradients"] - few["gradients"] == 4 * 3 * 17 * 16  # backprop holds the gradient of every block


def test_a_benchmark_takes_rules_with_options(capsys, tmp_path):
    """A private readout of K = 10 and width 16 is 17 x 10 weights after each block but the last."""
    file = tmp_path / "memory.json"
    words = ("local_ce:group=1", "local_ce:group=3", "local_ce:readout=low_rank:rank=2")
    out = printed(capsys, "bench", "memory", *BENCH, "--depths", "3", "--rule", *words, "--json", file)
    rows = {row["rule"]: row for row in json.loads(file.read_text())}
    assert list(rows) == list(words) and all(word in out for word in words)
    weights = 65 * 16 + 2 * 17 * 16 + 17 * 10
    heads = {words[0]: 2 * 17 * 10, words[1]: 0, words[2]: 2 * (16 + 2 * (16 + 10))}
    assert {word: row["parameters"] for word, row in rows.items()} == {w: 4 * (weights + n) for w, n in heads.items()}
    for words, sentence in (
        (("local_ce:grup=2",), "local_ce:grup=2: no option 'grup'; did you mean 'group'"),
        (("local_ce:group",), "write group=VALUE after the colon"),
        (("local_ce:group=0",), "group"),
    ):
        assert main(["bench", "memory", "--rule", *words]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_bench_memory_of_streamed_blocks_is_flat(capsys, tmp_path):
    """A block of width 512 has a weight of 1 MiB; two of them are on the device, with gradients of one."""
    file, block = tmp_path / "memory.json", 4 * 513 * 512
    words = split("--shape 1 8 8 --batch-size 4 --threads 1 --model.width 512 --depths 6,22 --rule local_ce")
    words += [
        "--offload",
        "disk",
        "--offload-folder",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--json",
        str(file),
    ]
    out = printed(capsys, "bench", "memory", *words)
    few, many = rows = json.loads(file.read_text())
    assert [(row["depth"], row["offload"]) for row in rows] == [(6, "disk"), (22, "disk")]
    for row in rows:
        assert 2 * block <= row["parameters"] < 2.5 * block
        assert 4 * block <= row["optimizer"] < 5 * block
        assert row["peak"] == sum(row[part] for part in ("parameters", "optimizer", "gradients", "activations"))
        assert row["resident"] is None or f"{row['resident'] / 2**20:.3f}" in out
    if many["resident"] is not None:
        assert few["resident"] > few["peak"]
        assert many["resident"] - few["resident"] < 16 * 3 * block / 3  # weights and two moments of 16 more blocks
    assert "Resident" in (tmp_path / "out" / "report.html").read_text()


def test_bench_speed_gives_every_rule(capsys, tmp_path):
    file = tmp_path / "speed.json"
    out = printed(capsys, "bench", "speed", *BENCH, *split("--model mlp --depth 2 --rounds 3 --json"), file)
    rows = json.loads(file.read_text())
    assert [row["rule"] for row in rows] == ["sll", "backprop", "backprop_checkpoint"]
    for row in rows:
        assert row["samples_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["ratio_10"] <= row["ratio"] <= row["ratio_90"]
        assert (row["depth"], row["rounds"], row["baseline"]) == (2, 3, "backprop")
        assert row["rule"] in out
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert all(0 < row["shares"][part] < 1 for part in ("forward", "backward", "optimizer"))
    assert rows[1]["ratio"] == 1
    # A product of matrices is two operations per weight and sample; backprop: forward, weights, inputs but the first.
    first, rest = 64 * 16, 16 * 16 + 16 * 10
    assert rows[1]["flops"] == 4 * 2 * (2 * first + 3 * rest)
    assert rows[2]["flops"] - rows[1]["flops"] == 4 * 2 * (first + 16 * 16)  # the blocks' forward pass once more


# Processes of their own

HEAVY = ("datasets", "sklearn", "matplotlib", "tensorboard", "tyro", "rich", "pandas", "pyarrow", "PIL", "torchvision")


@pytest.mark.slow
def test_importing_and_helping_is_light():
    code = f"""
import sys, time, torch
before = set(sys.modules)
started = time.perf_counter()
import layerwise
from layerwise.cli.main import main
assert main(["--help"]) == 0
print(time.perf_counter() - started)
print([name for name in {HEAVY} if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.splitlines()[-2:]
    assert heavy == "[]"
    assert float(seconds) < 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
def test_output_on_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        process = start("ls", "data", stdout=full)
    assert process.communicate(timeout=60)[1] == "layerwise: cannot print (No space left on device).\n"
    assert process.returncode == 2


def test_a_reader_that_goes_away_is_no_error():
    process = start("ls", "data")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_the_main_job_prints_a_table(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = printed(capsys, "train", *SMALL, "--steps", "3")
    folder = tmp_path / "runs" / "digits-mlp-sll-seed0"
    names = [line.split("  ")[0] for line in out.splitlines()]
    before = ["rule", "test accuracy", "val accuracy", "by block", "updates"]
    assert names[:8] == [*before, "training time", "peak memory", "files"]
    assert f"{100 * result(folder)['test_accuracy']:.2f} %" in out
    assert lines(folder, "test")
