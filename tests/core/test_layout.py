"""The dimension of the channels is where the layers put it, and the rules read it there."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.nets import by_family
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule, partition, rule_names
from layerwise.core.layout import from_standard, to_standard
from layerwise.rules import get as get_rule

G = torch.Generator().manual_seed(0)
SERIES, IMAGES = torch.randn(12, 3, 10, generator=G), torch.randn(12, 2, 6, 6, generator=G)
Y = torch.arange(12) % 4


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def layouts(*modules, x, cut=0):
    parts = partition(nn.Sequential(*modules, nn.Flatten(), nn.LazyLinear(3)), [str(cut)], example=x)
    parts.eval().probe(x[:2])
    return parts.blocks[0].layout, parts.input_layout


def channels_last(dims):
    return Call(lambda h: h.movedim(1, -1)), Call(lambda h: h.movedim(-1, 1)), dims


class Encoder(nn.Module):
    """A sequence-first layer that gets what it wants."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self, last, **options):
        super().__init__()
        self.lstm, self.last = nn.LSTM(6, 7, **options), last

    def forward(self, x):
        out, (h, _) = self.lstm(x)
        return h[-1] if self.last else out


class Patches(nn.Module):
    """Windows of a picture with its channels last, as Swin has them: split, mixed inside, joined."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, h):
        b, c, s, _ = h.shape
        h = h.permute(0, 2, 3, 1)
        w = h.view(b, s // 2, 2, s // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        w = w + self.mix(w.transpose(1, 2)).transpose(1, 2)
        return w.view(b, s // 2, s // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, s, s, c)


class Gate(nn.Module):
    """A squeeze-and-excitation unit."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(2, 5, 3), nn.Linear(5, 5)

    def forward(self, x):
        h = self.conv(x)
        return h * self.gate(h.mean((2, 3)))[:, :, None, None].sigmoid()


