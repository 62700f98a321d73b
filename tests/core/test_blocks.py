"""A partition computes what the model computes, owns what it owns, and refuses what cannot be cut."""

import contextlib
import copy
import io
import itertools
import pickle
import pickletools

import pytest
import torch
from support.nets import net, same_bits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerwise import LayerwiseError, Learner, Partition, create_rule, cut_at_calls, legal_cuts, partition, replace

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def chain():
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )  # fmt: skip


def nested():
    first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    second = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    return nn.Sequential(first, second, nn.Linear(8, 3))


def shared_activation():
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(6, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 3))


class Unit(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, h):
        return torch.relu(self.norm(self.inner(h)) + h)


class Residual(nn.Module):
    """Not a Sequential: functional code between the modules, a stage that is one, default arguments."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.stage = nn.Sequential(Unit(8), Unit(8))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 3)

    def forward(self, x, mask=None, scale=2.0, flip=False, names=()):
        h = self.stem(x).tanh() * scale
        if mask is not None:
            h = h * mask
        h = self.stage(h)
        h = self.drop(h.flip(-1) if flip else h)
        return self.fc(h)


class Tokens(nn.Module):
    """Parameters of the root itself: a class token at the front, a scale in the middle."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 4, 4))
        self.mix = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.gain = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x.unflatten(1, (3, 2)))
        h = torch.cat([self.cls.expand(h.size(0), -1, -1), h], 1) + self.position
        return self.head(self.mix(h)[:, 0] * self.gain)


CUT = {
    "chain": (chain, None),
    "chain by layer": (chain, "layer"),
    "shared activation": (shared_activation, None),
    "nested": (nested, None),
    "nested by layer": (nested, "layer"),
    "nested, named": (nested, ["0.1", "1.0"]),
    "outside and inside of a container": (nested, ["0", "1.1"]),
    "traced": (Residual, ["stem", "stage"]),
    "traced, inside a stage": (Residual, ["stage.0", "drop"]),
    "root parameters": (Tokens, ["mix"]),
    "root parameters in both parts": (Tokens, ["embed", "mix"]),
}
MODELS = {
    "mlp": ["block1", "block2.linear"],
    "vgg": ["block1.norm"],
    "resnet": ["block1.stem", "block2"],
    "vit": ["block1", "block2.attn"],
}


@pytest.fixture(params=[*CUT, *MODELS])
def case(request):
    """A model, its partition, an input."""
    torch.manual_seed(3)
    if request.param in MODELS:
        dropout = {} if request.param == "resnet" else {"dropout": 0.2}
        model = net(request.param, **dropout)
        return model, partition(model, MODELS[request.param]), torch.randn(5, 1, 8, 8)
    make, cuts = CUT[request.param]
    model = make()
    return model, partition(model, cuts), X


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_partition_computes_the_models_bits(case, mode):
    model, parts, x = case
    twin = copy.deepcopy(model).train(mode == "train")
    parts.train(mode == "train")
    torch.manual_seed(5)
    expected = twin(x)
    torch.manual_seed(5)
    assert torch.equal(parts(x), expected)
    assert same_bits(model, twin)  # running statistics too


def test_gradients_are_the_models_bits(case):
    model, parts, x = case
    twin = copy.deepcopy(model)
    for module in (twin, parts):
        torch.manual_seed(5)
        module(x).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_every_parameter_belongs_to_exactly_one_part(case):
    model, parts, _ = case
    owned = [name for part in [*parts.blocks, parts.head] for name, _ in part.named_parameters()]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())
    owned = [name for part in [*parts.blocks, parts.head] for name, _ in part.named_buffers()]
    assert sorted(owned) == sorted(name for name, _ in model.named_buffers())


def test_a_parts_gradient_reaches_its_own_parameters_only(case):
    model, parts, h = case
    for part in [*parts.blocks, parts.head]:
        h = part(h.detach())
        h.sum().backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {name for name, _ in part.named_parameters()}
        model.zero_grad()


def test_state_dict_keys_are_the_models(case):
    model, parts, _ = case
    assert list(parts.state_dict()) == list(model.state_dict())
    assert [n for n, _ in parts.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(parts.parameters(), model.parameters(), strict=True))


def test_it_moves_with_the_model(case):
    model, parts, x = case
    parts.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert all(p.dtype == torch.float64 for part in parts.blocks for p in part.parameters())
    assert parts.eval()(x.double()).dtype == torch.float64
    model.to(torch.float32)
    assert parts(x).dtype == torch.float32


def test_a_pickle_gives_the_same_function_and_holds_no_code(case):
    _, parts, x = case
    data = pickle.dumps(parts)
    back = pickle.load(io.BytesIO(data))
    assert torch.equal(back.eval()(x), parts.eval()(x))
    assert [str(block) for block in back.blocks] == [str(block) for block in parts.blocks]
    words = " ".join(str(argument) for _, argument, _ in pickletools.genops(data))
    assert not [word for word in ("torch.fx", "Graph", "Interpreter", "_Chain") if word in words]


