"""The intervals of a comparison: their coverage, when there is none, and that they are reproducible."""

import itertools
import math
import statistics

import numpy as np
import pytest

from layerwise.compare import tuning
from layerwise.report import summary


def paired(own, base):
    """The difference of two rules whose runs are given by their correct test samples, seed by seed."""
    own, base = ({seed: np.asarray(row, dtype=bool) for seed, row in enumerate(rows)} for rows in (own, base))
    means = ({seed: float(row.mean()) for seed, row in rows.items()} for rows in (own, base))
    return summary.paired_difference(*means, own, base)


@pytest.mark.parametrize(("n", "quantile"), [(3, 4.30265), (5, 2.77645), (30, 2.04523)])
def test_over_seeds_the_interval_has_students_quantile(n, quantile):
    """Tabulated t(0.975, n - 1). The test set is so large that its share of the width is below one per mille."""
    size = 400_000
    own = [np.arange(size) < size // 2 + 2000 * seed for seed in range(n)]
    found = paired(own, [np.arange(size) < size // 2] * n)
    half = quantile * statistics.stdev(2000 * seed / size for seed in range(n)) / math.sqrt(n)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.05)
    assert found["high"] - found["mean"] >= half
    assert found["samples"] == size


def test_over_samples_the_interval_is_that_of_a_proportion():
    """Equal seeds: what is left is the test set. Its standard error is sqrt((b + c) / N^2 - ...), Bonett and Price."""
    size, more, less = 2000, 120, 60
    own, base = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    own[:more], base[more : more + less] = True, True
    found = paired([own] * 3, [base] * 3)
    p, q, n = (more + 1) / (size + 2), (less + 1) / (size + 2), size + 2
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / n)
    assert found["mean"] == pytest.approx((more - less) / size)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.05)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.05)


def test_no_interval_has_width_zero():
    """One sample apart with every seed, or no sample apart: neither is certain of the next test set."""
    base = np.arange(360) < 300
    for own in (np.arange(360) < 301, base):
        found = paired([own] * 3, [base] * 3)
        assert found["low"] < found["mean"] < found["high"]
        # The rule of three: with no difference among N, up to 3 / N is compatible with the data (95 %).
        assert 1 / 360 < found["high"] - found["mean"] < 6 / 360


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_have_no_interval(n):
    found = paired([np.arange(10) < 6] * n, [np.arange(10) < 5] * n)
    assert (found["low"], found["high"], found["n"], found["samples"]) == (None, None, n, 10)
    assert summary.difference_in_words(found) == "+10.00"


def test_without_the_samples_there_is_no_interval():
    accuracies = {seed: 0.5 + seed / 10 for seed in range(4)}
    base = dict.fromkeys(range(4), 0.5)
    samples = {seed: np.ones(8, dtype=bool) for seed in range(4)}
    assert summary.paired_difference(accuracies, base)["low"] is None
    assert summary.paired_difference(accuracies, base, samples, {0: samples[0]})["low"] is None
    other = samples | {3: np.ones(9, dtype=bool)}
    assert summary.paired_difference(accuracies, base, samples, other)["samples"] is None


def test_the_interval_covers_what_it_says(monkeypatch):
    """Simulated: seeds and test samples drawn anew. At least 95 % of the intervals hold the true difference, 0."""
    draw, held = np.random.default_rng(5), 0
    trials = 200
    monkeypatch.setattr(summary, "DRAWS", 500)
    for _ in range(trials):
        hard = draw.uniform(0.2, 1.0, size=300)  # chance of a sample to be classified correctly, the same for both
        runs = [np.clip(hard + draw.normal(0, 0.02), 0, 1) > draw.uniform(size=300) for _ in range(10)]
        found = paired(runs[:5], runs[5:])
        held += found["low"] <= 0 <= found["high"]
    assert held >= 0.95 * trials - 3 * math.sqrt(trials * 0.95 * 0.05)


def test_resampling_is_that_of_the_samples_one_by_one():
    """Against a bootstrap that draws indices, on samples with values between -1 and 1."""
    outcomes = np.array([1, 1 / 3, 0, 0, 0, -1 / 3] * 40, dtype=float)
    added = np.append(outcomes, (-1.0, 1.0))
    draw = np.random.default_rng(1)
    means = [added[draw.integers(len(added), size=len(added))].mean() for _ in range(4000)]
    low, high = np.quantile(means, (0.025, 0.975))
    below, above = summary.resampled_distances(outcomes)
    assert below == pytest.approx(added.mean() - low, rel=0.1)
    assert above == pytest.approx(high - added.mean(), rel=0.1)
    assert (below, above) == summary.resampled_distances(outcomes[::-1])  # seeded, whatever the order


def test_the_table_says_what_a_sample_is_worth():
    words = summary.resolution_in_words({"a": {"test_samples": 10_000}, "b": {"test_samples": None}})
    assert "10,000 samples" in words and "0.01 points" in words
    assert summary.resolution_in_words({"a": {}}) is None


def test_common_seeds_only():
    own, base = {0: 1.0, 1: 5.0, 3: 9.0}, {0: 0.5, 3: 0.5, 4: 7.0}
    assert [summary.paired_difference(own, base)[name] for name in ("mean", "n")] == [4.5, 2]
    assert summary.paired_difference({0: 1.0}, {1: 1.0}) is None
    assert all(
        summary.paired_difference(own, base)[name] is None for name in itertools.chain(("low", "high", "samples"))
    )


def test_a_figure_that_overflows_has_a_mean_and_no_deviation():
    """The loss of a diverging run may be infinite at its last step."""
    assert summary.spread([math.inf, 1.0]) == {"mean": math.inf, "sd": None, "n": 2}
    found = summary.spread([math.inf, -math.inf, 1.0])
    assert math.isnan(found["mean"])
    assert summary.paired_difference({s: math.inf for s in range(3)}, {s: 1.0 for s in range(3)})["low"] is None


def test_a_trial_whose_figure_is_no_number_is_the_last_choice():
    good, bad = ({"val_accuracy": a, "val_loss": b} for a, b in ((0.5, 9.0), (math.nan, math.nan)))
    assert tuning.choose([bad, good]) == 1
    assert tuning.choose([{**good, "val_loss": math.nan}, good]) == 1
