"""A training run: what it writes, and what its options do."""

import dataclasses
import json
import math
import re
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import SMALL, lines, result, split, state, train, weights

from layerwise import LayerwiseError, Learner, data, models, rules
from layerwise.cli.main import main
from layerwise.cli.train import result_table
from layerwise.runs import building, environment, training
from layerwise.runs.options import TrainOptions, from_mapping, to_mapping
from layerwise.runs.settings import load_recipe, recipe_names

SHORT = split("--epochs 2 --batch-size 256 --log-every 2")  # 5 steps an epoch: 1294 // 256
FIELDS = {
    "rule": str,
    "model": str,
    "data": str,
    "seed": int,
    "epochs": (int, float),
    "steps": int,
    "test_accuracy": float,
    "val_accuracy": float,
    "train_seconds": float,
    "samples_per_second": float,
    "memory_mib": dict,
    "flops_per_step": int,
    "torch": str,
    "device": str,
    "command": str,
    "notes": list,
    "by_epoch": dict,
    "test": dict,
    "machines": list,
    "options": dict,
}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return train(tmp_path_factory.mktemp("short") / "run", *SHORT)


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What a run writes


def test_result_has_every_field(short):
    found = result(short)
    for name, kind in FIELDS.items():
        assert isinstance(found[name], kind), name
    assert (found["rule"], found["model"], found["data"], found["seed"]) == ("sll", "mlp", "digits", 0)
    assert (found["epochs"], found["steps"], found["torch"]) == (2, 10, torch.__version__)
    assert found["command"].startswith("layerwise train --model.width 16")
    assert 0 <= found["test_accuracy"] <= 1
    assert found["samples_per_second"] == pytest.approx(10 * 256 / found["train_seconds"])


def test_memory_is_that_of_the_network(short):
    memory = result(short)["memory_mib"]
    learned = 65 * 16 + 17 * 16 + 17 * 10
    projections = 1 * 10 * 16  # of the first block; the last one is read by the head
    tensors = 6
    assert memory["parameters"] * 2**20 == 4 * (learned + projections)
    assert memory["optimizer"] * 2**20 == 4 * (2 * learned + tensors)  # two moments, one step counter per tensor
    assert 0 <= memory["gradients"] * 2**20 <= 4 * learned  # none yet, where the peak is in the forward pass
    assert memory["activations"] > 0
    assert result(short)["parameters"] == learned


def test_flops_are_those_of_the_matrix_products(short):
    """Two per weight and sample: forward, gradient of weights, gradient of inputs (not of a group's first layer)."""
    first, second, head, projection = 64 * 16, 16 * 16, 16 * 10, 16 * 10
    forward, weights_back = first + second + head + projection, first + second + head
    inputs_back = projection + head  # each group's first layer sees a detached input
    assert result(short)["flops_per_step"] == 2 * 256 * (forward + weights_back + inputs_back)


def test_the_seconds_of_an_epoch_are_training_time(short):
    text = (short / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in text if json.loads(line)["split"] == "val"]
    assert 0 < seconds[0] < seconds[1] == pytest.approx(result(short)["train_seconds"])


def test_metrics_have_one_line_per_event(short):
    assert [line["step"] for line in lines(short, "train")] == [2, 4, 5, 6, 8, 10]
    assert [line["step"] for line in lines(short, "val")] == [5, 10]
    assert [line["step"] for line in lines(short, "test")] == [10]
    for line in lines(short):
        assert {"head/loss", "head/accuracy", "block1/loss", "head/divergence"} <= line.keys()
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))


def test_result_is_the_last_evaluation(short):
    assert result(short)["test_accuracy"] == lines(short, "test")[0]["head/accuracy"]
    assert result(short)["val_accuracy"] == lines(short, "val")[-1]["head/accuracy"]
    assert result(short)["blocks"].keys() == {"block1", "head"}