class Mixer(nn.Module):
    """Tokens that are mixed by a layer along the tokens, once as linear and once as convolution."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.conv = nn.Linear(10, 4), nn.Linear(3, 3), nn.Conv1d(3, 3, 1)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.mix(h.transpose(1, 2)).transpose(1, 2)
        return h + self.conv(h)


class MixesFirst(nn.Module):
    """Its first layer reads the transposed batch: it mixes positions of (B, L, C), or channels of (B, C, L)."""

    def __init__(self, hidden, then):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, 3))
        self.then = then

    def forward(self, x):
        return self.then(x + self.first(x.mT).mT)


@pytest.mark.parametrize("hidden", [3, 7])
@pytest.mark.parametrize("then", [nn.Linear(10, 5), nn.LayerNorm(10)])
def test_layers_over_both_dimensions_of_a_series_tell_nothing(hidden, then):
    """Whether the first mixes positions and the second channels, or the other way round, only the user knows."""
    assert layouts(MixesFirst(hidden, then), x=SERIES) == (None, None)
    assert layouts(MixesFirst(hidden, nn.Identity()), x=SERIES) == ("BCL", "BCL")
    named = partition(nn.Sequential(MixesFirst(hidden, then), nn.Flatten(), nn.LazyLinear(3)), ["0"], example=SERIES)
    declared = named.with_layout({"input": "BLC"})
    declared.probe(SERIES[:2])
    assert declared.blocks[0].layout == "BLC"


TOKENS = torch.randn(4, 5, 6, generator=G)
VOLUMES = torch.randn(4, 1, 4, 4, 4, generator=G)


@pytest.mark.parametrize(
    ("modules", "x", "expected"),
    [
        ([nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2))], SERIES, ("BCL", "BCL")),
        ([nn.Sequential(nn.Linear(10, 5), nn.LayerNorm(5), nn.GELU())], SERIES, ("BLC", "BLC")),
        ([nn.Sequential(Call(lambda x: x.mT), nn.Linear(3, 5))], SERIES, ("BLC", "BCL")),
        ([nn.Sequential(nn.Conv1d(3, 5, 3), Call(lambda h: h.transpose(1, 2)))], SERIES, ("BLC", "BCL")),
        ([nn.Conv2d(2, 5, 3)], IMAGES, ("BCHW", "BCHW")),
        ([nn.Sequential(nn.Conv2d(2, 5, 3), Call(lambda h: h.permute(0, 2, 3, 1)))], IMAGES, ("BHWC", "BCHW")),
        ([nn.Sequential(Call(lambda x: x.permute(0, 3, 1, 2)), nn.Conv2d(6, 5, 1))], IMAGES, ("BCHW", "BHWC")),
        ([nn.Sequential(nn.Conv2d(2, 5, 3), Call(lambda h: h.flatten(2).mT))], IMAGES, ("BLC", "BCHW")),
        ([nn.Sequential(nn.Conv2d(2, 4, 1), Patches())], IMAGES, ("BHWC", "BCHW")),
        ([Gate()], IMAGES, ("BCHW", "BCHW")),
        ([nn.Conv3d(1, 4, 3)], VOLUMES, ("BCDHW", "BCDHW")),
        ([nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)], TOKENS, ("BLC", "BLC")),
        ([Encoder()], TOKENS, ("BLC", "BLC")),
        ([Recurrent(last=False, batch_first=True)], TOKENS, ("BLC", "BLC")),
        ([Recurrent(last=True, batch_first=True)], TOKENS, ("BC", "BLC")),
        ([nn.Embedding(9, 4)], torch.arange(20).view(4, 5) % 9, ("BLC", "BC")),
        ([Mixer()], SERIES, ("BLC", "BLC")),
        ([nn.Linear(6, 4)], TOKENS[:, 0], ("BC", "BC")),
    ],
)
def test_the_layers_tell_where_the_channels_are(modules, x, expected):
    assert layouts(*modules, x=x) == expected


def test_what_no_layer_tells_is_refused_by_rules_that_have_to_know_and_may_be_declared():
    def make():
        odd = Call(lambda x: x.reshape(len(x), 5, 6) * 1.0)
        return nn.Sequential(nn.Sequential(odd, nn.Identity()), nn.Sequential(nn.Flatten(), nn.Linear(30, 4)))

    named = {"cuts": ["0"], "example": SERIES}
    head = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    model = nn.Sequential(make()[0], nn.Sequential(Call(lambda h: h), nn.Flatten(), nn.Linear(30, 30)), head)
    with pytest.raises(LayerwiseError, match=r"block '0' do not tell which dimension.*declare it"):
        Learner(model, "local_ce", cuts=["0", "1"], example=SERIES)
    learner = Learner(model, "local_ce", cuts=["0", "1"], example=SERIES, layout={"0": "BCL"})
    assert learner.auxiliary["0"].in_features == 5
    assert learner.network.layouts[0] == "BCL"
    assert "BCL" in learner.network.describe()
    assert copy.deepcopy(learner.network).layout == {"0": "BCL"}
    learner = Learner(model, "local_ce", cuts=["0", "1"], example=SERIES, layout="NLC")
    assert learner.auxiliary["0"].in_features == 6
    Learner(make(), "backprop", **named)  # nothing has to know
    for wrong, words in (
        *(({"9": "BCL"}, "no block '9'"), ("CBL", "not understood"), ({"0": "BCHW"}, "4 letters")),
        ("BCHW", "has 4 letters, and the outputs of the blocks have 2, 3 dimensions"),
    ):
        with pytest.raises(LayerwiseError, match=words):
            Learner(make(), "backprop", layout=wrong, **named)


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer(6, 2, 8), Recurrent(last=False)])
def test_a_layer_that_takes_the_batch_for_a_sequence_is_refused(layer):
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(30, 30), nn.Linear(30, 4))
    with pytest.raises(LayerwiseError, match="would mix samples; build it with batch_first=True"):
        Learner(model, "backprop", cuts=["0", "2"], example=TOKENS)
    with pytest.raises(LayerwiseError, match="would mix samples; build it with batch_first=True"):
        Learner(model, "backprop", cuts="*", example=TOKENS)  # at its calls


class Addmm(nn.Module):
    """A linear layer over the last dimension, written as GPT-2's."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], 7)


