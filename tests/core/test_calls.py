"""Models cut at the calls of their own modules, against plain loops, traced cuts and a walk of the graph."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.coroutines import hooks
from support.nets import CLASSES, batches, made, net, same_bits
from support.own import Skips, Twists, decoder, text, vectors
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, cut_at_calls, rules
from layerwise.rules.local_ce import LocalCE

DATA = batches(3)
PLAIN = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.0}
ABLE = [made(name) for name in rules.names() if not rules.get(name).models and name != "pepita"]
"""Rules that take any block; PEPITA asks what layers a block is made of, and refuses those of calls."""
AGAIN = [
    rules.create("interlocking"),
    rules.create("sll", overlap=1),
    rules.create("backprop_checkpoint"),
    rules.create("zeroth_order"),
    rules.create("auglocal"),
    rules.create("layer_collaboration", gamma="all"),
]
"""Rules that run a block, or a copy of one, again."""


# --- The same bits


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("vgg", ["sll", "sid", "backprop", *AGAIN[:3]]), pytest.param("mlp", [*ABLE, *AGAIN], marks=pytest.mark.slow)],
)
def test_call_cuts_and_traced_cuts_give_the_same_bits(kind, asked):
    """Dropout included: the draws depend on seed, step and block, not on how the model is cut."""
    for rule in asked:
        learners = []
        for calls in (False, True):
            model = net(kind, dropout=0.2) if kind == "mlp" else net(kind)
            cut = cut_at_calls(model, model.block_names) if calls else model
            learners.append(Learner(cut, rule, lr=0.01))
        for x, y in DATA:
            seen = [learner.step(x, y).read() for learner in learners]
            assert seen[0] == seen[1], rule
        assert same_bits(learners[0].network, learners[1].network), rule
        held = [[*learner.auxiliary.state_dict().values()] for learner in learners]
        assert all(torch.equal(a, b) for a, b in zip(*held, strict=True)), rule
        x, y = DATA[0]
        assert torch.equal(learners[0](x), learners[1](x)), rule
        assert learners[0].evaluate(x, y).read() == learners[1].evaluate(x, y).read(), rule
        assert hooks(learners[1].network.model) == 0


def test_a_regular_model_runs_block_by_block_to_the_bits_of_backprop():
    """Masks, keywords, tuples, dropout: interlocking over all blocks, and recomputation, are backprop."""
    trained = []
    for rule in (rules.create("backprop"), rules.create("backprop_checkpoint"), rules.create("interlocking", n=4)):
        model = decoder(depth=4, dropout=0.3, tie=False)
        learner = Learner(model, rule, cuts="layers.*", task=LanguageModel(shift=False), **PLAIN)
        batches = [{**text(seed=seed), "labels": text(seed=seed)["tokens"]} for seed in range(3)]
        metrics = [learner.step(batch).blocks["head"]["loss"] for batch in batches]
        trained.append((metrics, model))
        assert learner.network.irregular == ""
        assert "regular: its blocks can be run one by one" in learner.network.describe()
        assert not any("forward" in vars(module) for module in model.modules())
    for metrics, model in trained[1:]:
        assert metrics == trained[0][0]
        assert same_bits(model, trained[0][1])


def test_a_stem_runs_once_per_step_where_the_head_runs_again():
    """Its batch norm would move twice, and its draws would shift those of the head."""

    class Stem(Twists):
        def __init__(self):
            super().__init__()
            self.stem, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x):
            x = self.drop(self.stem(x))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.drop(x))

    x, y = vectors()
    models = []
    for rule in (rules.create("backprop"), rules.create("interlocking", n=3)):
        torch.manual_seed(0)
        models.append(Stem())
        learner = Learner(models[-1], rule, cuts="layers.*", **PLAIN)
        for _ in range(2):
            learner.step(x, y)
    assert models[1].stem.num_batches_tracked == 2
    assert same_bits(*models)


class Steers(nn.Module):
    """Blocks that are not called with the output of the one before, or not with that alone."""

    def __init__(self, how):
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(4))
        self.head, self.how = nn.Linear(8, CLASSES), how
        if how == "gradient":
            self.side = nn.Linear(8, 8)

    def forward(self, x):
        side, kept = self.side(x) if self.how == "gradient" else x * 2, []
        for layer in self.layers:
            given = {
                "changed": lambda x: (x.relu(), side),
                "gradient": lambda x: (x, side),
                "earlier": lambda x: (x, kept[1] if len(kept) > 2 else side),
                "parameter": lambda x: (x, self.head.weight.sum().expand(x.shape) * 1),
                "cache": lambda x: (x, side, kept),
                "mode": lambda x: (x, side),
            }[self.how](x)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "mode"):
                x = layer(*given)
            kept.append(x.detach() if self.how == "earlier" else x)
        return self.head(x.float())


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x, other, kept=None):
        return super().forward(x + other + (0 if kept is None else len(kept)))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("changed", "'layers.1' does not get the output of the call before as it is"),
        ("gradient", "a gradient crosses with addmm float32"),
        ("earlier", "block 'layers.3' gives other bits"),
        ("parameter", "'layers.1' gets an argument that depends on parameters outside it"),
        ("cache", "block 'layers.1' gives other bits"),
        ("mode", "gives other bits"),
    ],
)
def test_a_model_that_is_not_regular_is_refused_with_the_reason(how, why):
    x, y = vectors()
    with pytest.raises(LayerwiseError, match=f"'interlocking' runs blocks in two groups.*{why}.*choose a rule"):
        Learner(Steers(how), "interlocking", cuts="layers.*").step(x, y)
    learner = Learner(Steers(how), "local_ce", cuts="layers.*", example=x)  # which is trained all the same
    assert f"not regular: {learner.network.irregular}" in learner.network.describe()
    learner.step(x, y)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"precision": "bf16"}, {"clip": 0.1}, {"precision": "fp16"}])
def test_call_cuts_and_traced_cuts_agree_under_every_option(options):
    learners = [Learner(m, "sll", **options) for m in (net(), cut_at_calls(net(), net().block_names))]
    for x, y in DATA:
        for learner in learners:
            learner.step(x, y)
    assert [learner.flush() for learner in learners] == [options.get("accumulate") == 2] * 2
    assert same_bits(*learners)


@pytest.mark.parametrize("make", [decoder, lambda: decoder(tie=False)])
def test_backprop_on_an_unmodified_model_is_the_plain_loop(make):
    model, plain = make().train(), make().train()
    learner = Learner(model, "backprop", cuts="layers.*", task=LanguageModel(), **PLAIN)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for seed in range(3):
        batch = text(seed=seed)
        learner.step(batch)
        logits = plain(batch["tokens"], attention_mask=batch["attention_mask"])["logits"]
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        F.cross_entropy(logits.flatten(0, 1), following.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(model, plain)


def test_prediction_is_the_models_own_output_in_evaluation_mode():
    model, batch = decoder(dropout=0.5), text()
    learner = Learner(model, "local_ce", cuts="auto", task=LanguageModel(), example=batch)
    learner.step(batch)
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(learner(batch), copy.deepcopy(model).eval()(**given)["logits"])
    assert torch.equal(learner(given), learner(batch))
    assert model.training


# --- Locality and memory


class Walks(LocalCE):
    """Local cross-entropy that walks the graph of every signal down to its leaves."""

    def signal(self, ctx):
        signal = super().signal(ctx)
        if ctx.training and signal.loss is not None:
            waiting, seen = [signal.loss.grad_fn], set()
            while waiting:
                node = waiting.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                if hasattr(node, "variable"):
                    REACHED.setdefault(ctx.site.index, set()).add(id(node.variable))
                waiting += [parent for parent, _ in node.next_functions]
        return signal


REACHED: dict[int, set[int]] = {}


@pytest.mark.parametrize("tied", ["last", "first", "frozen"])
@pytest.mark.parametrize("make", [decoder, Skips])
def test_no_path_leads_from_a_signal_to_a_parameter_that_only_other_blocks_use(make, tied):
    REACHED.clear()
    model = make()
    batch = text() if make is decoder else (torch.randn(6, 8),)
    y = None if make is decoder else torch.arange(6) % 4
    cuts = "layers.*" if make is decoder else ["down.*", "up.*"]
    task = LanguageModel() if make is decoder else None
    learner = Learner(model, Walks(), cuts=cuts, tied=tied, task=task, example=batch)
    for _ in range(2):
        learner.step(batch, y)
    shared = {id(p) for name, p in model.named_parameters() if name in learner.network.shared}
    for group in learner.groups:
        own = {id(p) for unit in group.units for p in unit.parameters()}
        sites = [unit.site.index for unit in group.units]
        reached = set().union(*(REACHED.get(i, set()) for i in sites)) - shared
        assert reached
        assert reached <= own


def test_a_skip_past_the_cuts_is_carried_without_its_gradient():
    """What the learner does, written down: every input that comes from before a cut is detached."""
    torch.manual_seed(0)
    model = Skips(depth=1).double()
    plain = copy.deepcopy(model)
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.arange(6) % 4
    learner = Learner(model, "local_ce", cuts=["down.0", "up.0"], tied="last", **PLAIN, example=x)
    head = copy.deepcopy(learner.auxiliary["0"])
    learner.step(x, y)
    first = plain.side(x).tanh()
    block = plain.down[0](first)
    F.cross_entropy(head(block), y).backward()
    h = block.detach().relu()
    out = plain.up[0](h + h).relu() + first.detach()
    F.cross_entropy(plain.head(out), y).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, msg=name)


@pytest.mark.parametrize("tied", ["last", "first", "frozen"])
def test_who_trains_a_shared_parameter(tied):
    """The gradient on the tied embedding is that of the use by its owner alone."""
    model = decoder(depth=2).double()
    plain, start = copy.deepcopy(model), model.embedding.weight.detach().clone()
    batch = {"tokens": text()["tokens"]}
    y = batch["tokens"]
    learner = Learner(
        model, "local_ce", cuts="layers.*", tied=tied, task=LanguageModel(shift=False), **PLAIN, example=batch
    )
    readout = copy.deepcopy(learner.auxiliary["0"])
    learner.step(batch, y)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    h = plain.layers[0](plain.embedding(y) + plain.positions[:10], mask=mask, scale=1.0)[0]
    (first,) = torch.autograd.grad(F.cross_entropy(readout(h).flatten(0, 1), y.flatten()), plain.embedding.weight)
    h = plain.layers[1](h.detach(), mask=mask, scale=1.0)[0]
    loss = F.cross_entropy(plain.head(plain.norm(h)).flatten(0, 1), y.flatten())
    (last,) = torch.autograd.grad(loss, plain.embedding.weight)
    gradient = {"last": last, "first": first, "frozen": torch.zeros_like(last)}[tied]
    torch.testing.assert_close(model.embedding.weight, start - 0.1 * gradient)
    assert (
        f"it is trained by {dict(last='head', first='layers.0', frozen='nobody')[tied]}" in learner.network.describe()
    )


@pytest.mark.slow
def test_memory_is_flat_in_depth_on_an_unmodified_model():
    use = {}
    for rule in ("local_ce", "sll", "backprop"):
        for depth in (3, 9):
            batch = text(samples=8)
            batch["labels"] = batch["tokens"]
            learner = Learner(decoder(depth=depth), rule, cuts="auto", task=LanguageModel())
            learner.step(batch)
            _, measured = learner.measured_step(batch)
            use[rule, depth] = measured.activations + measured.gradients
    # What is left to grow: the list of attention maps, which the model itself returns, 8 * 10 * 10 floats a layer.
    for rule in ("local_ce", "sll"):
        assert use[rule, 9] - use[rule, 3] <= 6 * (8 * 10 * 10 * 4) * 1.02
    assert use["backprop", 9] > 2 * use["backprop", 3]


def test_describe_lists_what_crosses():
    learner = Learner(Skips(), "local_ce", cuts=["down.*", "up.*"], example=torch.randn(6, 8))
    text = learner.network.describe()
    assert "uses tanh float32 (2, 8) of block 'down.0'; its gradient is stopped, and its graph stays" in text
    plain = Learner(net(), "local_ce", example=DATA[0][0]).network.model
    assert "uses" not in Learner(cut_at_calls(plain, plain.block_names), "sll", example=DATA[0][0]).network.describe()
