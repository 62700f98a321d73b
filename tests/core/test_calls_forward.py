"""Models cut at the calls of their own modules: their own forward pass does what it does without a learner."""

import contextvars
import copy

import pytest
import torch
import torch.nn.functional as F
from support.coroutines import hooks, suspended
from support.nets import CLASSES, batches, same_bits, tensors
from support.own import Twists, bfloat, vectors
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise import LayerwiseError, Learner
from layerwise.rules.local_ce import LocalCE

DATA = batches(3)
PLAIN = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.0}


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