def test_a_deep_copy_shares_nothing(case):
    _, parts, x = case
    twin = copy.deepcopy(parts)
    expected = parts.eval()(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.5)
    assert not torch.equal(twin.eval()(x), expected)
    assert torch.equal(parts(x), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in parts.parameters()}


def test_a_partition_is_its_own_partition():
    parts = partition(chain())
    assert partition(parts) is parts


def names(parts):
    return [block.name for block in parts.blocks]


def test_children_without_a_matrix_join_the_block_before_them():
    assert names(partition(chain())) == ["3", "5"]
    owned = [name for name, _ in partition(chain()).blocks[0].named_parameters()]
    assert owned == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_leading_child_without_parameters_joins_the_first_block():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert names(partition(model)) == ["2"]


def test_containers_are_blocks_and_layer_opens_them():
    assert names(partition(nested())) == ["0", "1"]
    assert names(partition(nested(), "layer")) == ["0.2", "1.1", "1.2"]


def test_cuts_may_be_one_string():
    assert names(partition(nested(), "0.2, 1.0")) == ["0.2", "1.0"]


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_a_model_that_names_its_blocks_is_cut_there(kind):
    assert names(partition(net(kind, depth=4))) == ["block1", "block2", "block3", "block4"]


def test_layer_cuts_inside_the_models_blocks_and_leaves_the_head_whole():
    model = net("vit", depth=2)
    parts = partition(model, "layer")
    assert names(parts)[-1] == "block2"
    assert names(parts)[-2] == "block2.attn"
    heads = [name for name, _ in parts.head.named_parameters()]
    assert heads == [name for name, _ in model.named_parameters() if name.startswith("head.")]


def test_a_traced_model_may_name_its_blocks():
    model = Residual()
    model.block_names = ["stem", "stage"]
    assert names(partition(model)) == ["stem", "stage"]


def widths(sizes):
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sizes", [(6, 9, 2, 7, 7, 30, 3, 2), (6, 1, 50, 50, 1, 1, 8, 3)])
def test_balanced_blocks_have_the_smallest_possible_maximum(blocks, sizes):
    model = widths(sizes)
    cost = [a * b for a, b in itertools.pairwise(sizes)][:-1]  # the head is not a block

    def largest(ends):
        return max(sum(cost[a:b]) for a, b in itertools.pairwise([0, *ends, len(cost)]))

    best = min(map(largest, itertools.combinations(range(1, len(cost)), blocks - 1)))
    parts = partition(model, blocks=blocks, example=X)
    assert len(parts.blocks) == blocks
    assert largest([int(name) + 1 for name in names(parts)[:-1]]) == best
    assert names(parts)[-1] == str(len(cost) - 1)


def test_balancing_counts_what_torch_counts_and_changes_nothing():
    model, x = net("vgg", depth=5, dropout=0.5), torch.randn(2, 1, 8, 8)
    before, generator = copy.deepcopy(model), torch.get_rng_state()
    parts = partition(model, blocks=2, example=x)
    assert same_bits(model, before)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    costs, h = [], x
    for name in model.block_names:
        with FlopCounterMode(display=False) as counter:
            h = model.get_submodule(name)(h)
        costs.append(counter.get_total_flops())
    ends = {name: i + 1 for i, name in enumerate(model.block_names)}
    chosen = ends[names(parts)[0]]
    largest = [max(sum(costs[:end]), sum(costs[end:])) for end in range(1, 5)]
    assert largest[chosen - 1] == min(largest)


def test_legal_cuts_are_exactly_the_places_where_a_cut_works():
    """The list against the deed: every module name is tried."""
    for make in (chain, nested, shared_activation, Residual, Tokens):
        model = make()
        works = []
        for name, _ in model.named_modules(remove_duplicate=False):
            with contextlib.suppress(LayerwiseError):
                partition(model, [name])
                works.append(name)
        listed = legal_cuts(model)
        assert set(listed) <= set(works)
        cuttable = partition if isinstance(model, nn.Sequential) else cut_at_calls
        assert legal_cuts(cuttable(model, listed[:1])) == listed
        # A Sequential lists the innermost names; a container's own name is a cut as well.
        assert set(works) - set(listed) <= {name for name, m in model.named_modules() if isinstance(m, nn.Sequential)}


def test_no_legal_cut_lies_inside_a_skip():
    cuts = legal_cuts(Residual())
    assert "stem" in cuts
    assert "stage.0" in cuts
    assert not [cut for cut in cuts if "inner" in cut or "norm" in cut]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, h):
        return self.linear(h), h


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, pair):
        return self.linear(pair[0])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.idle, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(self.a(x)))


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


