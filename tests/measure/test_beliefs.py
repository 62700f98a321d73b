"""The measurements of SID's theory: against sums by hand, and through the command line."""

import json
import math

import pytest
import torch
from support.nets import CLASSES, batches, net, trained
from support.runs import result, split, train

from layerwise import LayerwiseError, Learner, create_rule, data
from layerwise.cli.main import main
from layerwise.measure.beliefs import Cascade, beliefs_of_run, draw, early_exit, measure, minimiser, quantities

CASCADE = split("--rule sid_cascade --model sid_cascade --model.depth 3 --model.width 8 --batch-size 128 --threads 1")


def source(samples=24):
    images = torch.randint(0, 256, (samples, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data.InMemorySource(images, torch.arange(samples) % CLASSES)


def some(batch_size=24):
    how = {"seed": 0, "mean": (0.5,), "std": (0.3,), "shuffle": False, "drop_last": False}
    return data.Batches(source(), batch_size, **how)


def learner(direction="forward", **options):
    rule = create_rule("sid_cascade", direction=direction, **options)
    smoothing = 0.1 if direction == "reverse" else 0.0
    return trained(net("sid_cascade"), rule, batches(3), lr=0.03, label_smoothing=smoothing)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_measurements_are_their_definitions(direction):
    trained_ = learner(direction, alpha=(0.8, 0.4))
    modules = measure(trained_, some())["modules"]
    x, y = next(some().epoch(0))
    p = torch.stack(trained_.beliefs(x)).double().exp()
    target = trained_.task.distribution(y).double()

    def kl(a, b):
        return (torch.where(a > 0, a * a.log(), 0.0) - torch.where(a > 0, a * b.log(), 0.0)).sum(-1)

    label = [kl(target, q) if direction == "forward" else kl(q, target) for q in p]
    bound = label[0]
    assert len(modules) == 4
    assert modules[0]["entropy"] == pytest.approx(math.log(CLASSES), rel=1e-5)
    for i, (row, alpha) in enumerate(zip(modules[1:], (0.8, 0.6, 0.4), strict=True), 1):
        change = kl(p[i - 1], p[i]) if direction == "forward" else kl(p[i], p[i - 1])
        bound = bound - (1 - alpha) / alpha * change
        loss = alpha * label[i] + (1 - alpha) * change
        assert row["alpha"] == pytest.approx(alpha)
        assert row["label_kl"] == pytest.approx(float(label[i].mean()), rel=1e-4)
        assert row["consistency"] == pytest.approx(float(change.mean()), rel=1e-3, abs=1e-6)
        assert row["loss"] == pytest.approx(float(loss.mean()), rel=1e-4)
        assert row["bound"] == pytest.approx(float(bound.mean()), rel=1e-4)
        assert row["accuracy"] == pytest.approx(float((p[i].argmax(-1) == y).double().mean()))
        assert row["entropy"] == pytest.approx(float(-(p[i] * p[i].log()).sum(-1).mean()), rel=1e-4)
        assert row["excess"] >= 0
        # The descent of the objective and the inequality of the divergences are one and the same.
        held = label[i] <= label[i - 1] - (1 - alpha) / alpha * change
        assert row["descent"] == pytest.approx(float(held.double().mean()))
        assert row["within_bound"] == pytest.approx(float((label[i] <= bound).double().mean()))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_exact_modules_descend_for_every_sample_and_keep_the_bound(direction):
    trained_, weights = learner(direction), [0.9, 0.5, 0.2, 0.6]
    y = torch.arange(12) % CLASSES
    target = trained_.task.distribution(y).double()
    path = [torch.full((12, CLASSES), 1 / CLASSES, dtype=torch.float64).log()]
    for alpha in weights:
        path.append(minimiser(path[-1], target, alpha, direction))
    found = quantities(torch.stack(path), y, trained_.task, weights, direction)
    assert found["descent"].all()
    assert found["within_bound"].all()
    assert torch.allclose(found["excess"], torch.zeros(4, 12, dtype=torch.float64), atol=1e-12)
    # In the other order the last belief is the first: it climbs, and the inequality fails for all.
    found = quantities(torch.stack(path[::-1]), y, trained_.task, weights, direction)
    assert not found["descent"].any()
    assert not found["within_bound"].any()


def test_the_batch_size_does_not_matter():
    trained_ = learner()
    a, b = (measure(trained_, some(size), (0.3,)) for size in (24, 7))
    for row, other in zip([*a["modules"], *a["early_exit"]], [*b["modules"], *b["early_exit"]], strict=True):
        assert row == pytest.approx(other, abs=1e-6)


def test_the_rules_own_scalars_say_the_same():
    trained_ = learner()
    x, y = next(some().epoch(0))
    found = trained_.evaluate(x, y).read()
    for name, row in zip(("module1", "module2", "head"), measure(trained_, some())["modules"][1:], strict=True):
        for scalar in ("accuracy", "label_kl", "consistency", "entropy", "descent"):
            assert found[f"{name}/{scalar}"] == pytest.approx(row[scalar], rel=1e-4, abs=1e-6)


def test_stopping_early_is_the_first_module_that_is_sure():
    generator = torch.Generator().manual_seed(0)
    beliefs = torch.randn(6, 50, CLASSES, generator=generator).mul(2).log_softmax(-1)
    for threshold in (0.3, 0.7, 0.95, 1.0):
        chosen, used = early_exit(beliefs, threshold)
        for sample in range(50):
            sure = [i for i in range(1, 6) if float(beliefs[i, sample].max().exp()) >= threshold]
            module = sure[0] if sure else 5
            assert (int(used[sample]), int(chosen[sample])) == (module, int(beliefs[module, sample].argmax()))


def test_thresholds_from_the_first_module_to_the_last():
    trained_ = learner()
    found = measure(trained_, some(), (1e-9, 1.0))
    first, last = found["early_exit"]
    assert (first["modules_used"], last["modules_used"]) == (1.0, 3.0)
    assert first["accuracy"] == pytest.approx(found["modules"][1]["accuracy"])
    assert last["accuracy"] == pytest.approx(found["modules"][-1]["accuracy"])
    with pytest.raises(LayerwiseError, match="not a probability"):
        measure(trained_, some(), (0.0,))


def test_a_learner_stops_where_every_sample_is_sure():
    trained_, (x, _) = learner(), batches(1)[0]
    assert len(trained_.beliefs(x)) == 4
    assert len(trained_.beliefs(x, threshold=1e-9)) == 1  # the uniform belief is enough
    assert len(trained_.beliefs(x, threshold=0.9999999)) == 4


def test_a_rule_without_beliefs_has_nothing_to_measure():
    with pytest.raises(LayerwiseError, match="refines no belief"):
        measure(Learner(net("mlp"), "sll", example=batches(1)[0][0]), some())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("beliefs") / "run", *CASCADE, "--steps", "12", "--lr", "0.01")


@pytest.mark.slow
def test_the_command_writes_what_it_prints(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["--thresholds", "0.2", "0.9", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]
    assert main(["beliefs", str(run), *words]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["modules"][-1]["accuracy"] == pytest.approx(result(run)["test_accuracy"])
    assert f"{found['modules'][-1]['label_kl']:.4f}" in out
    assert found["loss"] == pytest.approx(sum(row["loss"] for row in found["modules"][1:]))
    assert found["first_loss"] == pytest.approx(1.5 * math.log(10))
    assert found["fixed_point_loss"] == pytest.approx(Cascade(10, 3).fixed_point_loss())
    assert [row["threshold"] for row in found["early_exit"]] == [0.2, 0.9]
    last = found["history"][-1]
    assert last["step"] == 12
    assert len(last["modules"]) == 3
    assert {"label_kl", "consistency", "descent", "entropy", "accuracy"} <= last["modules"][0].keys()
    assert (tmp_path / "b.svg").read_text().lstrip().startswith("<?xml")


def test_the_stack_is_measured_too(tmp_path):
    folder = train(tmp_path / "run", "--rule", "sid", "--steps", "3")
    found, notes = beliefs_of_run(folder)
    assert notes == []
    assert (found["rule"], len(found["modules"])) == ("sid", 3)
    assert found["modules"][-1]["accuracy"] == pytest.approx(result(folder)["test_accuracy"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--thresholds", "1.5"], "not a probability"),
        (["--plot", "beliefs.txt"], "must end in .svg"),
        (["--split", "val"], ""),
    ],
)
def test_wrong_requests_are_one_sentence(run, words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["beliefs", str(run), *words])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == ((2, 1) if sentence else (0, 0))
    assert sentence in error
    assert not list(tmp_path.iterdir())


def test_another_rules_run_is_refused(tmp_path, capsys):
    folder = train(tmp_path / "run", "--steps", "1")
    assert main(["beliefs", str(folder)]) == 2
    assert "give a run of sid or sid_cascade" in capsys.readouterr().err


def test_a_picture_needs_a_known_ending(tmp_path):
    with pytest.raises(LayerwiseError, match="must end in"):
        draw([], tmp_path / "beliefs.doc")
