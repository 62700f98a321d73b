"""A batch that a group runs in parts: the update of the whole batch, with the memory of one part."""

import pytest
import torch
from support.nets import batches, made, net, problem
from torch import nn

from layerwise import LayerwiseError, Learner, rule_names
from layerwise.core.parts import JoinedParts, parts_of
from layerwise.core.tasks import LanguageModel
from layerwise.measure.bench_memory import memory_of
from layerwise.rules import get

RUNNING = ("dgl", "periodic_guidance", "synthetic_gradient")
"""Their modules have running statistics, which a part of the batch moves by itself."""
IN_PARTS = [name for name in rule_names() if not (get(name).whole_batch or get(name).models or name in RUNNING)]


def trained(model, rule, data, **options):
    learner = Learner(model, rule, optimizer="sgd", lr=0.5, weight_decay=0, **options)
    metrics = [learner.step(x, y).read() for x, y in data]
    return learner, metrics


@pytest.mark.parametrize("rule", IN_PARTS)
def test_the_update_is_that_of_the_whole_batch(rule):
    """Three parts of 16 samples are of 6, 5 and 5: each weighs as much as it has samples."""
    data = batches(2)
    found = []
    for micro in (1, 3):
        torch.manual_seed(1)
        learner, metrics = trained(net("mlp"), made(rule), data, micro=micro)
        found.append((list(learner.network.parameters()), metrics))
    for whole, parts in zip(found[0][0], found[1][0], strict=True):
        assert torch.allclose(whole, parts, atol=2e-5)
    for whole, parts in zip(found[0][1], found[1][1], strict=True):
        assert parts == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_parts_weigh_as_many_labels_as_count_in_them():
    """The first part has one label that counts, the second four, the third none at all."""
    x = torch.randint(9, (3, 5))
    y = x.clone()
    y[0, 2:] = y[2] = -100
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 9))
    found = []
    for micro in (1, 3):
        copy = nn.Sequential(*[type(m)(*a) for m, a in zip(model, [(9, 8), (8, 8), (), (8, 9)], strict=True)])
        copy.load_state_dict(model.state_dict())
        learner, metrics = trained(copy, "local_ce", [(x, y)], micro=micro, task=LanguageModel())
        found.append((list(learner.network.parameters()), metrics[0]))
    for whole, parts in zip(found[0][0], found[1][0], strict=True):
        assert torch.allclose(whole, parts, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_accumulated_batches_in_parts():
    data, found = batches(4), []
    for micro in (1, 4):
        torch.manual_seed(1)
        learner, _ = trained(net("mlp"), "sll", data, micro=micro, accumulate=2, clip=0.5)
        assert learner.updates == 2
        found.append(list(learner.network.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_a_part_has_draws_of_its_own():
    """A draw depends on (seed, step, block, part): halves of equal samples do not drop the same units."""
    seen = []
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    learner = Learner(model, "local_ce", micro=2, cuts=["2"])
    seen.clear()
    learner.step(torch.ones(64, 8), torch.zeros(64, dtype=torch.long))
    first, second = [out for out in seen if len(out) == 32]
    assert not torch.equal(first, second)


def test_memory_is_that_of_a_part():
    """Wide blocks between narrow boundaries: a quarter of the batch at a time needs about a quarter of the memory."""
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 8))]
    peaks = {}
    for depth in (3, 12):  # with 3, one has a block on either side
        for micro in (1, 8):
            model = nn.Sequential(*layers[: 3 * depth], nn.Linear(8, 4))
            cuts = [str(3 * i + 2) for i in range(depth)]
            learner = Learner(model, "local_ce", micro=micro, cuts=cuts)
            x, y = torch.randn(512, 8), torch.randint(4, (512,))
            learner.step(x, y)
            use = learner.measured_step(x, y)[1]
            peaks[depth, micro] = use.activations
    assert peaks[3, 8] < 0.25 * peaks[3, 1]
    # Bytes that a block leaves: its loss, and its number of hits, or its accuracy, the mean over the parts.
    assert peaks[12, 1] - peaks[3, 1] == (12 - 3) * (4 + 8)
    assert peaks[12, 8] - peaks[3, 8] == (12 - 3) * (4 + 4)


@pytest.mark.filterwarnings("ignore:running statistics")
def test_the_output_of_a_part_is_not_held_beside_its_backward_pass():
    """A convolution, its norm, two gradients of a part at most, and the pooled output of all parts once; no more."""
    row = memory_of("sll", "vgg", 2, shape=(3, 32, 32), batch_size=16, micro=4, width=8)
    part, whole, passed_on = 4 * 4 * 8 * 32 * 32 * 4, 16 * 8 * 16 * 16 * 4, 4 * 8 * 16 * 16 * 4
    assert part + whole - passed_on <= row["activations"] < part + whole - passed_on // 2


def test_nothing_is_stepped_where_a_part_is_not_finite():
    x, y = problem(16)
    x[-1] = torch.nan  # in the last part only
    model = net("vgg")
    with pytest.warns(UserWarning, match="statistics"):
        learner = Learner(model, "local_ce", micro=4, nonfinite="skip", example=x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    metrics = learner.step(x, y)
    assert learner.skipped == 1
    assert len(metrics.skipped) == len(learner.groups)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("rule", [name for name in rule_names() if get(name).whole_batch])
def test_a_rule_that_needs_the_whole_batch_says_why(rule):
    model, (x, _) = net((get(rule).models or ("mlp",))[0]), batches(1)[0]
    with pytest.raises(LayerwiseError, match=f"{rule!r} {get(rule).whole_batch}, so that it cannot be run in parts"):
        Learner(model, made(rule), micro=2, example=x)


def test_a_batch_that_does_not_come_first_is_refused():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity())

    class Last(nn.Module):
        def forward(self, found):
            return found[0]

    model = nn.Sequential(nn.LSTM(4, 4), Last(), nn.Linear(4, 3))
    with pytest.raises(LayerwiseError, match="batch"):
        Learner(model, "local_ce", micro=2, layout="LBC", cuts=["1"]).step(
            torch.randn(5, 6, 4), torch.randint(3, (5, 6))
        )


def test_a_message_without_an_entry_per_sample_is_refused():
    whole, (first, _) = JoinedParts("b"), parts_of(4, 2)
    with pytest.raises(LayerwiseError, match=r"block 'b' passes on a tensor of shape \(\) for 2 samples"):
        whole.add(first, (torch.zeros(2, 3), {"temperature": torch.tensor(1.0)}))