class Convolutions(nn.Module):
    """Series whose length is the size of a bias of the head; `odd` is a function that nobody follows."""

    def __init__(self, odd):
        super().__init__()
        self.odd = odd
        self.layers = nn.ModuleList(nn.Conv1d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.hidden, self.head = nn.Linear(3, 10), nn.Linear(10, 4)

    def forward(self, x):
        for layer in self.layers:
            x = self.odd(layer(x), x)
        return self.head(self.hidden(x.mean(2)).relu())


def test_a_layout_that_no_function_shows_is_not_guessed_from_sizes():
    model = Convolutions(lambda h, x: h)
    conv = nn.Conv1d(3, 3, 3, padding=1, bias=False)
    model.layers = nn.ModuleList(nn.Sequential(copy.deepcopy(conv), Call(torch.special.ndtr)) for _ in range(2))
    with pytest.raises(LayerwiseError, match="do not tell which dimension of its output"):
        Learner(model, "local_ce", cuts="layers.*", example=SERIES)


def test_addmm_and_residuals_of_functions_that_nobody_follows_are_known():
    tokens = torch.randn(12, 5, 6, generator=G)
    assert layouts(Addmm(), nn.ReLU(), x=tokens)[0] == "BLC"
    residual = Convolutions(lambda h, x: x + torch.special.ndtr(h))
    learner = Learner(residual, "local_ce", cuts="layers.*", example=SERIES)
    assert learner.network.layouts == ("BCL", "BCL", "BC")


def test_a_batch_that_is_not_first_at_a_cut_is_refused():
    sequence_first = nn.Sequential(Call(lambda x: x.transpose(0, 1)), nn.TransformerEncoderLayer(6, 2, 8))
    model = nn.Sequential(
        sequence_first, nn.Sequential(nn.Linear(6, 6), Call(lambda h: h[-1])), nn.Linear(6, 6), nn.Linear(6, 4)
    )
    with pytest.raises(LayerwiseError, match="rules need the batch first"):
        Learner(model, "local_ce", cuts=["0", "1"], example=TOKENS)


def twins(kind):
    """Two networks that compute the same, with their channels in different dimensions."""
    torch.manual_seed(1)
    if kind == "series":
        x, convolve, pool, sizes = SERIES, nn.Conv1d, Call(lambda h: h.mean(2)), (3, 6, 6, 6)
    else:
        x, convolve, pool, sizes = IMAGES, nn.Conv2d, Call(lambda h: h.mean((2, 3))), (2, 6, 6, 6)
    layers = [convolve(i, o, 3, padding=1) for i, o in itertools.pairwise(sizes)]
    first = [nn.Sequential(layer, nn.ReLU()) for layer in layers]
    second = [nn.Sequential(Last(layer, inside=i > 0), nn.ReLU()) for i, layer in enumerate(copy.deepcopy(layers))]
    head = nn.Linear(6, 4)
    last = Call(lambda h: h.flatten(1, -2).mean(1))
    return (
        x,
        nn.Sequential(*first, nn.Sequential(pool, head)),
        nn.Sequential(*second, nn.Sequential(last, copy.deepcopy(head))),
    )


class Last(nn.Module):
    """A convolution whose channels come last (where it lies `inside`) and go out last."""

    def __init__(self, layer, inside):
        super().__init__()
        self.layer, self.inside = layer, inside

    def forward(self, h):
        return self.layer(h.movedim(-1, 1) if self.inside else h).movedim(1, -1)


ANY_MODEL = [name for name in rule_names() if not get_rule(name).models]


DRAWS_BY_LAYER = ("forward_gradient", "likelihood_ratio", "pepita", "continual_backprop")
"""They look into blocks: what they draw has the shape of each layer's output, or the layers must be torch's own."""


@pytest.mark.parametrize("kind", ["series", pytest.param("images", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", by_family(name for name in ANY_MODEL if name not in DRAWS_BY_LAYER))
def test_a_rule_trains_the_same_whatever_the_layout(rule, kind):
    x, first, second = twins(kind)
    options = {"reconstruction": 0, "classification": 1} if rule == "infopro" and kind == "series" else {}
    read = []
    for model in (first, second):
        learner = Learner(model, create_rule(rule, **options), optimizer="sgd", lr=0.05)
        steps = [learner.step(x, Y).read() for _ in range(2)]
        read.append((learner.network.layouts, *steps, {"logits": learner(x).sum().item()}))
    assert read[0][0][0] in ("BCL", "BCHW")
    assert read[1][0][0] in ("BLC", "BHWC")
    for own, other in zip(read[0][1:], read[1][1:], strict=True):
        assert own.keys() == other.keys()
        assert other == pytest.approx(own, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(
    "rule", by_family(name for name in ANY_MODEL if name not in ("forward_forward", "layer_collaboration"))
)
def test_volumes_are_trained(rule):
    model = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(256, 4)),
    )  # fmt: skip
    learner = Learner(model, rule)
    learner.step(VOLUMES, Y[:4])
    assert learner.network.layouts[0] == "BCDHW"
    assert learner(VOLUMES).isfinite().all()


@pytest.mark.parametrize("layout", ["BC", "BLC", "BCL", "BCHW", "BHWC", "BCDHW", "BDHWC"])
def test_the_standard_order_has_an_inverse(layout):
    h = torch.randn([2, 3, 4, 5, 6][: len(layout)], generator=G)
    standard = to_standard(h, layout)
    assert standard.shape[1 if h.dim() != 3 else 2] == h.shape[layout.index("C")]
    assert torch.equal(from_standard(standard, layout), h)


def test_padding_and_windows_keep_the_features_apart():
    windows = Call(lambda h: F.pad(h, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2))
    assert layouts(nn.Sequential(Call(lambda x: x.mT), windows, nn.Linear(9, 5)), x=SERIES)[0] == "BLC"


@pytest.mark.parametrize(
    "move",
    [
        lambda h: torch.rot90(h, 1, (1, 2)),
        lambda h: torch.tensordot(h, torch.eye(h.shape[1]), ([1], [0])),
        lambda h: h.as_strided((len(h), 8, 5), (40, 1, 8)),
        lambda h: torch.permute_copy(h, (0, 2, 1)),
        lambda h: torch.transpose_copy(h, 1, 2),
        lambda h: torch.ops.aten.transpose.int(h, 1, 2),
    ],
)
def test_a_function_that_may_move_dimensions_is_followed_or_the_layout_is_unknown(move):
    # The convolution gives (B, 5, 8); behind the function, the channels come last.
    assert layouts(nn.Sequential(nn.Conv1d(3, 5, 3), Call(move)), x=SERIES)[0] in (None, "BLC")


@pytest.mark.parametrize("rule", ["forward_forward", "layer_collaboration", "scalable_ff"])
def test_rules_that_read_samples_from_the_first_dimension_refuse_another_one_there(rule):
    sequence_first = nn.Sequential(Call(lambda x: x.transpose(0, 1)), nn.TransformerEncoderLayer(6, 2, 8))
    model = nn.Sequential(
        sequence_first, nn.Sequential(nn.Linear(6, 6), Call(lambda h: h[-1])), nn.Linear(6, 6), nn.Linear(6, 4)
    )
    with pytest.raises(LayerwiseError, match="rules need the batch first"):
        Learner(model, rule, cuts=["0", "1"], example=TOKENS)


@pytest.mark.parametrize(
    ("declared", "fits"), [("BLC", False), ("BCL", True), ({"0": "BLC"}, False), ({"input": "BLC"}, False)]
)
def test_a_declaration_that_contradicts_the_layers_is_refused(declared, fits):
    model = nn.Sequential(nn.Conv1d(3, 5, 3), nn.Sequential(nn.Flatten(), nn.Linear(40, 6)), nn.Linear(6, 4))
    if fits:
        assert Learner(model, "local_ce", example=SERIES, layout=declared).network.layouts[0] == "BCL"
        return
    with pytest.raises(LayerwiseError, match=r"'BLC' is declared, but the layers tell that .* BCL"):
        Learner(model, "local_ce", example=SERIES, layout=declared)
