"""Models cut at the calls of their own modules, against plain loops, traced cuts and a walk of the graph."""

import contextvars
import copy
import pickle
import warnings
import weakref

import greenlet
import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, batches, made, net, same_bits, tensors
from support.own import VOCABULARY, WIDTH, Decoder, Skips, decoder, text
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise import LanguageModel, LayerwiseError, Learner, cut_at_calls, rules
from layerwise.core.cut_names import automatic_cuts, matching
from layerwise.rules.local_ce import LocalCE

DATA = batches(3)
PLAIN = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.0}
ABLE = [made(name) for name in rules.names() if not rules.get(name).models]
AGAIN = [
    rules.create("interlocking"),
    rules.create("sll", overlap=1),
    rules.create("backprop_checkpoint"),
    rules.create("zeroth_order"),
    rules.create("auglocal"),
    rules.create("layer_collaboration", gamma="all"),
]
"""Rules that run a block, or a copy of one, again."""


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


MADE = weakref.WeakSet()


class Noted(greenlet.greenlet):
    """A coroutine that tests can find again."""

    def __init__(self, *args):
        super().__init__(*args)
        MADE.add(self)


def suspended():
    return [coroutine for coroutine in MADE if not coroutine.dead]


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch):
    monkeypatch.setattr(greenlet, "greenlet", Noted)
    yield
    assert not suspended()
    assert torch.is_grad_enabled()


# --- The same bits


@pytest.mark.parametrize(("kind", "asked"), [("mlp", [*ABLE, *AGAIN]), ("vgg", ["sll", "sid", "backprop", *AGAIN[:3]])])
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
        ("parameter", "'layers.1' gets an argument that depends on parameters outside of it"),
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


# --- The user's own forward


class Twists(nn.Module):
    """Layers called under contexts of the forward pass's own."""

    def __init__(self, around=None, inside=None, output=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)
        self.around, self.inside, self.output = around, inside, output

    def forward(self, x):
        if self.around is None:
            return self._run(x)
        with self.around():
            return self._run(x)

    def _run(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x).relu()
            if self.inside is not None:
                self.inside(i)
        return self.head(x)


def vectors(seed=0):
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % CLASSES