WRONG = [
    (tied(), {}, "'0.weight' of block '1' is shared with block '3'", True),
    (chain(), {"cuts": ["lin1"]}, "unknown cut 'lin1'", True),
    (chain(), {"cuts": [""]}, "unknown cut ''", True),
    (chain(), {"cuts": []}, "at least one cut", True),
    (chain(), {"cuts": ["3", "3"]}, "named twice", False),
    (chain(), {"cuts": ["5", "3"]}, "give them as ['3', '5']", False),
    (chain(), {"cuts": ["6"]}, "no head", True),
    (Residual(), {}, "say where to cut", True),
    (Residual(), {"cuts": ["stage", "stem"]}, "give them as ['stem', 'stage']", False),
    (Residual(), {"cuts": ["stage.0.inner"]}, "skip connection", True),
    (Residual(), {"cuts": ["fc"]}, "no head", True),
    (Residual(), {"cuts": "layer"}, "needs a nn.Sequential", True),
    (Branching(), {"cuts": ["a"]}, "cannot be traced", False),
    (Twice(), {"cuts": ["a"]}, "called more than once", False),
    (Twice(), {"cuts": ["idle"]}, "is not called", False),
    (nn.Sequential(nn.Linear(6, 3), nn.ReLU()), {}, "at least two", False),
    (chain(), {"blocks": 0}, "1 to 2 blocks", False),
    (chain(), {"blocks": 3}, "1 to 2 blocks", False),
    (widths((6, 5, 4, 3, 2)), {"blocks": 2}, "give example", False),
]  # fmt: skip


@pytest.mark.parametrize(("model", "how", "sentence", "lists"), WRONG, ids=[w[2] for w in WRONG])
def test_what_cannot_be_cut_is_told_in_one_sentence(model, how, sentence, lists):
    with pytest.raises(LayerwiseError) as error:
        partition(model, **how)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    if lists:
        assert ", ".join(legal_cuts(model)) in str(error.value)


def test_a_block_that_returns_a_tuple_is_told_in_one_sentence():
    model = nn.Sequential(nn.Linear(6, 6), Pair(), First())
    with pytest.raises(LayerwiseError, match=r"block '1' returns tuple, not one tensor.*: 0, 1"):
        partition(model)(X)
    assert torch.equal(partition(model, ["0"])(X), model(X))


def test_a_model_that_cannot_be_traced_says_how_to_write_it():
    with pytest.raises(LayerwiseError, match=r"Branching\.forward .* wrap the model as nn\.Sequential"):
        Partition(Branching(), ["a"])
    assert legal_cuts(Branching()) == []


def test_a_module_replaced_after_the_cut_is_noticed():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    parts = partition(model)
    model[2] = nn.Linear(8, 8)
    with pytest.raises(LayerwiseError, match="module '2' was replaced"):
        Learner(parts).step(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))
    assert Learner(partition(model)).step(torch.randn(4, 4), torch.tensor([0, 1, 0, 1])).read()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: setattr(model[-1].weight, "data", model[-1].weight.data.t().contiguous().t()),
        lambda model: setattr(model[-1].weight, "data", torch.zeros(200, 8)),
        lambda model: setattr(model[-1].weight, "data", torch.zeros(1, 8).expand(4, 8)),
    ],
)
def test_a_parameter_that_is_laid_out_anew_is_refused(change):
    """torch's fused optimizers would write outside their memory, or pair the moments of other weights."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    learner = Learner(model, "backprop")
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    learner.step(x, y)
    change(model)
    with pytest.raises(LayerwiseError, match="which its optimizer does not know"):
        learner.step(x, y)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda cut: cut(chain(), 3), "cuts is of type int"),
        (lambda cut: cut(chain(), [0]), "cuts are names of modules; give words"),
        (lambda cut: cut(chain(), ["0", "2"], blocks="1"), "blocks is '1'; it must be a whole number"),
        (lambda cut: cut(chain(), ["0", "2"], blocks=1.5), "blocks is 1.5"),
        (lambda cut: cut(chain(), ["0"], layout=3), "layout is of type int"),
        (lambda cut: cut(chain(), ["0"], layout={"0": 3}), "layout maps block names"),
        (lambda cut: legal_cuts(3), "the model is a int"),
        (lambda cut: replace(3, "mask_relu"), "the model is a int"),
        (lambda cut: replace(chain(), 3), "what to replace is of type int"),
        (lambda cut: create_rule(3), "the rule is 3; give its name"),
    ],
)
@pytest.mark.parametrize("cut", [partition, cut_at_calls])
def test_arguments_of_another_type_are_refused(cut, call, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        call(cut)