def test_result_says_by_itself_what_made_it(short):
    found = result(short)
    assert found["test"] == {k: v for k, v in lines(short, "test")[0].items() if k not in ("step", "split")}
    assert found["by_epoch"]["val"] == [line["head/accuracy"] for line in lines(short, "val")]
    logged = [line["head/accuracy"] for line in lines(short, "train")]
    assert found["by_epoch"]["train"] == pytest.approx([sum(logged[:3]) / 3, sum(logged[3:]) / 3])
    config = json.loads((short / "config.json").read_text())
    assert found["options"] == {k: v for k, v in config.items() if k not in ("out", "overwrite", "offload_folder")}
    assert found["machines"] == [environment.machine()]
    assert found["machines"][0]["torch"] == torch.__version__ and found["machines"][0]["cores"] >= 1


def test_every_machine_that_a_run_was_on_is_named(tmp_path, monkeypatch):
    here = environment.machine()
    with monkeypatch.context() as patch:
        patch.setattr("layerwise.runs.training.machine", lambda: here | {"cpu": "another"})
        train(tmp_path / "run", *SHORT)
    for _ in range(2):  # the second resume adds nothing
        assert main(["train", "--resume", str(tmp_path / "run")]) == 0
        assert [machine["cpu"] for machine in result(tmp_path / "run")["machines"]] == ["another", here["cpu"]]


