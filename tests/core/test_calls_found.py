"""Where models of other people are cut automatically, and which block trains the modules between the cuts."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.own import VOCABULARY, decoder, text
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, Regression, Segmentation, cut_at_calls, rules
from layerwise.core.cut_names import automatic_cuts
from layerwise.core.tasks import Classification

PLAIN = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.0}


class Conv(nn.Module):
    """A block of another width than the one before it, with convolutions of one class inside."""

    def __init__(self, inside, width):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(inside, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return self.convs(x).relu()


class Stage(nn.Module):
    def __init__(self, inside, width, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Conv(width if i else inside, width) for i in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Pyramid(nn.Module):
    """Stages of blocks, with a class per sample."""

    def __init__(self, *depths):
        super().__init__()
        widths = [3, 4, 6, 8]
        self.stages = nn.ModuleList(Stage(widths[i], widths[i + 1], depth) for i, depth in enumerate(depths))
        self.head = nn.Linear(widths[len(depths)], 4)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class Experts(nn.Module):
    """A layer that holds a list itself."""

    def __init__(self, width=8, count=5):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x):
        return x + sum(expert(x) for expert in self.experts).relu()


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_stages_are_looked_into_and_layers_are_not():
    assert automatic_cuts(Pyramid(2, 3)) == [f"stages.{i}.blocks.{j}" for i, n in enumerate((2, 3)) for j in range(n)]
    assert automatic_cuts(Pyramid(1, 1, 1)) == ["stages.0", "stages.1", "stages.2"]  # no two blocks are alike
    assert automatic_cuts(Layers(Experts(), Experts())) == ["layers.0", "layers.1"]
    assert automatic_cuts(Layers(Experts(count=2), Experts(), Experts())) == ["layers.0", "layers.1", "layers.2"]
    deep = [Experts(), Experts()]
    for layer in deep:
        layer.experts = nn.ModuleList(Conv(3, 3) for _ in range(5))
    assert automatic_cuts(Layers(*deep)) == ["layers.0", "layers.1"]
    separate = nn.ModuleDict({f"layer{i}": nn.Sequential(Conv(3, 3)) for i in range(3)})
    assert automatic_cuts(separate) == ["layer0.0", "layer1.0", "layer2.0"]
    stages = (nn.Sequential(Conv(3, 3), between, Experts(count=1)) for between in (nn.ReLU(), Conv(3, 3)))
    assert automatic_cuts(nn.Sequential(*stages)) == ["0.0", "0.2", "1.0", "1.1", "1.2"]  # not layers inside
    apart = nn.ModuleList(nn.ModuleList(Conv(3, 3) for _ in range(count)) for count in (1, 2, 2))
    tables = nn.ModuleList(nn.Embedding(3, 3) for _ in range(9))
    nested = nn.ModuleDict({"tables": tables, "patches": nn.ModuleList(Experts() for _ in range(4)), "blocks": apart})
    assert automatic_cuts(nested) == [f"blocks.{i}.{j}" for i, count in enumerate((1, 2, 2)) for j in range(count)]
    with pytest.raises(LayerwiseError, match="no list of blocks"):
        automatic_cuts(nn.ModuleDict({"one": nn.Sequential(nn.ReLU()), "two": nn.Linear(1, 1)}))


class Named(nn.Module):
    """Layers that are attributes, called in the order given; others are not called, or several times."""

    def __init__(self, order="abc", held="abc"):
        super().__init__()
        for name in held:
            setattr(self, name, nn.Linear(8, 8))
        self.order = order

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x).relu()
        return x


class Parts(nn.Module):
    """Two chains, one after the other."""

    def __init__(self, *chains):
        super().__init__()
        self.features, self.classifier = chains

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Mixed(nn.Module):
    """A list of layers of two classes, with activations between them; the last one gives the outputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(8, 8), nn.ReLU(), Experts(), nn.LayerNorm(8), Experts(), nn.Linear(8, 4)]
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Within(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


WITHOUT_CUTS = {
    "attributes": (Named(), ["a", "b"]),
    "another order": (Named("bca"), ["b", "c"]),
    "not called": (Named("abc", held="dabc"), ["a", "b"]),
    "two layers": (Named("ab", held="ab"), ["a"]),
    "called twice": (Named("adbdc", held="dabc"), ["a", "b"]),
    "inside another": (Within(Named()), ["net.a", "net.b"]),
    "two chains": (
        Parts(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)),
        ),
        ["features.0", "features.2", "classifier.0"],
    ),
    "a list": (Layers(nn.Linear(8, 8), nn.Linear(8, 8)), ["layers.0", "layers.1"]),
    "several classes": (Mixed(), ["layers.0", "layers.2", "layers.4"]),
}


