"""Replaced modules of a model: the forward pass, the paper's formula of the gradient, and what a batch stores."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.kept import kept_bytes
from support.nets import batches
from support.own import decoder, text
from torch import nn
from torch.nn.utils import prune

from layerwise import LanguageModel, LayerwiseError, Learner, models, replace, replacements
from layerwise.compare.peak import PeakProblem
from layerwise.compare.rules_asked import read_rules
from layerwise.replacements import ApproxGELU, ApproxSiLU, MaskReLU, MSLayerNorm, MSRMSNorm, VeLoRALinear
from layerwise.runs.options import TrainOptions

CONSTANTS = {  # of the paper's code: thresholds c and jumps a
    ApproxGELU: (
        (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
        (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
    ),
    ApproxSiLU: (
        (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
        (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
    ),
    MaskReLU: ((0.0,), (1.0,)),
}
EXACT = {ApproxGELU: F.gelu, ApproxSiLU: F.silu, MaskReLU: F.relu}


def gradient_of(function, x, dy):
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, dy)[0]


@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("shape", [(1,), (7, 5), (2, 3, 4, 5), (9, 64)])
def test_the_gradient_is_a_step_function_of_the_input(kind, shape):
    thresholds, jumps = CONSTANTS[kind]
    x, dy = 4 * torch.randn(shape), torch.randn(shape)
    for given in (x, x.transpose(0, -1)):
        out, found = gradient_of(kind(), given, dy.reshape(given.shape))
        step = sum(a * (given > c) for a, c in zip(jumps, thresholds, strict=True))
        assert torch.equal(out, EXACT[kind](given))
        assert torch.allclose(found, dy.reshape(given.shape) * step, atol=1e-6)


def test_the_gradient_points_the_way_of_the_exact_one():
    """ReLU's is exact; of 2 bits the cosine on normal numbers is that of the approximation, 0.95 for GELU."""
    x, dy = torch.randn(100_000), torch.randn(100_000)
    x[0] = 0.0
    cosines = {
        kind: F.cosine_similarity(gradient_of(kind(), x, dy)[1], gradient_of(EXACT[kind], x, dy)[1], dim=0).item()
        for kind in CONSTANTS
    }
    assert torch.equal(gradient_of(MaskReLU(), x, dy)[1], gradient_of(F.relu, x, dy)[1])
    assert cosines[ApproxGELU] == pytest.approx(0.947, abs=0.005)
    assert cosines[ApproxSiLU] > 0.9


@pytest.mark.parametrize(("kind", "per_byte"), [(ApproxGELU, 4), (ApproxSiLU, 4), (MaskReLU, 8)])
def test_what_is_kept_are_bits(kind, per_byte):
    x = torch.randn(32, 64)
    assert kept_bytes(kind(), x) == x.numel() // per_byte
    assert kept_bytes(EXACT[kind], x) == x.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_have_the_gradient_of_torchs_from_their_output(dtype):
    x, dy = 3 + torch.randn(4, 6, 32, dtype=dtype), torch.randn(4, 6, 32, dtype=dtype)
    for own, torchs in (
        (MSLayerNorm(32), partial(F.layer_norm, normalized_shape=(32,), eps=1e-5)),
        (MSRMSNorm(32), partial(F.rms_norm, normalized_shape=(32,), eps=1e-5)),
    ):
        (out, found), (wanted, exact) = gradient_of(own, x, dy), gradient_of(torchs, x, dy)
        assert torch.allclose(out, wanted, atol=1e-12 if dtype == torch.float64 else 1e-6)
        assert torch.allclose(found, exact, atol=1e-10 if dtype == torch.float64 else 1e-5)


def test_a_norm_and_the_layer_after_it_keep_one_tensor():
    x, linear = torch.randn(8, 64), nn.Linear(64, 64)
    own, torchs = nn.Sequential(MSLayerNorm(64), linear), nn.Sequential(nn.LayerNorm(64), linear)
    whole, rows = 8 * 64 * 4, 8 * 4
    assert kept_bytes(torchs, x) == 2 * whole + 2 * rows
    assert kept_bytes(own, x) == whole + rows


