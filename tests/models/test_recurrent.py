"""The recurrent models against their equations, and under the rules of the library."""

import warnings

import pytest
import torch
from support.nets import batches, made, net
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, models, rules
from layerwise.rules.readout import pool_vectors

KINDS = ("rnn", "gru", "lstm")
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def built(kind, shape=(2, 4, 3), classes=5, **options):
    torch.manual_seed(0)
    return models.create(kind, shape, classes, **{"depth": 2, "width": 6, **options})


def states_of(kind, layer, xs, activation):
    """The states of one sample's sequence, from the equations in the docstrings."""
    w, u = layer.weight_ih_l0, layer.weight_hh_l0
    b, c = layer.bias_ih_l0, layer.bias_hh_l0
    h = cell = torch.zeros(layer.hidden_size)
    found = []
    for x in xs:
        own, fed = (w @ x + b).chunk(GATES[kind]), (u @ h + c).chunk(GATES[kind])
        if kind == "rnn":
            h = activation(own[0] + fed[0])
        elif kind == "gru":
            r, z = (torch.sigmoid(own[i] + fed[i]) for i in (0, 1))
            h = (1 - z) * torch.tanh(own[2] + r * fed[2]) + z * h
        else:
            i, f, g, o = (a + b for a, b in zip(own, fed, strict=True))
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
        found.append(h)
    return torch.stack(found)


def logits_of(kind, model, xs, activation=torch.tanh):
    for block in (model.block1, model.block2):
        xs = states_of(kind, block.states.layer, xs, activation)
    return model.head.linear(xs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence", ["rows", "pixels"])
def test_an_image_is_read_row_by_row_or_pixel_by_pixel_and_the_last_state_is_classified(kind, sequence):
    model, x = built(kind, sequence=sequence), torch.randn(2, 2, 4, 3)
    for image, found in zip(x, model(x), strict=True):
        rows = [image[:, i].flatten() for i in range(4)]
        pixels = [image[:, i, j] for i in range(4) for j in range(3)]
        torch.testing.assert_close(found, logits_of(kind, model, rows if sequence == "rows" else pixels)[-1])


def test_a_simple_network_may_have_a_relu():
    model, x = built("rnn", activation="relu"), torch.randn(1, 2, 4, 3)
    torch.testing.assert_close(model(x)[0], logits_of("rnn", model, x[0].movedim(0, 1).flatten(1), torch.relu)[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_on_tokens_every_state_predicts_the_next_one(kind):
    model, x = built(kind, (1, 1, 7), 11, sequence="tokens"), torch.randint(11, (2, 9))  # longer than the window
    for sample, found in zip(x, model(x), strict=True):
        torch.testing.assert_close(found, logits_of(kind, model, model.stem.embedding.weight[sample]))
    assert model.block_names == ("block1", "block2") and not model.tied


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind):
    def count(model):
        return sum(p.numel() for p in model.parameters())

    def layer(inputs):
        return GATES[kind] * 6 * (inputs + 6 + 2)

    assert count(built(kind)) == layer(2 * 3) + layer(6) + 7 * 5
    assert count(built(kind, sequence="pixels")) == layer(2) + layer(6) + 7 * 5
    assert count(built(kind, (1, 1, 7), 11, sequence="tokens")) == 11 * 6 + 2 * layer(6) + 7 * 11


@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_reads_the_mean_over_the_steps(kind):
    learner = Learner(net(kind), "local_ce", example=batches(1)[0][0])
    assert learner.network.layouts == ("BLC", "BLC", "BLC", "BC")
    states = learner.network.blocks[0](batches(1)[0][0])
    site = learner.groups[0].units[0].site
    assert torch.equal(pool_vectors(states, "auto", False, site), states.mean(1))
    assert learner.auxiliary["0"].in_features == 12


REFUSED = {
    "infopro": "infopro reconstructs the input, and cannot tell how",
    "pepita": "pepita is defined for chains of linear layers",
    "continual_backprop": "continual_backprop finds no hidden units",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_trains_it_or_refuses_it(kind):
    x, y = batches(1)[0]
    for name in (name for name in rules.names() if not rules.get(name).models):
        sentence = REFUSED.get(name)
        if (name, kind) == ("forward_gradient", "lstm"):
            continue  # torch cannot differentiate its LSTM forward on every processor
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if sentence is None:
                Learner(net(kind), made(name), example=x).step(x, y)
                continue
            with pytest.raises(LayerwiseError, match=sentence):
                Learner(net(kind), made(name), example=x).step(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["local_ce", "sll", "sid", "solo", "backprop"])
def test_it_learns_a_text(rule):
    model = built("gru", (1, 1, 6), 5, width=24, sequence="tokens")
    learner = Learner(model, rule, task=LanguageModel(shift=False), lr=1e-2)
    start = torch.arange(20)[:, None]
    x, y = (start + torch.arange(6)) % 5, (start + torch.arange(1, 7)) % 5
    for _ in range(60):
        metrics = learner.step(x, y).read()
    assert metrics["head/accuracy"] > 0.9


WRONG = [
    (lambda: models.GRU(sequence="columns"), "sequence must be one of rows, pixels, tokens, not 'columns'"),
    (lambda: built("gru", (3, 8, 8), sequence="tokens"), "tokens, in windows of shape (1, 1, T), not (3, 8, 8)"),
    (lambda: built("lstm")(torch.randint(5, (2, 7))), "the model takes images, (B, C, H, W), not int64 (2, 7)"),
    (lambda: built("rnn", (1, 1, 7), sequence="tokens")(torch.randn(2, 7)), "takes tokens, int64 (B, T), not float32"),
    (lambda: models.RNN(activation="gelu"), "activation must be one of tanh, relu, not 'gelu'"),
]


@pytest.mark.parametrize(("use", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_wrong_use_is_told_in_one_sentence(use, sentence):
    with pytest.raises(LayerwiseError) as caught:
        use()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_block_holds_one_layer_of_torch():
    model = built("lstm", dropout=0.1)
    assert [type(module) for module in model.modules() if isinstance(module, nn.RNNBase)] == [nn.LSTM] * 2
    assert [name for name, _ in model.block2.named_children()] == ["states", "dropout"]