def test_the_commit_is_that_of_our_checkout_and_of_no_other(tmp_path, monkeypatch):
    def git(*words):
        config = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *config, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(package):
        monkeypatch.setattr(environment, "files", lambda name: package)
        return environment.commit.__wrapped__()

    package = tmp_path / "src" / "layerwise"
    package.mkdir(parents=True)
    (package / "a.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit(package) == head
    (tmp_path / "result.json").write_text("a new file changes nothing")
    assert commit(package) == head
    (package / "a.py").write_text("1")
    assert commit(package) == head + "-dirty"
    inside = tmp_path / ".venv" / "site-packages" / "layerwise"  # of a user's own repository
    inside.mkdir(parents=True)
    assert commit(inside) is None
    monkeypatch.setenv("PATH", "")  # no git
    assert commit(package) is None


def test_weights_fit_the_plain_model_and_predict_the_same(short):
    model = models.create("mlp", (1, 8, 8), 10, depth=2, width=16).eval()
    model.load_state_dict(weights(short), strict=True)
    digits = data.load("digits")
    batches = data.Batches(digits.test, 512, seed=0, mean=digits.mean, std=digits.std, shuffle=False, drop_last=False)
    with torch.no_grad():
        correct = sum(int((model(x).argmax(-1) == y).sum()) for x, y in batches.epoch(0))
    assert correct / len(digits.test) == pytest.approx(result(short)["test_accuracy"], abs=1e-6)


def test_only_plain_files_are_left(short):
    assert sorted(path.name for path in short.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "result.json",
        "test_correct.npy",
    ]  # fmt: skip
    assert not list(short.rglob("*.partial"))


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    train(tmp_path / "run", *SHORT)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    title, *epochs = err.splitlines()
    assert title == f"sll · mlp · digits · seed 0 · {tmp_path / 'run'}"
    assert [line.split(" · ")[0] for line in epochs] == ["epoch 1.0", "epoch 2.0"]
    for line in epochs:
        assert all(word in line for word in ("loss", "val", "samples/s", "MiB", "left"))
    assert f"test accuracy  {100 * result(tmp_path / 'run')['test_accuracy']:.2f} %" in out


# Selection and evaluation


def test_splits_are_disjoint_and_fixed():
    parts = [data.load("digits", val_fraction=fraction) for fraction in (0, 0.1, 0.3)]
    tests = [part.test.images for part in parts]
    assert all(torch.equal(tests[0], other) for other in tests)
    options = [TrainOptions(seed=seed) for seed in (0, 1)]
    first, second = (building.load_data(option) for option in options)
    assert torch.equal(first.val.images, second.val.images)  # the run's seed does not move a sample


def test_test_data_is_touched_once_at_the_end(tmp_path, monkeypatch):
    seen = []
    real = training.evaluate

    def spy(learner, batches):
        seen.append((learner.steps, len(batches.source)))
        return real(learner, batches)

    monkeypatch.setattr(training, "evaluate", spy)
    train(tmp_path / "run", *SHORT)
    assert seen == [(5, 144), (10, 144), (10, 359)]


def test_no_validation_split(tmp_path):
    train(tmp_path / "run", *SHORT, "--val-fraction", "0")
    assert result(tmp_path / "run")["val_accuracy"] is None
    assert lines(tmp_path / "run", "val") == []


# Options


def test_steps_override_epochs(tmp_path):
    train(tmp_path / "run", *SHORT, "--steps", "7")
    assert (result(tmp_path / "run")["steps"], result(tmp_path / "run")["epochs"]) == (7, 7 / 5)


@pytest.mark.parametrize("warmup", ["0.3", "0.5"])
def test_one_step_is_a_run_and_a_warm_up_that_it_cannot_have_is_noted(tmp_path, warmup):
    """0.3 is the default: nobody has asked for it."""
    train(tmp_path / "run", "--steps", "1", "--schedule", "constant", "--warmup", warmup)
    found = result(tmp_path / "run")
    assert found["memory_mib"]["parameters"] > 0
    assert any("--warmup" in note for note in found["notes"]) == (warmup == "0.5")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedule_reaches_its_end(tmp_path, accumulate):
    """Half a cosine from 0.04 up, then half a cosine down to 1e-5, over the updates."""
    words = ["--log-every", "1", "--lr", "0.01", "--warmup", "0.25", "--steps", "12"]
    train(tmp_path / "run", *words, "--accumulate", str(accumulate))
    rates = [line["lr"] / 0.01 for line in lines(tmp_path / "run", "train")]
    updates = 12 // accumulate
    rise = 0.25 * updates

    def share(update):
        if update < rise:
            return 0.04 + 0.96 * (1 - math.cos(math.pi * update / rise)) / 2
        return 1e-5 + (1 - 1e-5) * (1 + math.cos(math.pi * (update - rise) / (updates - rise))) / 2

    assert rates == pytest.approx([share(step // accumulate) for step in range(12)])
    table = result_table(result(tmp_path / "run"), "run")
    assert re.search(r"^updates +(\d+)", table, re.MULTILINE)[1] == str(updates)


@pytest.mark.slow
def test_learning_rates_follow_the_multipliers(tmp_path, monkeypatch):
    """SGD without decay: one step moves a block by its multiplier times what it moves at 1."""
    words = split("--steps 1 --schedule constant --optimizer SGD --lr 0.5 --weight-decay 0")
    runs = {}
    for name, extra in (("still", ["--lr-multipliers", "block1", "0", "head", "0"]), ("one", []),
                        ("two", ["--lr-multipliers", "block1", "2"])):  # fmt: skip
        runs[name] = weights(train(tmp_path / name, *words, *extra))
    moved = {name: runs[name]["block1.linear.weight"] - runs["still"]["block1.linear.weight"] for name in runs}
    assert moved["one"].abs().max() > 0
    torch.testing.assert_close(moved["two"], 2 * moved["one"], rtol=1e-4, atol=1e-6)
    assert torch.equal(runs["one"]["block2.linear.weight"], runs["two"]["block2.linear.weight"])
    assert not torch.equal(runs["one"]["head.weight"], runs["still"]["head.weight"])


def test_accumulating_is_the_larger_batch(tmp_path):
    """The mean of equal parts' gradients is the whole's gradient: 4 batches of 64 are one of 256."""
    words = split("--rule backprop --schedule constant --optimizer SGD --lr 0.5 --seed 3")
    large = weights(train(tmp_path / "large", *words, "--steps", "2", "--batch-size", "256"))
    parts = weights(train(tmp_path / "parts", *words, "--steps", "8", "--batch-size", "64", "--accumulate", "4"))
    for name, weight in large.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-4, atol=1e-5)


def test_label_smoothing_bounds_the_loss(tmp_path):
    """Against targets smoothed by s over K classes no loss is below their entropy."""
    s, classes = 0.5, 10
    likely, other = 1 - s + s / classes, s / classes
    entropy = -likely * math.log(likely) - (classes - 1) * other * math.log(other)
    train(tmp_path / "run", "--label-smoothing", str(s), "--steps", "60", "--epochs", "12", "--rule", "backprop",
          "--lr", "0.02", "--log-every", "1")  # fmt: skip
    losses = [line["head/loss"] for line in lines(tmp_path / "run", "train")]
    assert min(losses) >= entropy - 1e-5
    assert losses[-1] < entropy + 0.3


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_half_precision_keeps_fp32_weights_and_learns(tmp_path, precision):
    words = ["--steps", "40", "--lr", "0.02", "--rule", "backprop", "--log-every", "1"]
    half = train(tmp_path / "half", *words, "--precision", precision)
    full = train(tmp_path / "full", *words)
    assert {weight.dtype for weight in weights(half).values()} == {torch.float32}
    assert not same_weights(half, full)
    assert result(half)["test_accuracy"] == pytest.approx(result(full)["test_accuracy"], abs=0.05)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--cuts", "block", "--rule.head", "separate"], ["block1", "block2"]),
        (["--cuts", "block1", "--model.depth", "3"], ["block1"]),
        (["--blocks", "1"], None),
        (["--model.depth", "4", "--blocks", "2"], None),
    ],
)
def test_blocks_are_where_they_are_asked_for(tmp_path, words, names):
    train(tmp_path / "run", "--steps", "2", *words)
    found = [name for name in result(tmp_path / "run")["blocks"] if name != "head"]
    wanted = len(names) if names else int(words[words.index("--blocks") + 1])
    assert len(found) <= wanted
    assert state(tmp_path / "run")["steps"] == 2
    if names and "--model.depth" not in words:
        assert found == names


def test_clip_bounds_the_first_step(tmp_path):
    """Plain SGD moves the weights of a group by at most lr x clip."""
    words = split("--rule backprop --schedule constant --optimizer sgd --optimizer-options momentum 0 nesterov 0")
    words += split("--weight-decay 0 --steps 1")
    still = weights(train(tmp_path / "still", *words, "--lr", "1e-30"))
    moved = weights(train(tmp_path / "moved", *words, "--lr", "1", "--clip", "0.01"))
    length = math.sqrt(sum(float((moved[name] - still[name]).square().sum()) for name in still))
    assert length == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_spares_biases(tmp_path):
    """Without a gradient's share (multiplier and rate alike) decay shrinks matrices and leaves biases."""
    words = split("--rule last_layer --schedule constant --steps 1 --optimizer SGD --lr 0.01")
    without = weights(train(tmp_path / "without", *words, "--weight-decay", "0"))
    decayed = weights(train(tmp_path / "with", *words, "--weight-decay", "10"))
    assert torch.equal(without["head.bias"], decayed["head.bias"])
    assert decayed["head.weight"].norm() < 0.95 * without["head.weight"].norm()
    assert torch.equal(without["block1.linear.weight"], decayed["block1.linear.weight"])


def test_skipped_steps_are_counted(tmp_path, monkeypatch, capsys):
    """The second batch of the training split holds a number that is none."""
    plain = data.Batches.epoch

    def epoch(batches, number, start=0):
        for index, (x, y) in enumerate(plain(batches, number, start)):
            yield (x * math.nan if batches.shuffle and index == 1 else x), y

    monkeypatch.setattr(data.Batches, "epoch", epoch)
    train(tmp_path / "run", "--steps", "3", "--nonfinite", "skip", "--rule", "backprop")
    assert result(tmp_path / "run")["skipped_steps"] == 1
    assert re.search(r"skipped steps +1\n", capsys.readouterr().out)


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tmp_path / "run", *SHORT, "--tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("val/head/loss")]
    wanted = [(line["step"], line["head/loss"]) for line in lines(folder, "val")]
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted])