def drawn(model):
    """Scale and shift as training leaves them."""
    for norm in (m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        if getattr(norm, "bias", None) is not None:
            nn.init.normal_(norm.bias)
    return model.eval()


def test_scale_and_shift_are_merged_into_the_linear_layers_that_read_them():
    """All norms of a ViT but that of its head, whose output is indexed; and those of a decoder that takes keywords."""
    x = torch.randn(2, 3, 8, 8)
    model = drawn(models.create("vit", (3, 8, 8), 5, depth=2, width=48))
    wanted = model(x)
    replace(model, "ms_norm", example=x)
    assert [type(m) for m in model.modules() if "Norm" in type(m).__name__] == [MSLayerNorm] * 4 + [nn.LayerNorm]
    assert torch.allclose(model(x), wanted, atol=1e-5)
    given = {name: value for name, value in text().items() if name != "labels"}
    for tie, count in ((True, 6), (False, 7)):  # a head that is the embedding too cannot take a scale
        model = drawn(decoder(depth=3, tie=tie))
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is None):
            if not tie:
                linear.bias = nn.Parameter(torch.zeros(linear.out_features))
        wanted = model(**given)["logits"]
        replace(model, "ms_norm", example=given)
        assert sum(isinstance(m, MSLayerNorm) for m in model.modules()) == count
        assert torch.allclose(model(**given)["logits"], wanted, atol=1e-5)