def bfloat():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_autocast_of_the_forward_pass_itself_is_its_own():
    """Losses and steps are outside of it, and weights that it cast are not used again after a step."""
    x, y = vectors()
    torch.manual_seed(0)
    model = Twists(bfloat)
    plain = copy.deepcopy(model)
    learner = Learner(model, "backprop", cuts="layers.*", **PLAIN)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        learner.step(x, y)
        F.cross_entropy(plain(x).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(model, plain)
    local = Learner(Twists(bfloat), "local_ce", cuts="layers.*", lr=0.05)
    losses = [float(local.step(x, y).loss) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.is_autocast_enabled("cpu")


def test_a_forward_pass_without_gradient_leaves_the_engines_mode_alone():
    class Frozen(Twists):
        def _run(self, x):
            with torch.no_grad():
                x = self.layers[1](self.layers[0](x).relu())
            return self.head(self.layers[2](x))

    x, y = vectors()
    model = Frozen()
    model.layers[:2].requires_grad_(False)
    before = tensors(model)
    learner = Learner(model, "local_ce", cuts="layers.*", lr=0.1)
    learner.step(x, y)
    after = tensors(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"layers.2.weight", "layers.2.bias", "head.weight", "head.bias"}


def test_a_default_device_and_context_variables_of_the_forward_pass():
    variable = contextvars.ContextVar("variable", default="outside")
    seen = []

    class Meta(LocalCE):
        def signal(self, ctx):
            assert torch.empty(1).device.type == "cpu"  # the engine's code is not under the model's contexts
            return super().signal(ctx)

    def inside(i):
        seen.append((variable.get(), torch.empty(1).device.type))

    token = variable.set("inside")
    x, y = vectors()
    Learner(Twists(lambda: torch.device("meta"), inside), Meta(), cuts="layers.*").step(x, y)
    variable.reset(token)
    assert set(seen) == {("inside", "meta")}
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("reentrant", [False])
def test_checkpoints_inside_the_forward_pass_change_no_bit(reentrant):
    class Checkpointed(Twists):
        def _run(self, x):
            for layer in self.layers:
                x = checkpoint(lambda h, layer=layer: layer(h).relu(), x, use_reentrant=reentrant)
            return self.head(x)

    x, y = vectors()
    models = []
    for kind in (Twists, Checkpointed):
        torch.manual_seed(0)
        models.append(kind())
        learner = Learner(models[-1], "local_ce", cuts="layers.*", lr=0.1)
        for _ in range(3):
            learner.step(x, y)
    assert same_bits(*models)


def test_a_layer_that_a_pass_leaves_out_rests_and_the_others_learn():
    class Drops(Twists):
        def _run(self, x):
            for i, layer in enumerate(self.layers):
                if self.training and i == self.left_out:
                    continue
                x = layer(x).relu()
            return self.head(x)

    x, y = vectors()
    model = Drops()
    learner = Learner(model, "local_ce", cuts="layers.*", weight_decay=0.0)
    for left_out in (1, 2, None):
        model.left_out = left_out
        before = tensors(model)
        learner.step(x, y)
        after = tensors(model)
        rest = {name.split(".")[1] for name in before if name[0] == "l" and torch.equal(before[name], after[name])}
        assert rest == (set() if left_out is None else {str(left_out)})


@pytest.mark.parametrize("at", [0, 1, 2, "logits"])
def test_an_error_in_the_forward_pass_comes_through_and_leaves_nothing(at):
    class Own(Exception):
        pass

    def inside(i):
        if armed and i == at:
            raise Own

    armed = []
    torch.manual_seed(0)
    model = Twists(torch.enable_grad, inside)
    output = (lambda out: out) if at != "logits" else (lambda out: out if not armed else armed[0]())
    x, y = vectors()
    learner = Learner(model, "local_ce", cuts="layers.*", output=output, example=x)
    learner.step(x, y)

    def broken():
        raise Own

    armed.append(broken)
    for ask in (lambda: learner.step(x, y), lambda: learner(x), lambda: learner.evaluate(x, y)):
        with pytest.raises(Own):
            ask()
        assert hooks(model) == 0
        assert not suspended()
    armed.clear()
    learner.step(x, y)


def test_a_step_that_fails_gives_the_pass_up():
    """The forward pass hangs in its loop, and its contexts are left in order."""
    left = []

    class Context:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            left.append(torch.is_grad_enabled())

    x, y = vectors()
    model = Twists(Context)
    learner = Learner(model, "local_ce", cuts="layers.*", example=x)
    left.clear()
    with pytest.raises(LayerwiseError, match="non-finite"):
        learner.step(x * float("nan"), y)
    assert left == [True]
    assert hooks(model) == 0
    skips = Learner(Twists(Context), "local_ce", cuts="layers.*", nonfinite="skip", example=x)
    before = tensors(skips.network)
    skips.step(x * float("nan"), y)
    assert skips.skipped == 1
    assert same_bits(before, tensors(skips.network))


def test_hooks_of_the_owner_run_as_they_would():
    seen = []
    model = Twists()
    model.layers[1].register_forward_hook(lambda module, args, out: out * 2)
    model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    x, y = vectors()
    learner = Learner(model, "local_ce", cuts="layers.*", example=x)
    seen.clear()
    with torch.no_grad():
        expected = 2 * model.layers[1].forward(model.layers[0](x).relu())
    learner.evaluate(x, y)
    torch.testing.assert_close(seen[0], expected)


def test_the_teaching_tensor_can_be_read_and_put_back_anywhere():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return {"aux": torch.zeros(len(x), 3), "deep": (x, [self.layer(x)])}

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.head = nn.ModuleList([Returns(), Returns()]), nn.Linear(8, CLASSES)

        def forward(self, x):
            for part in self.parts:
                x = part(x)["deep"][1][0]
            return self.head(x)

    x, y = vectors()
    learner = Learner(Nested(), "local_ce", cuts="parts.*", read=lambda out: out["deep"][1][0], lr=0.05)
    losses = [float(learner.step(x, y).loss) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    assert learner.groups[0].units[0].site.shapes[0] == (8,)
    with pytest.raises(LayerwiseError, match="read="):
        Learner(Nested(), "local_ce", cuts="parts.*", read=lambda out: out["deep"][0] + 1, example=x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_of_torch_with_padding_is_trained_and_evaluated():
    """In evaluation torch would pass nested tensors from layer to layer, which no rule can read."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(8, CLASSES)

        def forward(self, x, padding):
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    padding = torch.zeros(8, 5, dtype=torch.bool)
    padding[0, 3:] = True
    batch, y = (torch.randn(8, 5, 8), padding), torch.arange(8) % CLASSES
    model = Encoder()
    learner = Learner(model, "local_ce", cuts="auto", optimizer=torch.optim.SGD, lr=1e-12)
    trained, evaluated = learner.step(batch, y).read(), learner.evaluate(batch, y).read()
    assert trained == pytest.approx(evaluated, abs=1e-5)
    with torch.no_grad():
        assert torch.equal(learner(batch), copy.deepcopy(model).eval()(*batch))
    assert torch.backends.mha.get_fastpath_enabled()


# --- Batches


def test_tuples_are_arguments_and_mappings_are_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, left, right=None):
            return self.head(self.b(self.a(left).relu() + right))

    x, y = vectors()
    learners = []
    for batch in ((x, x + 1), {"left": x, "right": x + 1}, {"left": x, "right": x + 1, "labels": y}):
        torch.manual_seed(0)
        learner = Learner(Two(), "sll", cuts=["a", "b"], example=batch)
        step = learner.step(batch) if "labels" in batch else learner.step(batch, y)
        assert step.samples == len(y)
        learners.append(learner)
    assert same_bits(learners[0], learners[1])
    assert same_bits(learners[0], learners[2])
    with pytest.raises(LayerwiseError, match="labels"):
        learners[0].step((x, x))
    with pytest.raises(LayerwiseError, match="cut_at_calls"):
        Learner(net(), "sll").step((x, x), y)


def test_the_loss_of_a_language_model_is_that_of_the_next_token():
    torch.manual_seed(0)
    logits, y = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    y[0, 3:] = 7  # ignored below
    task = LanguageModel(ignore=7).with_classes(11)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=7)
    torch.testing.assert_close(task.loss(logits, y), wanted)
    counts = y[:, 1:] != 7
    right = ((logits[:, :-1].argmax(-1) == y[:, 1:]) & counts).sum() / counts.sum()
    torch.testing.assert_close(task.accuracy(logits, y), right)
    assert task.counted(y, False) == float(counts.sum())
    for wrong in (y[:, :1], y[0], torch.full_like(y, 7), y.float(), y + 11):
        with pytest.raises(LayerwiseError):
            task.check(wrong)


def test_accumulated_batches_weigh_by_the_tokens_that_count():
    """Two halves of unequal padding give the update of the whole batch."""
    whole = text(samples=4, seed=3)
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    whole["labels"][0, 2:] = -100
    halves = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    models = []
    for given in ([whole], halves):
        model = decoder().double()
        learner = Learner(model, "local_ce", cuts="auto", task=LanguageModel(), accumulate=len(given), **PLAIN)
        for batch in given:
            learner.step(batch)
        models.append(tensors(model))
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], msg=name)


# --- State


def test_learners_are_copied_pickled_and_continued():
    batch, options = text(), {"cuts": "layers.*", "output": "logits", "task": LanguageModel()}
    learner = Learner(decoder(dropout=0.3), "local_ce", **options)
    for _ in range(2):
        learner.step(batch)
    others = [
        copy.deepcopy(learner),
        pickle.loads(pickle.dumps(learner)),
        Learner(decoder(dropout=0.3), "local_ce", **options),
    ]
    others[2].load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, *others):
        each.step(batch)
    assert all(same_bits(learner, other) for other in others)
    assert learner.state_dict()["model"].keys() == decoder().state_dict().keys()


# --- What is refused


def test_rules_that_train_their_own_models_are_refused_by_name():
    x, y = DATA[0]
    for name in ("sid_cascade", "noprop_dt", "graph_forward"):
        with pytest.raises(LayerwiseError, match=name):
            Learner(cut_at_calls(net(), net().block_names), name).step(x, y)


@pytest.mark.parametrize("rule", ["infopro", "gradient_reconciliation", "forward_forward", "ssl_local"])
def test_rules_that_look_at_the_input_need_one_tensor(rule):
    with pytest.raises(LayerwiseError, match=rule):
        Learner(decoder(), rule, cuts="auto", example=text())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cuts": "blocks.*"}, "no module is called"),
        ({"cuts": ["layers"], "tied": "last"}, "never called"),
        ({"cuts": ["layers.1", "layers.0"], "tied": "last"}, "in their order"),
        ({"cuts": "layers.*", "tied": "both"}, "last, first or frozen"),
        ({"cuts": "layers.*", "blocks": 9}, "not possible"),
        ({"cuts": "layers.*", "read": {"layers.7": len}}, "no cut"),
        ({"cuts": ["layers.0"], "tied": "last", "offload": "host"}, "offload"),
        ({"cuts": "layers.*", "output": lambda out: out["attention"]}, "output="),
        ({"cuts": ["embedding", "layers.0", "head", "norm"], "tied": "last"}, "order"),
    ],
)
def test_wrong_cuts_and_options_are_refused_in_a_sentence(options, match):
    with pytest.raises(LayerwiseError, match=match):
        Learner(decoder(), "local_ce", task=LanguageModel(), example=text(), **options)


def test_modules_that_are_called_twice_or_compiled_are_refused():
    class Again(Twists):
        def _run(self, x):
            return self.head(self.layers[1](self.layers[0](self.layers[0](x))))

    x, _ = vectors()
    with pytest.raises(LayerwiseError, match="again"):
        Learner(Again(), "local_ce", cuts="layers.[01]", example=x)
    model = Twists()
    model.layers[1].compile(backend="eager")
    with pytest.raises(LayerwiseError, match="compiled"):
        Learner(model, "local_ce", cuts="layers.*")


def test_blocks_cannot_be_run_on_their_own():
    network = cut_at_calls(Twists(), "layers.*")
    x, _ = vectors()
    with pytest.raises(LayerwiseError, match="one forward pass"):
        network.blocks[0](x)
    with network.passing():
        h = network.blocks[0](x)
        with pytest.raises(LayerwiseError, match="out of turn"):
            network.blocks[2](h)
    assert hooks(network.model) == 0


def test_a_parameter_that_nothing_uses_is_named():
    class Spare(Twists):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    x, _ = vectors()
    with pytest.warns(UserWarning, match=r"spare\.weight"):
        Learner(Spare(), "local_ce", cuts="layers.*", example=x)


# --- Names


def test_names_that_no_trace_can_follow_point_to_the_models_own_pass():
    with pytest.raises(LayerwiseError, match=r"cut_at_calls\(model, \['down.0', 'up.0'\]\)"):
        Learner(Skips(), "local_ce", cuts=["down.0", "up.0"])


def test_patterns_and_automatic_cuts():
    model = decoder(depth=3)
    assert matching(model, "layers.*") == automatic_cuts(model) == ["layers.0", "layers.1", "layers.2"]
    assert matching(model, "layers.[02], norm") == ["layers.0", "layers.2", "norm"]
    assert [block.name for block in cut_at_calls(model, blocks=2).blocks] == ["layers.0", "layers.2"]
    nested = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(8)), "gate": nn.Linear(2, 2)})
        for _ in range(3)
    )
    assert automatic_cuts(nn.ModuleDict({"layers": nested})) == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(LayerwiseError, match="no list"):
        automatic_cuts(nn.Linear(2, 2))


# --- Other people's models


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_models_of_transformers(family):
    """The update of backprop is the plain loop's with the library's own loss; local losses fall."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": VOCABULARY, "use_cache": False}
    common = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    tokens = text()["tokens"]
    batch, task = {"input_ids": tokens, "attention_mask": text()["attention_mask"], "labels": tokens}, LanguageModel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of configurations
        if family == "gpt2":
            config = transformers.GPT2Config(
                n_embd=WIDTH, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **small
            )
            model = transformers.GPT2LMHeadModel(config)
        elif family == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **common, **small))
        elif family == "bert":
            config = transformers.BertConfig(
                hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=5, **common, **small
            )
            model, task = transformers.BertForSequenceClassification(config), None
            batch["labels"] = torch.arange(4)
        else:
            config = transformers.T5Config(
                d_model=WIDTH, d_ff=32, d_kv=8, num_layers=3, num_heads=2, dropout_rate=0, **small
            )
            model, task = transformers.T5ForConditionalGeneration(config), LanguageModel(shift=False)
            batch["decoder_input_ids"] = tokens.roll(1, 1)
    model.train()
    plain, local = copy.deepcopy(model), copy.deepcopy(model)
    learner = Learner(model, "backprop", cuts="auto", task=task, **PLAIN)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        learner.step(batch)
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(model, plain)
    learner = Learner(local, "local_ce", cuts="auto", task=task, lr=1e-2)
    losses = [learner.step(batch).read() for _ in range(15)]
    assert all(losses[-1][name] < losses[0][name] for name in losses[0] if name.endswith("loss"))
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(learner(given), copy.deepcopy(local).eval()(**given).logits)


def test_the_decoder_of_the_tests_is_no_model_of_ours():
    with pytest.raises(LayerwiseError):
        Learner(Decoder(), "local_ce").step(text()["tokens"], torch.zeros(4, 10, dtype=torch.long))
