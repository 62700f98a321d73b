"""Label noise: how much, of which kind, where, and that it depends on the data alone."""

import json
from pathlib import Path

import pytest
import torch
from support.runs import result, train, weights

from layerwise import LayerwiseError, data
from layerwise.cli.main import main
from layerwise.data import noisy_labels
from layerwise.runs.folders import check_unchanged
from layerwise.runs.options import TrainOptions, to_mapping

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LABELS = torch.arange(10).repeat_interleave(100)
PARTNER = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.333, 0.9])
def test_symmetric_noise_is_exactly_the_share_that_was_asked_for(rate):
    noisy = noisy_labels(LABELS, CIFAR, rate)
    assert int((noisy != LABELS).sum()) == round(1000 * rate)
    assert noisy.dtype == torch.int64
    assert set(noisy.tolist()) <= set(range(10))


def test_symmetric_noise_has_no_favourite():
    """Chi-squared of the 90 pairs of true and wrong class: 90 degrees of freedom, so 90 within a few deviations."""
    labels = torch.arange(10).repeat(10_000)
    noisy = noisy_labels(labels, CIFAR, 0.45)
    wrong = noisy != labels
    counts = torch.bincount(10 * labels[wrong] + noisy[wrong], minlength=100).view(10, 10).double()
    assert counts.diagonal().sum() == 0
    expected = 45_000 / 90
    chi = ((counts - expected) ** 2 / expected).sum() - 10 * expected  # the diagonal is empty
    assert abs(float(chi) - 90) < 6 * (2 * 90) ** 0.5


def test_a_lower_rate_is_part_of_a_higher_one():
    low, high = (noisy_labels(LABELS, CIFAR, rate) for rate in (0.2, 0.4))
    changed = low != LABELS
    assert torch.equal(low[changed], high[changed])


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_pairs_confuse_each_class_with_its_partner_only(rate):
    noisy = noisy_labels(LABELS, CIFAR, rate, "pairs")
    for label in range(10):
        found = torch.bincount(noisy[label == LABELS], minlength=10).tolist()
        moved = round(100 * rate) if label in PARTNER else 0
        expected = [0] * 10
        expected[label] = 100 - moved
        if moved:
            expected[PARTNER[label]] = moved
        assert found == expected


def test_the_labels_that_were_given_are_not_changed():
    labels = LABELS.clone()
    noisy_labels(labels, CIFAR, 0.5)
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CIFAR, 1.0), "not in"),
        ((CIFAR, -0.1), "not in"),
        ((CIFAR, float("nan")), "not in"),
        ((CIFAR, 0.2, "random"), "unknown label noise"),
        ((tuple("abcdefghij"), 0.2, "pairs"), "defined for the classes of cifar10"),
    ],
)
def test_wrong_noise_is_refused(arguments, words):
    with pytest.raises(LayerwiseError, match=words):
        noisy_labels(LABELS, *arguments)


def test_noise_is_a_property_of_the_sample_not_of_the_split():
    """The same samples in every split as without noise, whose labels do not depend on where they land; clean tests."""
    clean, noisy, clean_val = (
        data.load("digits", label_noise=rate, clean_validation=kept)
        for rate, kept in ((0.0, False), (0.4, False), (0.4, True))
    )
    whole = data.load("digits", label_noise=0.4, val_fraction=0)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(clean, part).images, getattr(noisy, part).images)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert torch.equal(clean.val.labels, clean_val.val.labels)
    assert torch.equal(noisy.train.labels, clean_val.train.labels)
    changed = [int((getattr(clean, part).labels != getattr(noisy, part).labels).sum()) for part in ("train", "val")]
    total = len(clean.train) + len(clean.val)
    assert sum(changed) == round(0.4 * total)
    assert min(changed) > 0
    few = data.load("digits", label_noise=0.4, train_samples=300).train
    given = {
        image.numpy().tobytes(): int(label) for image, label in zip(*noisy.train.batch(torch.arange(1294)), strict=True)
    }
    assert [given[image.numpy().tobytes()] for image in few.images] == few.labels.tolist()
    assert sorted(whole.train.labels.tolist()) == sorted([*noisy.train.labels.tolist(), *noisy.val.labels.tolist()])


@pytest.mark.slow
def test_a_run_records_its_noise_and_repeats_it_when_resumed(tmp_path):
    words = ["--label-noise", "0.4", "--clean-validation", "--save-every", "2"]
    straight = train(tmp_path / "a", "--steps", "4", *words)
    assert (result(straight)["label_noise"], result(straight)["label_noise_kind"]) == (0.4, "symmetric")
    config = json.loads((straight / "config.json").read_text())
    assert (config["label_noise"], config["clean_validation"]) == (0.4, True)

    (straight / "result.json").unlink()
    before = weights(straight)
    for checkpoint in sorted((straight / "checkpoints").iterdir())[1:]:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    assert main(["train", "--resume", str(straight)]) == 0
    assert all(torch.equal(before[name], after) for name, after in weights(straight).items())
    other = train(tmp_path / "b", "--steps", "4", "--save-every", "2")
    assert not all(torch.equal(before[name], after) for name, after in weights(other).items())
    assert result(other)["label_noise_kind"] is None


def test_a_checkpoint_from_before_an_option_had_its_default():
    """A run of an older version, whose record lacks the options of label noise, goes on."""
    older = json.loads(json.dumps(to_mapping(TrainOptions())))
    for name in ("label_noise", "label_noise_kind", "clean_validation"):
        del older[name]
    check_unchanged(TrainOptions(), older, Path("run"))
    with pytest.raises(LayerwiseError, match=r"label_noise = 0\.2"):
        check_unchanged(TrainOptions(label_noise=0.2), older, Path("run"))