class PostNorm(nn.Module):
    """The output of the norm is also added to what comes after."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return x + self.linear(x)


def test_a_norm_that_something_else_reads_stays():
    with pytest.raises(LayerwiseError, match="ms_norm finds no module of PostNorm that it can replace"):
        replace(PostNorm(), "ms_norm", example=torch.randn(2, 8))
    with pytest.raises(LayerwiseError, match="ms_norm has to find the readers of each norm"):
        replace(PostNorm(), "ms_norm")


def test_velora_has_the_gradients_of_its_paper():
    torch.manual_seed(0)
    groups, scale = 4, 0.5
    layer = VeLoRALinear.of(nn.Linear(16, 6), groups=groups, scale=scale)
    first, x = torch.randn(5, 3, 16) + 1, torch.randn(2, 7, 16)
    layer(first)
    v = first.view(-1, 4).mean(0)
    v = v / v.norm()
    assert torch.allclose(layer.direction, v, atol=1e-6)
    x.requires_grad_()
    out, dy = layer(x), torch.randn(2, 7, 6)
    dx, dw, db = torch.autograd.grad(out, [x, layer.weight, layer.bias], dy)
    assert torch.allclose(layer.direction, v, atol=1e-6)  # that of the first batch stays
    assert torch.equal(out, F.linear(x, layer.weight, layer.bias))
    rebuilt = ((x.detach().view(-1, groups, 4) @ v).half().float()[..., None] * v).view(-1, 16)
    assert torch.allclose(dx, dy @ layer.weight, atol=1e-6)
    assert torch.allclose(dw, scale * dy.view(-1, 6).T @ rebuilt, atol=1e-4)
    assert torch.allclose(db, dy.sum((0, 1)), atol=1e-5)
    assert kept_bytes(layer, x.detach()) == 2 * 7 * groups * 2 + layer.direction.nbytes


def test_velora_keeps_its_direction_through_states_and_other_modes():
    layer = VeLoRALinear.of(nn.Linear(8, 2), groups=2)
    layer.eval()(torch.ones(3, 8)).sum().backward()  # evaluation chooses none, and its gradient is exact
    assert not layer.direction.any()
    assert torch.equal(layer.weight.grad, torch.full((2, 8), 3.0))
    layer.train()(torch.randn(3, 8))
    other = VeLoRALinear(8, 2, groups=2)
    other(torch.randn(3, 8))
    other.load_state_dict(layer.state_dict())
    other(torch.randn(3, 8))
    assert torch.equal(other.direction, layer.direction)
    with pytest.raises(LayerwiseError, match="3 groups do not divide 8 inputs"):
        VeLoRALinear(8, 2, groups=3)


def test_modules_are_chosen_by_name_type_and_pattern():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 32), act, nn.Linear(32, 32), act, nn.GELU(), nn.Linear(32, 3))
    weight = model[2].weight
    replace(model, {nn.ReLU: "mask_relu", "2": partial(VeLoRALinear.of, groups=8), "4": lambda m: nn.Tanh()})
    assert [type(m) for m in model] == [nn.Linear, MaskReLU, VeLoRALinear, MaskReLU, nn.Tanh, nn.Linear]
    assert model[1] is model[3]
    assert model[2].weight is weight
    assert isinstance(replace(nn.GELU(), "approx_gelu"), ApproxGELU)
    alike = replace(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3)), "velora")
    assert [type(m) for m in alike] == [VeLoRALinear, nn.Linear]  # the last gives the outputs


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("approx_gelo", "unknown replacement 'approx_gelo'"),
        (
            "approx_gelu",
            "approx_gelu finds no module of Sequential that it can replace; it takes GELU modules, and cannot",
        ),
        ({"9": "mask_relu"}, "no module is called '9'"),
        ({nn.Conv2d: lambda m: m}, "Sequential holds no module that is chosen by 'Conv2d'"),
        ({3: "mask_relu"}, "replace cannot choose modules by 3"),
    ],
)
def test_wrong_replacements_are_refused_in_a_sentence(what, match):
    with pytest.raises(LayerwiseError, match=match):
        replace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), what)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("sll", {"micro": 2}),
        ("local_ce", {"offload": "disk"}),
        ("backprop", {"precision": "bf16"}),
        ("backprop_checkpoint", {}),
    ],
)
def test_a_model_with_all_of_them_is_trained_under_every_rule(rule, options):
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), *layers, nn.Linear(64, 10))
    x, y = batches(1)[0]
    replace(model, ["approx_gelu", "ms_norm", "mask_relu", "velora"], example=x)
    options |= {"lr": 0.01, "cuts": ["2", "5", "8", "11"]}
    fresh, learner = copy.deepcopy(model), Learner(model, rule, **options)
    losses = [float(learner.step(x, y).loss) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    continued = Learner(fresh, rule, **options)
    continued.step(x, y)
    continued.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert continued.step(x, y).read() == learner.step(x, y).read()


TWICE = {"approx_gelu": nn.GELU(), "approx_silu": nn.SiLU(), "mask_relu": nn.ReLU(), "ms_norm": nn.LayerNorm(32)}
TWICE |= {name: nn.Identity() for name in ("velora", "bi_mask", "binary", "biper", "sparse", "low_precision")}
TWICE["shared_bits"] = nn.Identity()


@pytest.mark.parametrize("name", TWICE)
def test_a_gradient_of_the_gradient_is_right_or_refused(name):
    """What keeps less for the backward pass has no graph of it, so that a second one would be of something else."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(32, 32), copy.deepcopy(TWICE[name]), nn.Linear(32, 32)).double()
    model = nn.Sequential(nn.Linear(32, 32), inner, nn.Linear(32, 3)).double()
    x = torch.randn(4, 32, dtype=torch.float64)
    model = replace(model, {"1.0": name} if name == "velora" else name, example=x) or model

    def gradient(x):
        torch.manual_seed(0)
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]

    if name not in ("binary", "biper", "shared_bits"):  # their weights are made by a graph
        with pytest.raises(LayerwiseError, match="has no gradient of its gradient"):
            gradient(x.requires_grad_())
        return
    v = torch.randn_like(x)
    (found,) = torch.autograd.grad(gradient(x.requires_grad_()).square().sum(), x)
    a, b = (gradient((x + e * v).detach().requires_grad_()).square().sum().detach() for e in (1e-6, -1e-6))
    assert float((found * v).sum()) == pytest.approx(float(a - b) / 2e-6, rel=1e-4)


def test_traced_models_and_ones_cut_at_their_calls_take_them():
    """A model whose own forward pass is traced into blocks; and one that is cut at its calls."""
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4) % 5
    vit = models.create("vit", (3, 8, 8), 5, depth=2, width=96)
    replace(vit, ["approx_gelu", "ms_norm", "velora"], example=x)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit

        def forward(self, x):
            return self.inner.head(self.inner.block2(self.inner.block1(x)))

    learner = Learner(Wrapped(), "local_ce", cuts=["inner.block1", "inner.block2"], lr=1e-3)
    losses = [float(learner.step(x, y).loss) for _ in range(8)]
    assert losses[-1] < losses[0]
    given = text()
    own = replace(decoder(depth=2), "ms_norm", example={k: v for k, v in given.items() if k != "labels"})
    learner = Learner(own, "local_ce", cuts="layers.*", task=LanguageModel(), micro=2)
    learner.step(given)
    assert replacements.names()[0] == "approx_gelu"