# Seeds


def test_same_seed_same_bits_other_seed_other_bits(tmp_path, short):
    torch.manual_seed(123)  # torch's own generator must not matter
    again = train(tmp_path / "again", *SHORT)
    other = train(tmp_path / "other", *SHORT, "--seed", "1")
    assert same_weights(short, again)
    assert lines(short) == lines(again)
    assert not same_weights(short, other)


def test_saving_and_logging_do_not_change_the_run(tmp_path, short):
    busy = train(tmp_path / "busy", *SHORT, "--save-every", "1", "--log-every", "1")
    assert same_weights(short, busy)
    assert lines(short, "test") == lines(busy, "test")


# Folders


def test_folders_without_a_name_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", *SMALL, "--steps", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "digits-mlp-sll-seed0",
        "digits-mlp-sll-seed0-2",
    ]


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, short):
    folder = train(tmp_path / "run", "--steps", "1")
    train(folder, "--steps", "2", "--overwrite")
    assert result(folder)["steps"] == 2
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"cat")
    assert main(["train", *SMALL, "--steps", "1", "--out", str(other), "--overwrite"]) == 2
    assert (other / "cat.png").read_bytes() == b"cat"


# Recipes and options


def test_recipe_values_and_what_overrides_them(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('about = "x"\nsteps = 3\nlr = 0.5\n[rule]\nname = "sll"\nweight = 0.25\n[model]\nwidth = 8\n')
    train(tmp_path / "run", "--recipe", str(recipe), "--lr", "0.125", "--rule.scale", "2")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["steps"], config["lr"]) == (3, 0.125)
    assert (config["rule"]["weight"], config["rule"]["scale"]) == (0.25, 2.0)
    assert (config["model"]["name"], config["model"]["width"]) == ("mlp", 16)  # SMALL says --model.width 16


