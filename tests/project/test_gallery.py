"""The gallery of `benchmarks/`: its networks that do not need a library, in the order of its checks."""

import sys

import pytest
import torch
from support.pages import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gallery")]

import measure  # noqa: E402
from networks import ENTRIES  # noqa: E402

OWN = [name for name, network in ENTRIES.items() if network.library == "torch"]


@pytest.mark.parametrize("name", OWN)
def test_a_network_of_the_gallery_holds_what_the_gallery_says(name):
    about = ENTRIES[name]
    entry = measure.fresh(about, about.depths[0])
    learner = measure.learner_of(entry, "local_ce", entry.model, lr=3e-3)
    losses = [float(learner.step(*measure.given(entry.batch)).loss) for _ in range(6)]
    assert min(losses) < losses[0]
    assert measure.predicts_as_the_model(learner, entry)
    assert measure.is_local(learner, entry)
    assert measure.is_the_plain_loop(about)


def test_predictions_that_are_made_of_beliefs_are_compared_too():
    entry = measure.fresh(ENTRIES["autoencoder"], 4)
    learner = measure.learner_of(entry, "sid", entry.model)
    learner.step(*measure.given(entry.batch))
    assert measure.predicts_as_the_model(learner, entry)


def test_the_walk_finds_a_path_between_blocks(monkeypatch):
    """The gallery's own oracle fails where a block is not detached."""
    about = ENTRIES["autoencoder"]
    entry = measure.fresh(about, about.depths[0])
    learner = measure.learner_of(entry, "local_ce", entry.model)
    learner.step(*measure.given(entry.batch))
    assert measure.is_local(learner, entry)
    monkeypatch.setattr("layerwise.core.engine.detach", lambda tree: tree)
    with pytest.raises((AssertionError, RuntimeError)):
        assert measure.is_local(learner, entry)


def test_the_gallery_is_made_without_the_libraries(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["measure.py", "--only", "gpt2", "--rules", "local_ce", "--out", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "transformers", None)
    measure.main()
    assert "left out" in capsys.readouterr().out
    torch.set_num_threads(1)