@pytest.mark.filterwarnings("ignore:running statistics")
def test_a_row_of_a_comparison_names_what_is_replaced():
    common = TrainOptions(model=models.ViT(depth=2, width=48, patch=4), steps=2, device="cpu")
    found = read_rules(["sll+approx_gelu+ms_norm:lr=0.01,sll"], common)
    options = found["sll+approx_gelu+ms_norm:lr=0.01"]
    assert (options.rule, options.lr) == (found["sll"].rule, 0.01)
    problem = PeakProblem.of(options)
    model = problem.learner(options).network.model
    assert sum(isinstance(m, ApproxGELU) for m in model.modules()) == 2
    assert sum(isinstance(m, MSLayerNorm) for m in model.modules()) == 4
    plain = problem.learner(found["sll"]).network.model
    assert not any(isinstance(m, (ApproxGELU, MSLayerNorm)) for m in plain.modules())
    for word in ("sll+approx_gelo", "sll+"):
        with pytest.raises(LayerwiseError, match="unknown replacement"):
            read_rules([word], common)


def dense():
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)), nn.ReLU(), nn.Linear(32, 5))


LINEAR = [name for name, kind in replacements.replacing.REPLACEMENTS.items() if nn.Linear in kind.kinds]


@pytest.mark.parametrize("name", ["ms_norm", *LINEAR])
@pytest.mark.parametrize("first", [True, False])
def test_torchs_transformer_layers_run_their_replaced_parts_in_evaluation_too(name, first):
    """Without a graph torch takes another path there, which reads the parts' weights and does not run the parts."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5))
    x = torch.randn(2, 6, 32)
    model = replace(model, name, example=x).eval()
    torch.manual_seed(0)
    expected = model(x).detach()
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", LINEAR)
def test_a_layer_with_hooks_is_not_replaced_by_one_without_them(name):
    """Those of weight norm, spectral norm and pruning compute the weight."""
    for add in (
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
        lambda layer: layer.register_forward_hook(lambda *_: None),
    ):
        model = dense()
        add(model[1])
        with pytest.raises(LayerwiseError, match="'1' has hooks"):
            replace(model, name)
        assert all(type(layer) is nn.Linear for layer in (*model[:3], model[4]))


def test_a_weight_that_is_shared_stays_shared():
    model = dense()
    model[2].weight = model[0].weight
    for name in LINEAR:
        found = replace(copy.deepcopy(model), name)
        assert found[2].weight is found[0].weight and type(found[1]) is not nn.Linear
    with pytest.raises(LayerwiseError, match="'0' shares its weight"):
        replace(model, {"0": "sparse"})


@pytest.mark.parametrize("what", ["sparse", {"0": "sparse"}, "ms_norm"])
def test_weights_that_are_not_there_yet_are_neither_chosen_nor_merged(what):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(LayerwiseError, match="meta device"):
        replace(model, what, example=torch.randn(2, 8, device="meta"))
    assert [type(layer) for layer in model] == [nn.Linear, nn.LayerNorm, nn.Linear, nn.ReLU, nn.Linear]


def test_what_cannot_be_done_is_refused_before_anything_is_replaced():
    wrong = (["mask_relu", "mask_rely"], {nn.ReLU: "mask_relu", "9": "binary"}, {nn.ReLU: lambda _: None}, 3, None)
    for what in wrong:
        model = dense()
        with pytest.raises(LayerwiseError):
            replace(model, what)
        assert type(model[3]) is nn.ReLU
    with pytest.raises(LayerwiseError, match="the model is a int"):
        replace(3, "mask_relu")
    attention = nn.Sequential(nn.MultiheadAttention(32, 4))
    with pytest.raises(LayerwiseError, match="never runs it"):
        replace(attention, {"0.out_proj": VeLoRALinear.of})
