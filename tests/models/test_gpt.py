"""The language model of the zoo against its equations, written out with complex numbers and loops."""

import math

import pytest
import torch
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, models
from layerwise.measure.bench_memory import memory_of
from layerwise.models.gpt import remembering


def gpt(vocabulary=11, window=8, **options):
    torch.manual_seed(0)
    options = {"depth": 2, "width": 12, "heads": 3, **options}
    model = models.create("gpt", (1, 1, window), vocabulary, **options)
    with torch.no_grad():  # larger than the first weights, so that every part shows
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def tokens(*shape, vocabulary=11):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def attended(unit, x):
    """Causal attention of one sample (T, W), position by position; a head's pairs are complex numbers."""
    length, width = x.shape
    size = width // unit.heads
    q, k, v = unit.qkv(normed(x, unit.norm)).split(width, -1)
    speed = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    out = torch.zeros(length, width)
    for head in range(unit.heads):
        own = slice(head * size, (head + 1) * size)
        turn = torch.polar(torch.ones(length, size // 2), torch.arange(length)[:, None] * speed)
        query, key = (torch.complex(*t[:, own].chunk(2, -1)) * turn for t in (q, k))
        for t in range(length):
            score = (query[t] * key[: t + 1].conj()).real.sum(-1) / math.sqrt(size)
            out[t, own] = score.softmax(0) @ v[: t + 1, own]
    return x + unit.project(out)


def expanded(unit, x, mlp):
    h = normed(x, unit.norm)
    if mlp == "gelu":
        return x + unit.project(nn.functional.gelu(unit.expand(h)))
    gate = unit.gate(h)
    return x + unit.project(gate * gate.sigmoid() * unit.expand(h))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_logits_are_those_of_the_equations(mlp):
    model, x = gpt(mlp=mlp), tokens(2, 7)
    for sample, found in zip(x, model(x), strict=True):
        h = model.stem.embedding.weight[sample]
        for name in model.block_names:
            block = getattr(model, name)
            h = expanded(block.mlp, attended(block.attn, h), mlp)
        expected = normed(h, model.head.norm) @ model.head.linear.weight.T
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_block_is_like_every_other_and_the_embedding_stands_before_the_first():
    model = gpt(depth=4, tied=False)
    assert [name for name, _ in model.named_children()] == ["stem", "block1", "block2", "block3", "block4", "head"]
    assert model.block_names == ("block1", "block2", "block3", "block4")
    assert len({tuple(p.shape for p in getattr(model, name).parameters()) for name in model.block_names}) == 1


@pytest.mark.parametrize(("mlp", "hidden"), [("gelu", 2 * 4 * 192**2), ("swiglu", 3 * 512 * 192)])
def test_the_number_of_weights(mlp, hidden):
    model = models.GPT(mlp=mlp).build((1, 1, 128), 4096)
    block = 2 * 192 + 4 * 192**2 + hidden
    assert sum(p.numel() for p in model.parameters()) == 2 * 4096 * 192 + 6 * block + 192
    tied = models.GPT(mlp=mlp, tied=True).build((1, 1, 128), 4096)
    assert sum(p.numel() for p in tied.parameters()) == 4096 * 192 + 6 * block + 192


def test_a_logit_depends_on_no_later_token():
    model, x = gpt().eval(), tokens(3, 8)
    other = x.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    before, after = model(x), model(other)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


@pytest.mark.parametrize("pieces", [(8,), (1,) * 8, (3, 1, 4), (5, 3)])
def test_keys_and_values_that_are_kept_change_nothing(pieces):
    model, x = gpt().eval(), tokens(2, 8)
    with torch.no_grad(), remembering(model):
        found = torch.cat([model(part) for part in x.split(pieces, dim=1)], 1)
    torch.testing.assert_close(found, model(x), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(model(x[:, :3]), model(x)[:, :3])  # nothing is left behind


def test_a_tied_matrix_belongs_to_the_head():
    model, (x, y) = gpt(tied=True), (tokens(4, 8), tokens(4, 8).roll(-1, 1))
    assert model.head.linear.weight is model.stem.embedding.weight
    learner = Learner(model, "local_ce", task=LanguageModel(shift=False), optimizer="sgd", lr=0.1)
    learner.step(x, y)
    shapes = [{tuple(p.shape) for p in block.parameters()} for block in learner.network.blocks]
    assert all((11, 12) not in own for own in shapes)
    assert (11, 12) in {tuple(p.shape) for p in learner.network.head.parameters()}


@pytest.mark.parametrize("tied", ["last", "first", "frozen"])
def test_who_trains_a_tied_matrix_can_be_said(tied):
    model, (x, y) = gpt(tied=True), (tokens(4, 8), tokens(4, 8).roll(-1, 1))
    before = model.head.linear.weight.detach().clone()
    learner = Learner(model, "local_ce", task=LanguageModel(shift=False), optimizer="sgd", lr=0.1, tied=tied)
    learner.step(x, y)
    assert torch.equal(model.head.linear.weight, before) == (tied == "frozen")
    assert model.head.linear.weight is model.stem.embedding.weight


@pytest.mark.parametrize(
    "rule",
    ["backprop", "sll", *(pytest.param(name, marks=pytest.mark.slow) for name in ("local_ce", "mono_forward", "sid"))],
)
@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_learns_a_cycle_under_the_rules(rule, tied):
    """Tokens that count upwards: the next one is certain, and the loss falls far below that of a guess, ln 5."""
    start = tokens(16, 1, vocabulary=5)
    windows = (start + torch.arange(9)) % 5
    torch.manual_seed(0)
    model = models.create("gpt", (1, 1, 8), 5, depth=2, width=16, heads=2, tied=tied)
    learner = Learner(model, rule, task=LanguageModel(shift=False), lr=0.02)
    for _ in range(30):
        metrics = learner.step(windows[:, :-1], windows[:, 1:])
    assert metrics.read()["head/loss"] < 0.3 * math.log(5)


@pytest.mark.slow
def test_activations_and_gradients_do_not_grow_with_depth():
    sizes = {"shape": (1, 1, 16), "batch_size": 4, "classes": 60, "width": 16, "heads": 2}
    for rule, least, most in (("local_ce", 1.0, 1.02), ("sll", 1.0, 1.02), ("backprop", 1.5, 4.0)):
        few, many = (memory_of(rule, "gpt", depth, **sizes) for depth in (4, 16))
        ratio = (many["activations"] + many["gradients"]) / (few["activations"] + few["gradients"])
        assert least <= ratio <= most, rule


WRONG = [
    (lambda: models.GPT(width=12, heads=4), "width must be a multiple of twice the heads (8), not 12"),
    (lambda: models.GPT(mlp="relu"), "mlp must be one of gelu, swiglu"),
    (lambda: models.GPT(tied="yes"), "tied must be true or false"),
    (lambda: models.create("gpt", (3, 32, 32), 10), "takes tokens, in windows of shape (1, 1, T)"),
    (lambda: models.create("gpt", (1, 1, 9), 10, context=8), "a window of 9 tokens is longer than the context"),
    (lambda: gpt(context=8)(tokens(1, 9)), "9 tokens are more than the context of the model, 8"),
    (lambda: gpt()(torch.zeros(2, 8)), "takes tokens, int64 (B, T), not float32 (2, 8)"),
]


@pytest.mark.parametrize(("use", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_wrong_use_is_told_in_one_sentence(use, sentence):
    with pytest.raises(LayerwiseError) as caught:
        use()
    assert sentence in str(caught.value) and str(caught.value).endswith(".")
