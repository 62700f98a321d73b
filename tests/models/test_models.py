"""The model zoo: shapes, named blocks, sizes by formula, and a sentence for each wrong use."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from layerwise import Learner, models
from layerwise.errors import LayerwiseError

SMALL = {
    "mlp": {"width": 12},
    "vgg": {"width": 4},
    "resnet": {"width": 4},
    "reversible": {"width": 8, "heads": 2},
    "noprop": {"width": 2},
    "noprop_ct": {"width": 2},
    "noprop_fm": {"width": 2},
    "sid_cascade": {"width": 12},
    "vit": {"width": 12},
    **{kind: {"width": 12} for kind in ("rnn", "gru", "lstm")},
}
ONE_BLOCK = ("noprop_ct", "noprop_fm")  # told the time, their depth is the steps of the sampler
IMAGES = [name for name in models.names() if name not in ("gcn", "gat", "gpt", "fcn")]  # these have tests of their own
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def block_names(name, depth):
    """The cascade has its extractor in two blocks, and its last module is the head; some have one block."""
    if name in ONE_BLOCK:
        return ("block1",)
    if name == "sid_cascade":
        return ("extractor1", "extractor2", *(f"module{i}" for i in range(1, depth)))
    return tuple(f"block{i}" for i in range(1, depth + 1))


def compose(model, x):
    for name in [*model.block_names, "head"]:
        x = getattr(model, name)(x)
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("name", IMAGES)
def test_surface(name, depth, shape):
    torch.manual_seed(0)
    model = models.create(name, shape, 7, depth=depth, **SMALL[name])
    x = torch.randn(3, *shape)
    assert isinstance(model, nn.Sequential)
    assert type(model).forward is nn.Sequential.forward
    assert model.block_names == block_names(name, depth)
    assert [child for child, _ in model.named_children()] == [*model.block_names, "head"]
    assert all(count(child) > 0 for child in model.children())
    assert model(x).shape == (3, 7)
    model.eval()
    assert torch.equal(model(x), compose(model, x))


@pytest.mark.parametrize("name", IMAGES)
def test_defaults_fit_the_digits(name):
    model = models.create(name, (1, 8, 8), 10).eval()
    assert model.block_names == block_names(name, models.options(name)().depth)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("noprop", "vit", "reversible") else [])
        for name in IMAGES
        if name not in ONE_BLOCK
    ],
)
def test_a_deep_model_adds_blocks_no_larger_than_a_shallow_ones(name):
    shape = (1, 8, 8)
    deep = models.create(name, shape, 10, depth=256, **SMALL[name])
    assert len(deep.block_names) >= 256
    hidden = torch.zeros(1, *shape)
    sizes = []
    with torch.no_grad():
        for block in deep.eval()[:-1]:
            hidden = block(hidden)
            sizes.append(hidden.numel())
    assert max(sizes) == max(sizes[:4])
    if name != "resnet":  # its stages grow with the depth instead
        assert len({count(block) for block in deep[4:-1]}) == 1
        assert len(set(sizes[4:])) == 1


@pytest.mark.parametrize("name", IMAGES)
def test_every_parameter_gets_a_gradient(name):
    model = models.create(name, (1, 8, 8), 10, depth=3, **SMALL[name])
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", IMAGES)
def test_the_same_seed_builds_the_same_model(name):
    def build():
        torch.manual_seed(3)
        return models.create(name, (1, 8, 8), 10, depth=2, **SMALL[name]).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("classes", "module"), [(10, 38_154), (100, 84_324)])
def test_sid_cascade_has_the_sizes_of_the_authors_code(classes, module):
    model = models.SIDCascade(depth=3).build((3, 32, 32), classes)
    assert count(model.extractor1) + count(model.extractor2) == 257_344
    assert [count(part) for part in (model.module1, model.module2, model.head)] == [module] * 3
    state = model.extractor2(model.extractor1(torch.randn(2, 3, 32, 32)))
    assert state.shape == (2, classes + 128)
    assert torch.allclose(state[:, :classes].exp(), torch.full((2, classes), 1 / classes))
    after = model.module1(state)
    assert torch.equal(after[:, classes:], state[:, classes:])
    assert torch.allclose(after[:, :classes].exp().sum(-1), torch.ones(2))


def test_a_cascade_may_have_no_module_but_not_less():
    assert count(models.SIDCascade(depth=0).build((3, 32, 32), 10).head) == 129 * 10
    with pytest.raises(LayerwiseError, match="depth must be a whole number of at least 0"):
        models.SIDCascade(depth=-1)
    with pytest.raises(LayerwiseError, match="pools twice"):
        models.SIDCascade().build((1, 3, 8), 10)


def test_mlp_size():
    model = models.MLP().build((1, 28, 28), 10)  # the SLL paper's 3 x 1000
    assert count(model) == 785 * 1000 + 2 * 1001 * 1000 + 1001 * 10
    assert count(models.MLP(norm="layer").build((1, 28, 28), 10)) == count(model) + 3 * 2000


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_mlp_block_is_linear_norm_activation_dropout(norm, activation):
    torch.manual_seed(0)
    model = models.MLP(depth=2, width=6, activation=activation, norm=norm, dropout=0.5).build((1, 2, 2), 3)
    linear = model.block1.linear
    x = torch.randn(5, 1, 2, 2)
    hidden = x.reshape(5, 4) @ linear.weight.T + linear.bias
    if norm == "layer":
        hidden = nn.functional.layer_norm(hidden, (6,))
    if norm == "batch":
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
    expected = getattr(nn.functional, activation)(hidden)
    model.block1.dropout.eval()
    torch.testing.assert_close(model.block1(x), expected)
    assert model.block1.dropout.p == 0.5


def test_vgg_of_the_issue():
    model = models.VGG(depth=4, width=64).build((3, 32, 32), 10)
    channels = [getattr(model, name).conv.out_channels for name in model.block_names]
    pooled = [hasattr(getattr(model, name), "pool") for name in model.block_names]
    assert channels == [64, 128, 256, 256]
    assert pooled == [True, True, True, False]
    sizes = [3, *channels]
    convolutions = sum(9 * a * b + 2 * b for a, b in zip(sizes, channels, strict=False))
    assert count(model) == convolutions + 257 * 10
    assert model[:-1](torch.zeros(1, 3, 32, 32)).shape == (1, 256, 4, 4)


@pytest.mark.parametrize(("side", "left"), [(1, 1), (2, 2), (3, 3), (4, 2), (8, 2), (9, 2), (16, 2), (28, 3), (64, 8)])
def test_vgg_never_pools_below_two_by_two(side, left):
    model = models.VGG(depth=5, width=2).build((1, side, side), 10).eval()
    assert model[:-1](torch.zeros(1, 1, side, side)).shape == (1, 8, left, left)


def test_resnet_20():
    model = models.ResNet(depth=9, width=16).build((3, 32, 32), 10)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    # 3x3 convolutions; the two option B projections with their norms; the head
    stem, stages = 9 * 3 * 16, 9 * (6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count(model) == stem + stages + norms + shortcuts + 65 * 10


@pytest.mark.parametrize(("depth", "channels"), [(1, [4]), (2, [4, 8]), (4, [4, 4, 8, 16]), (5, [4, 4, 8, 8, 16])])
def test_resnet_spreads_its_blocks_over_three_stages(depth, channels):
    model = models.ResNet(depth=depth, width=4).build((3, 32, 32), 10)
    hidden = torch.zeros(1, 3, 32, 32)
    shapes = []
    for block in model[:-1]:
        hidden = block(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(c, 128 // c, 128 // c) for c in channels]


def test_a_stem_of_its_own_changes_the_cuts_and_not_the_function():
    joined, own = (models.ResNet(depth=3, width=8, stem=stem).build((3, 16, 16), 10) for stem in ("joined", "own"))
    assert (joined.block_names, len(own.block_names)) == (("block1", "block2", "block3"), 4)
    own.load_state_dict(dict(zip(own.state_dict(), joined.state_dict().values(), strict=True)))
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    assert torch.equal(own.eval()(x), joined.eval()(x))
    peaks = []
    for model in (joined.train(), own.train()):
        learner = Learner(model, "local_ce")
        learner.step(x, y)
        use = learner.measured_step(x, y)[1]
        peaks.append(use.activations + use.gradients)
    assert peaks[0] - peaks[1] == pytest.approx(4 * 16 * 8 * 16 * 16, rel=0.05)  # the stem's map, float32


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_size(pool):
    depth, width, patch = 2, 48, 4
    model = models.ViT(depth=depth, width=width, patch=patch, pool=pool).build((3, 32, 32), 10)
    tokens = 64 + (pool == "cls")
    stem = (3 * patch**2 + 1) * width + (pool == "cls") * width + tokens * width
    # norm, qkv, projection; norm, expand, project
    block = 2 * width + (width + 1) * 3 * width + (width + 1) * width
    block += 2 * width + (width + 1) * 4 * width + (4 * width + 1) * width
    assert count(model) == stem + depth * block + 2 * width + (width + 1) * 10
    assert model.block1(torch.zeros(2, 3, 32, 32)).shape == (2, tokens, width)


def test_vit_attention_is_softmax_attention():
    torch.manual_seed(0)
    unit = models.ViT(depth=1, width=8, heads=2).build((1, 8, 8), 3).block1.attn
    x = torch.randn(2, 5, 8)
    q, k, v = unit.qkv(nn.functional.layer_norm(x, (8,))).split(8, dim=-1)
    heads = []
    for columns in (slice(0, 4), slice(4, 8)):
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(4)
        heads.append(scores.softmax(-1) @ v[..., columns])
    torch.testing.assert_close(unit(x), x + unit.project(torch.cat(heads, -1)))


def test_vit_can_be_cut_between_attention_and_mlp():
    torch.manual_seed(0)
    model = models.ViT(depth=2, width=12).build((1, 8, 8), 3)
    x = torch.randn(2, 1, 8, 8)
    parts = [model.block1.stem, model.block1.attn, model.block1.mlp]
    parts += [model.block2.attn, model.block2.mlp, model.head]
    hidden = x
    for part in parts:
        hidden = part(hidden)
    assert torch.equal(hidden, model(x))


def test_vit_sees_where_a_patch_is():
    torch.manual_seed(0)
    model = models.ViT(depth=1, width=12, pool="mean").build((1, 8, 8), 3)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.allclose(model(x), model(x.flip(-1).roll(4, -1)))


@pytest.mark.parametrize(
    "name", ["gru", "lstm", "mlp", "noprop", "noprop_ct", "noprop_fm", "rnn", "sid_cascade", "vgg", "vit"]
)
def test_dropout_acts_in_training_only(name):
    torch.manual_seed(0)
    model = models.create(name, (1, 8, 8), 10, depth=2, dropout=0.5, **SMALL[name])
    x = torch.randn(4, 1, 8, 8)
    assert any(isinstance(module, nn.Dropout) for module in model.modules())
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_no_activation_overwrites_the_input_of_a_cut():
    for name in IMAGES:
        model = models.create(name, (1, 8, 8), 10, depth=3, **SMALL[name])
        for module in model.modules():
            assert not getattr(module, "inplace", False)


def test_options_are_frozen_and_described():
    options = models.options("vgg")()
    with pytest.raises(FrozenInstanceError):
        options.depth = 3
    text = models.describe("vit")
    assert "Dosovitskiy" in text
    assert "depth = 12" in text
    assert ">>>" not in text


WRONG = [
    (lambda: models.create("vggg", (1, 8, 8), 10), "did you mean 'vgg'?"),
    (
        lambda: models.create("x", (1, 8, 8), 10),
        "legal names: fcn, gat, gcn, gpt, gru, lstm, mlp, noprop, noprop_ct, noprop_fm, resnet, reversible, rnn, "
        "sid_cascade, vgg, vit",
    ),
    (lambda: models.options("resnt"), "did you mean 'resnet'?"),
    (lambda: models.describe("resnt"), "did you mean 'resnet'?"),
    (lambda: models.create("mlp", (1, 8, 8), 10, dept=2), "'dept'; did you mean 'depth'?"),
    (lambda: models.create("resnet", (1, 8, 8), 10, dropout=0.1), "legal names: depth, width"),
    (lambda: models.MLP(depth=0), "depth must be a whole number of at least 1, not 0"),
    (lambda: models.MLP(depth=True), "depth must be a whole number"),
    (lambda: models.MLP(width="wide"), "width must be a whole number of at least 1, not 'wide'"),
    (lambda: models.MLP(dropout=1.0), "dropout must be at least 0 and less than 1, not 1.0"),
    (lambda: models.MLP(dropout=math.nan), "dropout must be at least 0"),
    (lambda: models.MLP(norm="group"), "norm must be one of none, layer, batch, not 'group'"),
    (lambda: models.MLP(activation=None), "activation must be one of relu,"),
    (lambda: models.ViT(heads=5), "width must be a multiple of heads (5), not 192"),
    (lambda: models.ViT(mlp_ratio=0), "mlp_ratio must leave"),
    (lambda: models.create("vit", (1, 28, 28), 10, patch=8), "patch must divide the image (28x28)"),
    (lambda: models.create("mlp", (8, 8), 10), "shape must be three positive sizes"),
    (lambda: models.create("vgg", (1, 0, 8), 10), "shape must be three positive sizes"),
    (lambda: models.create("resnet", (1, 8, 8), 0), "classes must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("use", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_wrong_use_is_told_in_one_sentence(use, sentence):
    with pytest.raises(LayerwiseError) as caught:
        use()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("halvings", "sides"), [(0, [20, 20, 20]), (1, [20, 10, 10]), (2, [20, 10, 5]), (9, [20, 10, 5])]
)
def test_a_fully_convolutional_net_gives_a_map_of_the_size_of_the_image(halvings, sides):
    model = models.create("fcn", (3, 20, 24), 5, depth=3, width=4, halvings=halvings)
    h, found = torch.randn(2, 3, 20, 24), []
    for name in model.block_names:
        h = getattr(model, name)(h)
        found.append(h.shape[2])
    assert found == sides and model.head(h).shape == (2, 5, 20, 24)