@pytest.mark.parametrize("kind", WITHOUT_CUTS)
def test_cuts_that_are_left_out_are_found(kind):
    """In the order of the calls, and up to the last one that has parameters behind it, which are the head's."""
    torch.manual_seed(0)
    model, cuts = WITHOUT_CUTS[kind]
    model, named = copy.deepcopy(model), copy.deepcopy(model)
    x, y = torch.randn(8, 8), torch.arange(8) % 4
    found, asked = Learner(model, "local_ce", **PLAIN), Learner(cut_at_calls(named, cuts), "local_ce", **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind == "not called" else "error")
        for learner in (found, asked):
            learner.step(x, y)
    assert list(found.network.cuts) == cuts
    assert [line.split(":")[0] for line in found.network.describe().splitlines()[: len(cuts)]] == cuts
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), named.parameters(), strict=True))
    assert found.network.head.parameters()


def test_a_layer_that_is_called_again_and_again_is_refused_with_what_to_write():
    class Shared(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(count)), nn.Linear(8, 4)

        def forward(self, x):
            for _ in range(3):
                for layer in self.layers:
                    x = layer(x).relu()
            return self.head(x)

    x = torch.randn(8, 8)
    with pytest.raises(LayerwiseError, match="called again and again is no block, but a module that holds all"):
        Learner(Shared(2), "local_ce", example=x)
    with pytest.raises(LayerwiseError, match=r"'net.layers' holds a single module; .* such as cuts=\['net'\]"):
        Learner(nn.ModuleDict({"net": Shared(1), "head": nn.Linear(8, 4)}), "local_ce")


def test_what_gives_the_outputs_is_the_head():
    x, y = torch.randn(8, 8), torch.arange(8) % 4
    learner = Learner(Mixed(), "local_ce", cuts="layers.[245]", lr_multipliers={"layers.2": 0.5, "head": 2.0})
    learner.step(x, y)
    assert list(learner.network.cuts) == ["layers.2", "layers.4"]
    with pytest.raises(LayerwiseError, match="no head; leave it out"):
        Learner(cut_at_calls(Mixed(), ["layers.2", "layers.5"]), "local_ce").step(x, y)
    with pytest.raises(LayerwiseError, match=r"layers\.5"):
        Learner(Mixed(), "local_ce", cuts="layers.[245]", lr_multipliers={"layers.5": 0.5}).step(x, y)


