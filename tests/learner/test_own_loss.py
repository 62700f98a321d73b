"""A model that computes a loss itself is asked for it once, and a difference to the task's loss is said."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerwise import Classification, LanguageModel, Learner

TOKENS = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(0))
BATCH = {"tokens": TOKENS, "labels": TOKENS.masked_fill(TOKENS == 3, -100)}


class Network(nn.Module):
    """A language model with a loss of its own: of the next token, or of the token itself, and a further term."""

    def __init__(self, shift=True, further=0.0, fails=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout()) for _ in range(2))
        self.shift, self.further, self.fails, self.calls = shift, further, fails, 0

    def forward(self, tokens, labels=None):
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h)
        logits = self.head(h)
        if labels is None:
            return {"logits": logits}
        self.calls += 1
        if self.fails:
            raise KeyError("labels")
        kept = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        loss = F.cross_entropy(kept[0].flatten(0, 1), kept[1].flatten())
        return {"logits": logits, "loss": loss + self.further}


def said(model, task, batch=BATCH):
    """Warnings of three steps."""
    learner = Learner(model, "local_ce", cuts="layers.*", task=task)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            learner.step(batch)
    return [str(w.message) for w in found]


def test_a_task_that_is_the_models_own_loss_is_silent():
    model = Network()
    assert said(model, LanguageModel()) == []
    assert model.calls == 1
    assert model.training
    assert said(Network(shift=False), LanguageModel(shift=False)) == []
    assert said(Network(fails=True), LanguageModel()) == []


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (lambda: Network(shift=False), LanguageModel()),
        (Network, LanguageModel(shift=False)),
        (lambda: Network(further=0.01), LanguageModel()),
    ],
)
def test_another_shift_and_further_terms_are_said_once(model, task):
    (found,) = said(model(), task)
    assert "Network computes itself is" in found
    assert "LanguageModel(shift=False)" in found


def test_a_task_that_differs_on_purpose_is_silent():
    assert said(Network(), LanguageModel(label_smoothing=0.1)) == []
    assert said(Network(), LanguageModel(weights=(1.0,) * 8 + (2.0,))) == []


def test_labels_that_are_given_apart_may_mean_something_else():
    learner = Learner(Network(), "local_ce", cuts="layers.*", task=LanguageModel(shift=False))
    learner.step({"tokens": TOKENS}, TOKENS.roll(-1, 1))  # warnings are errors here


def test_labels_that_are_given_apart_show_further_terms_still():
    """What a model adds to its loss is the same for other labels; a shift of the labels is not."""
    learner = Learner(Network(further=0.25), "local_ce", cuts="layers.*", task=LanguageModel())
    with pytest.warns(UserWarning, match=r"0\.25 more than that of the task, .* adds further terms"):
        learner.step({"tokens": TOKENS}, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.step({"tokens": TOKENS}, TOKENS)


def test_the_comparison_changes_no_bit():
    def trained(model):
        learner = Learner(model, "local_ce", cuts="layers.*", task=LanguageModel())
        learner.step(BATCH)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = Network()
    plain.forward = lambda tokens, inner=plain.forward: inner(tokens)  # takes no labels
    assert torch.equal(trained(Network()), trained(plain))


def test_labels_per_sample_are_compared_too():
    class Pooled(Network):
        def forward(self, tokens, labels=None):
            logits = super().forward(tokens)["logits"].mean(1)
            loss = None if labels is None else F.cross_entropy(logits, labels) * 2
            return {"logits": logits, "loss": loss}

    batch = {"tokens": TOKENS, "labels": torch.tensor([0, 1, 2, 3])}
    assert len(said(Pooled(), Classification(), batch)) == 1
