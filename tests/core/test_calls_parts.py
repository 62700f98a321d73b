"""A batch in parts through a model that is cut at its calls: the model's own forward pass runs for each part."""

import copy

import pytest
import torch
from support.coroutines import hooks, suspended
from support.nets import CLASSES, batches, net, same_bits
from support.own import Skips, Twists, decoder, text, vectors
from support.ranks import same_state
from support.stages import stages
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, cut_at_calls, rules
from layerwise.learner.state import joined

OPTIONS = {"cuts": "layers.*", "task": LanguageModel(shift=False), "lr": 0.01}
RULES = [
    rules.create("local_ce"),
    rules.create("sll"),
    rules.create("sid"),
    rules.create("backprop"),
    rules.create("backprop_checkpoint"),
    rules.create("sll", overlap=1),
    rules.create("interlocking"),
    rules.create("auglocal"),
]


def batch(seed, samples=6):
    found = text(samples=samples, seed=seed)
    return {**found, "labels": found["tokens"]}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}{getattr(rule, 'overlap', '')}")
def test_call_cuts_and_traced_cuts_give_the_same_bits_in_parts(rule):
    """Dropout included: draws depend on (seed, step, block, part). Rules that run blocks again are among them."""
    learners = []
    for calls in (False, True):
        model = net("mlp", dropout=0.2)
        learners.append(Learner(cut_at_calls(model, model.block_names) if calls else model, rule, lr=0.01, micro=3))
    for x, y in batches(2):
        seen = [learner.step(x, y).read() for learner in learners]
        assert seen[0] == seen[1]
    assert same_bits(learners[0].network, learners[1].network)
    assert hooks(learners[1].network.model) == 0
    assert all("forward" not in vars(module) for module in learners[1].network.model.modules())
    assert not suspended()


@pytest.mark.parametrize("options", [{}, {"offload": "disk"}, {"accumulate": 2}, {"precision": "bf16"}])
def test_the_update_of_an_unmodified_model_is_that_of_the_whole_batch(options):
    """Masks, keywords, a tied embedding; parts of 2, 2 and 1 samples, one of them padded."""
    found = []
    for micro in (1, 3):
        given = OPTIONS | {"optimizer": torch.optim.SGD, "lr": 0.5} | options
        learner = Learner(decoder(depth=3), "sll", micro=micro, **given)
        metrics = [learner.step(batch(seed, 5)).read() for seed in range(2)]
        found.append((learner.state_dict()["model"], metrics))
    loose = 1e-2 if "precision" in options else 2e-5
    assert all(torch.allclose(a, found[1][0][name], atol=loose) for name, a in found[0][0].items())
    assert found[1][1][0] == pytest.approx(found[0][1][0], rel=2e-2 if "precision" in options else 1e-4)


def test_a_skip_past_the_cuts_is_the_parts_own():
    """What crosses the cuts beside the teaching tensor stays in the pass of its part, without its gradient."""
    x, y = torch.randn(6, 8), torch.arange(6) % 4
    torch.manual_seed(2)
    model = Skips()
    found = []
    for micro in (1, 2):
        learner = Learner(copy.deepcopy(model), "local_ce", cuts=["down.*", "up.*"], micro=micro, lr=0.05)
        for _ in range(3):
            learner.step(x, y)
        found.append(learner.network)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(n.parameters() for n in found), strict=True))


def test_memory_is_that_of_a_part():
    use = []
    for micro in (1, 8):
        learner = Learner(decoder(depth=4), "local_ce", micro=micro, **OPTIONS)
        learner.step(batch(0, 32))
        use.append(learner.measured_step(batch(1, 32))[1].activations)
    # What is left beside a part: the tensors at the ends of a block, and the maps of attention that the model returns.
    ends, maps = 3 * (32 * 10 * 16 * 4), 4 * (32 * 10 * 10 * 4)
    assert use[1] - ends - maps < 0.25 * use[0]


def test_stages_have_the_bits_of_one_process_in_parts():
    model = decoder(depth=5, dropout=0.2, tie=False)
    one = Learner(copy.deepcopy(model), "local_ce", micro=2, **OPTIONS)
    learners = stages(model, "local_ce", 3, batch(0), micro=2, **OPTIONS)
    for seed in range(2):
        metrics = [learner.step(batch(seed, 5)).blocks for learner in learners]
        assert same_state({k: v for found in metrics for k, v in found.items()}, one.step(batch(seed, 5)).blocks)
    assert same_state(joined([learner.state_dict() for learner in learners]), one.state_dict())


class Remembers(Twists):
    """Leaves a tensor in itself that a later layer looks for."""

    def _run(self, x):
        self.mean = x.mean(1, keepdim=True)
        x = self.layers[0](x).relu()
        return self.head(self.layers[2](self.layers[1](x).relu() + self.mean))


def test_passes_that_would_overwrite_each_others_tensors_are_refused():
    x, y = vectors()
    with pytest.raises(LayerwiseError, match="leaves tensors in mean, where the passes of several parts"):
        Learner(Remembers(), "local_ce", cuts="layers.*", micro=2, example=x)
    torch.manual_seed(0)
    model, found = Remembers(), []
    for micro in (1, 2):  # one group: one pass after the other
        learner = Learner(copy.deepcopy(model), "backprop", cuts="layers.*", micro=micro, lr=0.1)
        learner.step(x, y)
        found.append(learner.network)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(n.parameters() for n in found), strict=True))


def test_an_error_in_one_part_gives_all_passes_up():
    class Own(Exception):
        pass

    def inside(i):
        calls.append(i)
        if armed and calls.count(1) == 2:  # the second part, while the first waits behind the next cut
            raise Own

    armed, calls = [], []
    model = Twists(torch.enable_grad, inside)
    x, y = vectors()
    learner = Learner(model, "local_ce", cuts="layers.*", micro=2, example=x)
    learner.step(x, y)
    calls.clear()
    armed.append(True)
    with pytest.raises(Own):
        learner.step(x, y)
    assert hooks(model) == 0
    assert not suspended()
    armed.clear()
    learner.step(x, y)


def test_encoders_of_torch_may_be_fused_again_after_the_step():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(self.encoder(x)[:, 0])

    learner = Learner(Encoder(), "local_ce", cuts="auto", micro=4)
    learner.step(torch.randn(8, 5, 8), torch.arange(8) % CLASSES)
    assert torch.backends.mha.get_fastpath_enabled()