@pytest.mark.parametrize(("blocks", "cuts"), [(1, [4]), (2, [0, 4]), (3, [0, 2, 4])])
@pytest.mark.parametrize("asked", ["auto", "layers.[0245]"])
def test_as_many_blocks_are_kept_as_are_asked_for_where_the_last_layer_is_the_head(asked, blocks, cuts):
    learner = Learner(Mixed(), "local_ce", cuts=asked, blocks=blocks, example=torch.randn(8, 8))
    assert list(learner.network.cuts) == [f"layers.{i}" for i in cuts]
    with pytest.raises(LayerwiseError, match="blocks=4 is not possible: there are 3 cuts"):
        Learner(Mixed(), "local_ce", cuts=asked, blocks=4, example=torch.randn(8, 8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copy_made_before_the_first_batch_finds_the_same_cuts(copied):
    learner = copied(Learner(Mixed(), "local_ce", **PLAIN))
    learner.step(torch.randn(8, 8), torch.arange(8) % 4)
    assert list(learner.network.cuts) == ["layers.0", "layers.2", "layers.4"]


class Turned(nn.Module):
    """The list that is called first is held last."""

    def __init__(self):
        super().__init__()
        self.later, self.earlier = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.between, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.earlier:
            x = layer(x).relu()
        x = self.between(x)
        for layer in self.later:
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("cuts", ["auto", ["later.*", "earlier.*"], "later.*,earlier.*"])
def test_lists_are_put_in_the_order_of_their_calls(cuts):
    torch.manual_seed(0)
    model = Turned()
    plain, x, y = copy.deepcopy(model), torch.randn(8, 8), torch.arange(8) % 4
    learner = Learner(model, "local_ce", cuts=cuts, **PLAIN)
    learner.step(x, y)
    order = ["earlier.0", "earlier.1", "later.0", "later.1"]
    assert list(learner.network.cuts) == order
    assert [block.name for block in learner.network.blocks] == order
    named = cut_at_calls(plain, order)
    same = Learner(named, "local_ce", **PLAIN)
    same.step(x, y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert "between.weight" in {name for name, _ in learner.network.blocks[2].named_parameters()}


def test_describe_names_a_list_that_nothing_cuts():
    def lines_of(cuts):
        return Learner(Turned(), "local_ce", cuts=cuts, example=torch.randn(8, 8)).network.describe().splitlines()

    said, lines = "holds the list 'later' of 2 modules, after which nothing is cut", lines_of("earlier.*")
    assert lines.index(f"  {said}") == lines.index("head: BC, 252 parameters") + 1  # 3 * 72 + 36
    assert not any("holds the list" in line for line in lines_of("auto"))


def test_names_one_by_one_are_an_order_of_the_owners():
    learner = Learner(cut_at_calls(Turned(), ["later.0", "earlier.0"]), "local_ce")
    with pytest.raises(LayerwiseError, match="not called before"):
        learner.step(torch.randn(8, 8), torch.arange(8) % 4)


# --- Positions without a label


@pytest.mark.parametrize("rule", ["sll", "svp", "sid"])
def test_tokens_without_a_label_teach_nothing(rule):
    """The same step whatever stands behind -100, and that of the shifted labels given position by position."""
    batch = text()
    hidden = batch["labels"].clone()
    hidden[1:, -3:] = -100
    following = F.pad(hidden[:, 1:], (0, 1), value=-100)
    learned = []
    for task, y in ((LanguageModel(), hidden), (LanguageModel(shift=False), following)):
        model = decoder(depth=3)
        learner = Learner(model, rule, cuts="layers.*", task=task, **PLAIN)
        learner.step({"tokens": batch["tokens"], "labels": y})
        learned.append(model)
    assert all(torch.equal(p, q) for p, q in zip(learned[0].parameters(), learned[1].parameters(), strict=True))
    assert not torch.equal(learned[0].head.weight, decoder(depth=3).head.weight)


@pytest.mark.parametrize("weights", [None, tuple(float(1 + i % 3) for i in range(VOCABULARY))])
def test_the_mean_over_predictions_leaves_out_those_without_a_label(weights):
    task = Classification(weights=weights).with_classes(VOCABULARY)
    each, y = torch.rand(6, 5), torch.randint(VOCABULARY, (6, 5))
    assert torch.allclose(task.average(each, y), task.average(each.flatten(), y.flatten()))
    hidden = torch.where(torch.rand(6, 5) < 0.4, -100, y)
    torch.testing.assert_close(task.average(each, hidden), task.average(each[hidden >= 0], y[hidden >= 0]))
    if weights is None:
        assert torch.equal(task.average(each, y), each.mean())


# --- What a step costs


def test_a_step_does_not_walk_the_model_block_by_block(monkeypatch):
    """The number of walks over all modules does not grow with the number of blocks."""
    walks = []
    walk = nn.Module.named_modules

    def counted(self, *args, **kwargs):
        if isinstance(self, Layers):
            walks.append(1)
        return walk(self, *args, **kwargs)

    found = []
    for depth in (2, 8):
        learner = Learner(Layers(*(nn.Linear(8, 8) for _ in range(depth))), "local_ce", cuts="auto")
        x, y = torch.randn(8, 8), torch.arange(8) % 4
        learner.step(x, y)
        with monkeypatch.context() as patched:
            patched.setattr(nn.Module, "named_modules", counted)
            walks.clear()
            learner.step(x, y)
        found.append(len(walks))
    assert found[0] == found[1]


def test_gradients_whose_norm_overflows_are_finite_all_the_same():
    """1e25 is a number of fp32, its square is none."""
    torch.manual_seed(0)
    model = Layers(nn.Linear(8, 8), nn.Linear(8, 8))
    options = {"optimizer": torch.optim.SGD, "lr": 1e-30, "weight_decay": 0.0}
    task = Regression()
    learner = Learner(model, "backprop", cuts="auto", task=task, **options)
    learner.step(torch.randn(8, 8), torch.full((8, 4), 1e18))
    steep = model.head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 1e8)
    learner.step(torch.randn(8, 8), torch.full((8, 4), 1e18))
    assert torch.isfinite(model.head.weight).all()
    assert not torch.equal(model.head.weight, steep)
    model.head.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), torch.inf))
    with pytest.raises(LayerwiseError, match="non-finite loss or gradient"):
        learner.step(torch.randn(8, 8), torch.randn(8, 4))


def test_a_step_keeps_no_sums_of_its_blocks():
    """They are of use over a whole split; in training they would grow with depth, by targets times blocks."""
    model = Layers(*(nn.Linear(8, 8) for _ in range(3)))
    learner = Learner(model, "local_ce", cuts="auto", task=Regression())
    x, y = torch.randn(8, 8), torch.randn(8, 4)
    assert learner.step(x, y).statistics == {}
    assert set(learner.evaluate(x, y).statistics) == {"layers.0", "layers.1", "head"}


def test_segmentation_has_the_bits_of_torchs_loss_on_maps():
    z = torch.randn(3, 4, 5, 6, requires_grad=True)
    y = torch.randint(4, (3, 5, 6)).masked_fill(torch.rand(3, 5, 6) < 0.3, -100)
    task = Segmentation().with_outputs(4)
    (mine,) = torch.autograd.grad(task.loss(z, y), z)
    (plain,) = torch.autograd.grad(F.cross_entropy(z, y), z)
    assert torch.equal(mine, plain)


def test_every_rule_that_leaves_labels_out_says_so():
    assert all(rules.get(name).unlabelled for name in ("sll", "svp", "sid", "local_ce", "mono_forward"))
