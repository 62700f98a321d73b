"""Runs, evaluation, prediction and comparison under each task, from the command line."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from support.runs import result, train

from layerwise import LayerwiseError, data
from layerwise.cli.main import main
from layerwise.compare.tuning import choose
from layerwise.core.tasks import metric_of
from layerwise.measure import beliefs, diagnostics
from layerwise.report.summary import columns
from layerwise.runs import building
from layerwise.runs.predicting import predictions

SCENES = ("--data", "digit_scenes", "--train-samples", "200", "--batch-size", "50", "--epochs", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    patients = ("--data", "diabetes", "--task", "regression", "--batch-size", "32", "--epochs", "6", "--lr", "0.01")
    return {
        "regression": train(base / "r", *patients, "--rule", "sid", "--loss", "gaussian"),
        "multilabel": train(base / "m", *SCENES, "--task", "multilabel", "--rule", "local_ce"),
        "segmentation": train(base / "s", *SCENES, "--task", "segmentation", "--model", "fcn", "--rule", "sll"),
    }


def outputs_and_labels(folder):
    run = building.load_run(folder)
    batches = building.split_in_order(run, "test", 64, folder)
    found = [(run.learner(x), y) for x, y in batches.epoch(0)]
    return run.learner.task, *(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("task", ["regression", "multilabel", "segmentation"])
def test_a_result_has_the_metric_of_the_whole_split_and_not_the_mean_over_batches(runs, task):
    found, metric = result(runs[task]), metric_of(task).name
    assert found["task"] == task and found["metric"] == metric and "test_accuracy" not in found
    own, outputs, y = outputs_and_labels(runs[task])
    assert found[f"test_{metric}"] == pytest.approx(float(own.metrics(outputs, y)[metric]), rel=1e-5)
    assert found[f"val_{metric}"] is not None and {"block1", "head"} <= set(found["blocks"])
    assert not (runs[task] / "test_correct.npy").exists()


def test_regression_beats_the_mean_and_predicts_in_the_units_of_the_target(runs, tmp_path):
    found = data.load("diabetes", task="regression")
    spread = float((found.test.labels - found.target_mean[0]).square().mean().sqrt())
    assert result(runs["regression"])["test_rmse"] < 0.9 * spread
    names = (*found.columns, "y")
    with (tmp_path / "new.csv").open("w", newline="") as file:
        rows = [[*map(float, row.flatten()), 0] for row in found.test.images]
        csv.writer(file).writerows([names, *rows])
    text, _ = predictions(runs["regression"], tmp_path / "new.csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["input", "progression", "progression sd"] and len(rows) == len(found.test)
    own, outputs, _ = outputs_and_labels(runs["regression"])
    predicted = [float(row["progression"]) for row in rows]
    assert predicted == pytest.approx(own.decode(outputs).flatten().tolist(), rel=1e-4)
    assert all(0 < float(row["progression sd"]) < 1000 for row in rows)


def test_several_labels_are_predicted_by_name_and_maps_as_an_array(runs, tmp_path, capsys):
    images = data.load("digit_scenes", task="multilabel").test.images[:5]
    np.save(tmp_path / "x.npy", images.numpy())
    text, _ = predictions(runs["multilabel"], tmp_path / "x.npy")
    for row in csv.DictReader(io.StringIO(text)):
        assert row["labels"].split() == [name for name in "0123456789" if float(row[name]) >= 0.5]
    assert main(["predict", str(runs["segmentation"]), str(tmp_path / "x.npy")]) == 2
    assert "--out FILE.npy" in capsys.readouterr().err
    assert main(["predict", str(runs["segmentation"]), str(tmp_path / "x.npy"), "--out", str(tmp_path / "y.npy")]) == 0
    assert np.load(tmp_path / "y.npy").shape == (5, 20, 20)


def test_eval_gives_the_figures_of_the_run(runs, capsys):
    for task, metric in (("regression", "rmse"), ("segmentation", "miou")):
        assert main(["eval", str(runs[task]), "--batch-size", "17"]) == 0
        shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
        assert float(shown[f"head/{metric}"]) == pytest.approx(result(runs[task])[f"test_{metric}"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("report", [False, True])
def test_a_comparison_is_in_the_metric_of_the_task(tmp_path, capsys, report):
    words = ["compare", "--task", "regression", "--data", "diabetes", "--rule", "local_ce", "backprop"]
    words += ["--seeds", "1", "--epochs", "1", "--model.width", "8", "--jobs", "1", "--out", str(tmp_path / "c")]
    assert main([*words, "--report" if report else "--no-report"]) == 0
    out = capsys.readouterr().out
    assert "test RMSE" in out and "less is better" in out
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert summary["metric"] == "rmse"
    means = {rule: found["test_rmse"]["mean"] for rule, found in summary["rules"].items()}
    difference = summary["rules"]["local_ce"]["difference_to_backprop"]["mean"]
    assert difference == pytest.approx(means["local_ce"] - means["backprop"])
    if report:
        page = (tmp_path / "c/report.html").read_text()
        assert "RMSE" in page and "test accuracy" not in page.lower()


def test_the_better_trial_has_the_smaller_error():
    trials = [{"val_rmse": 60.0, "val_loss": 0.1}, {"val_rmse": 50.0, "val_loss": 0.2}]
    assert choose(trials, metric_of("regression")) == 1
    assert columns()[2] == "test accuracy, %" and columns(metric_of("regression"))[2] == "test RMSE"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--loss", "huber"), "loss is about regression"),
        (("--task", "regression", "--data", "diabetes", "--label-smoothing", "0.1"), "label_smoothing is about"),
        ((*SCENES, "--task", "segmentation", "--model", "fcn", "--augment", "flip"), "not their masks"),
        ((*SCENES, "--task", "segmentation"), "needs maps.*fcn"),
        (("--task", "regression"), "use --task classification"),
        (("--task", "regression", "--data", "diabetes", "--rule", "forward_forward"), "cannot do regression"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path, capsys, words, match):
    assert main(["train", "--out", str(tmp_path / "x"), *words]) == 2
    assert re.search(match, capsys.readouterr().err) and not (tmp_path / "x").exists()


def test_measurements_of_classes_refuse_other_tasks(runs):
    with pytest.raises(LayerwiseError, match="task is regression"):
        beliefs.beliefs_of_run(runs["regression"])
    with pytest.raises(LayerwiseError, match="task is multilabel"):
        diagnostics.diagnose(runs["multilabel"])