def test_config_is_a_recipe(tmp_path, short):
    """The record of a run gives the run again."""
    options = from_mapping(json.loads((short / "config.json").read_text()))
    run = training.Run(dataclasses.replace(options, out=str(tmp_path / "again")))
    run.train()
    assert same_weights(short, tmp_path / "again")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_read(name):
    recipe = load_recipe(name)
    from_mapping(recipe.values)
    assert recipe.about.strip()


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.parametrize("model", models.names())
def test_options_survive_json(rule, model):
    options = TrainOptions(rule=rules.create(rule), model=models.options(model)(), augment=("flip", "crop"))
    assert from_mapping(json.loads(json.dumps(to_mapping(options)))) == options


@settings(max_examples=50, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "lr": st.floats(1e-6, 10),
            "epochs": st.integers(1, 10**6),
            "steps": st.none() | st.integers(1, 100),
            "augment": st.lists(st.sampled_from(["flip", "crop"])).map(tuple),
            "lr_multipliers": st.dictionaries(st.text(), st.floats(0, 10)),
            "clip": st.none() | st.floats(0.1, 9),
            "compile": st.booleans(),
            "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
            "out": st.none() | st.text(),
            "label_noise": st.floats(0, 0.99),
            "label_noise_kind": st.sampled_from(["symmetric", "pairs"]),
            "clean_validation": st.booleans(),
        },
    ),
    weight=st.floats(0, 3) | st.lists(st.floats(0, 3), min_size=1).map(tuple),
)
def test_any_options_survive_json(changes, weight):
    options = TrainOptions(rule=rules.create("sll", weight=weight), **changes)
    assert from_mapping(json.loads(json.dumps(to_mapping(options)))) == options


WRONG = [{"lr": "fast"}, {"epochs": True}, {"rule": "sll"}, {"lrr": 1}, {"clip": math.nan}]


@pytest.mark.parametrize("values", [*WRONG, {"rule": {"scale": math.inf}}, [], 3])
def test_wrong_options_are_refused(values):
    with pytest.raises(LayerwiseError):
        from_mapping(values)


def test_the_learner_is_that_of_the_options(tmp_path, monkeypatch):
    """Every option of the learner arrives there."""
    given_ = {}
    real = Learner.__init__

    def spy(self, model, rule, **options):
        given_.update(options)
        real(self, model, rule, **options)

    monkeypatch.setattr(Learner, "__init__", spy)
    words = split("--steps 1 --clip 0.5 --accumulate 2 --precision bf16 --channels-last --nonfinite skip --seed 9")
    train(tmp_path / "run", *words, "--label-smoothing", "0.2", "--weight-decay", "0.3")
    wanted = {"clip": 0.5, "accumulate": 2, "precision": "bf16", "channels_last": True, "nonfinite": "skip", "seed": 9}
    wanted |= {"label_smoothing": 0.2, "weight_decay": 0.3, "compile": False}
    assert {name: given_[name] for name in wanted} == wanted
