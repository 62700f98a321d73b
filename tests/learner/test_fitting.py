"""The fewest parts of a batch within a peak of memory."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.runs import SMALL, lines, result, split, train, weights
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule
from layerwise.cli.main import main
from layerwise.learner.fitting import fit_micro, use_of
from layerwise.memory.fitting import fewest_parts, held_by, read_size
from layerwise.memory.meter import MemoryUse
from layerwise.runs import training


@given(st.integers(1, 200), st.integers(0, 50), st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 4))
def test_the_search_finds_what_trying_all_divisors_finds(batch, gradients, activations, peak, least):
    def use(parts):
        return MemoryUse(0, 0, gradients=gradients, activations=-(-activations // parts), peak=0)

    counts = [n for n in range(least, max(batch, least) + 1) if n == least or batch % n == 0]
    enough = [n for n in counts if held_by(use(n)) <= peak]
    fit = fewest_parts(use, batch, peak, least)
    assert fit.reached == bool(enough)
    if enough:
        assert fit.micro == enough[0]
    elif gradients <= peak:  # it has tried everything, and tells the smallest
        assert fit.held == min(map(held_by, map(use, counts)))
    assert fit.held == held_by(use(fit.micro))
    assert len(fit.tried) <= 2 + 2 * len(counts).bit_length()


@pytest.mark.parametrize("rule", ["backprop", "sll"])
def test_parts_fit_and_one_less_does_not(rule):
    def make(micro):
        model = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 4))
        return Learner(model, rule, micro=micro)

    x, y = torch.randn(48, 32), torch.randint(4, (48,))
    whole = held_by(use_of(make(1), x, y))
    fit = fit_micro(make, x, y, whole - 1)
    assert fit.reached and fit.micro > 1
    assert held_by(use_of(make(fit.micro), x, y)) == fit.held < whole
    assert fit_micro(make, x, y, fit.held).micro == fit.micro
    assert fit_micro(make, x, y, fit.held - 1).micro != fit.micro


def test_a_rule_that_compares_samples_says_why_it_stays_as_it_is():
    def make(micro):
        return Learner(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), "predsim", micro=micro)

    fit = fit_micro(make, torch.randn(16, 8), torch.randint(3, (16,)), 10)
    assert (fit.micro, fit.reached) == (1, False)
    assert "cannot be run in parts" in fit.why


def test_the_largest_turn_of_a_rota_counts():
    """The first block keeps the longest graph, and its turn is the last of 4 under `order="down"`."""
    x, y = torch.randn(64, 16), torch.randint(3, (64,))

    def make(order):
        model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 3))
        return Learner(model, create_rule("block_rota", period=20, order=order))

    assert held_by(use_of(make("down"), x, y)) == held_by(use_of(make("up"), x, y))


@pytest.mark.parametrize("words", ["12 parsecs", "0MiB", "-5MiB", "MiB", "5", "nan MiB", "1e3MiB", "1" * 99 + "MiB"])
def test_a_peak_that_is_no_size(words, tmp_path, capsys):
    with pytest.raises(LayerwiseError, match="give a size larger than 0 with its unit"):
        read_size(words)
    assert main(["train", "--peak", words, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


WRONG = {
    "--rule backprop --peak 1KiB": "the smallest step of backprop holds",
    "--peak auto": "peak is auto, which is the lowest of several rules",
}


@pytest.mark.parametrize("words", list(WRONG))
def test_a_peak_that_cannot_be_reached_trains_nothing(words, tmp_path, capsys):
    assert main(["train", *SMALL, *split(words), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert WRONG[words] in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_within_a_peak_is_the_run_with_its_parts(tmp_path, monkeypatch):
    options = split("--steps 6 --save-every 3")
    whole = train(tmp_path / "whole", *options)
    held = sum(result(whole)["memory_mib"][name] for name in ("activations", "gradients"))
    run = train(tmp_path / "run", *options, "--peak", f"{0.7 * held:.4f}MiB")
    options_kept = json.loads((run / "config.json").read_text())
    assert options_kept["micro"] > 1
    assert sum(result(run)["memory_mib"][name] for name in ("activations", "gradients")) <= 0.7 * held
    assert f"--micro {options_kept['micro']}" in result(run)["notes"][-1]
    by_hand = train(tmp_path / "hand", *options, "--micro", str(options_kept["micro"]))
    assert lines(run) == lines(by_hand)
    # A run that is continued takes the number that was found, and does not search again.
    expected = lines(run), weights(run)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000000006")
    monkeypatch.setattr(training, "within_peak", None)
    assert main(["train", "--resume", str(run)]) == 0
    assert lines(run) == expected[0]
    assert all(torch.equal(value, expected[1][name]) for name, value in weights(run).items())
