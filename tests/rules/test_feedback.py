"""Feedback alignment and its kin: the identities that their equations imply, in closed form."""

import copy

import pytest
import torch
from support.nets import CLASSES, KINDS, PLAIN_SGD, batches, gone_on, net, problem, same_bits, trained
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, Partition, create_rule
from layerwise.core.pullback import output_error
from layerwise.parallel.stage import check_can_pipeline
from layerwise.rules.feedback import fed_layers

DATA = [(x.double(), y) for x, y in batches(3)]
X, Y = DATA[0]
MODES = ("fa", "dfa", "sdfa", "drtp", "usf", "brsf", "frsf", "kolen_pollack", "dkp", "ebd")
DECAY = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.05}


def fa(mode="fa", **options):
    return create_rule("feedback_alignment", mode=mode, **options)


def pairs(learner):
    """Every layer with feedback, and its feedback."""
    for group in learner.groups:
        for unit in group.units:
            yield from zip(fed_layers(unit.site), unit.auxiliary, strict=True)


def close(a, b, **tolerance):
    return all(torch.allclose(p, q, **tolerance) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def two_layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()


def test_drtp_sends_every_position_its_next_token_and_nothing_where_none_follows():
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    y = torch.tensor([[0, 1, 2, -100, 4]])  # of position 2 nobody says what follows, and nothing follows position 4
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5))
    made = {"cuts": ["0"], "task": LanguageModel(), "example": tokens, **PLAIN_SGD}
    learner = Learner(model, fa("drtp"), **made)
    before, matrix = model[0].weight.detach().clone(), learner.auxiliary["0"].matrix
    learner.step(tokens, y)
    wanted = before.clone()
    for position, following in ((0, 1), (1, 2), (3, 4)):
        wanted[position] += 0.1 * matrix[following] / 3
    assert torch.allclose(model[0].weight, wanted, atol=1e-7)


# --- Chained feedback


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_alignment_with_the_weights_themselves_is_backprop(kind):
    model = net(kind).double()
    learner = Learner(copy.deepcopy(model), fa(), example=X, **PLAIN_SGD)
    backprop = Learner(copy.deepcopy(model), "backprop", example=X, **PLAIN_SGD)
    for x, y in DATA:
        with torch.no_grad():
            for layer, feedback in pairs(learner):
                feedback.matrix.copy_(layer.weight)
        learner.step(x, y)
        backprop.step(x, y)
    assert close(learner.network, backprop.network, rtol=1e-9)
    assert not close(trained(model, fa(), DATA, **PLAIN_SGD).network, backprop.network, rtol=1e-3)


@pytest.mark.parametrize("mode", ["fa", "usf", "frsf"])
def test_the_error_goes_back_through_the_feedback_by_its_closed_form(mode):
    model = two_layers()
    first, last = model[1], model[3]
    learner = Learner(model, fa(mode), example=X, **PLAIN_SGD)
    x = X.flatten(1)
    h = (x @ first.weight.T + first.bias).tanh()
    e = output_error(learner.task, h @ last.weight.T + last.bias, Y)
    drawn = None if mode == "usf" else learner.auxiliary["1"][0].matrix
    size = (2 / (12 + CLASSES)) ** 0.5
    kernel = {"fa": drawn, "usf": size * last.weight.sign()}.get(mode)
    if mode == "frsf":
        kernel = drawn.abs() * last.weight.sign()
    expected = first.weight - 0.1 * ((e @ kernel) * (1 - h**2)).T @ x
    top = last.weight - 0.1 * e.T @ h
    learner.step(X, Y)
    assert torch.allclose(first.weight, expected) and torch.allclose(last.weight, top)


def test_kernels_with_the_signs_of_the_weights_are_drawn_anew_for_every_batch_or_kept():
    """The same batch and weights at two steps: `frsf` moves them alike, `brsf` does not; the last layer is backprop."""
    moved = {}
    for mode in ("frsf", "brsf"):
        model, learner = two_layers(), None
        learner = Learner(model, fa(mode), example=X, **PLAIN_SGD)
        start, found = copy.deepcopy(model.state_dict()), []
        for _ in range(2):
            model.load_state_dict(start)
            learner.step(X, Y)
            found.append(model[1].weight.detach().clone())
        moved[mode] = torch.equal(*found)
    assert moved == {"frsf": True, "brsf": False}


@pytest.mark.parametrize("kind", ["mlp", "vgg"])
def test_kolen_pollack_feedback_comes_to_be_the_weights(kind):
    """W and B have one gradient, so that their distance decays by weight decay alone: (1 - lr wd)^t."""
    learner = Learner(net(kind).double(), fa("kolen_pollack"), example=X, **DECAY)
    apart = [(layer.weight - own.matrix).detach() for layer, own in pairs(learner)]
    for x, y in DATA:
        learner.step(x, y)
    left = (1 - 0.1 * 0.05) ** len(DATA)
    assert all(
        torch.allclose(layer.weight - own.matrix, left * d)
        for (layer, own), d in zip(pairs(learner), apart, strict=True)
    )


@pytest.mark.parametrize("kind", ["mlp", "vgg"])
def test_products_of_feedback_come_to_be_the_weights(kind):
    """R - B^T W decays as (1 - lr wd)^t under plain gradient descent."""
    learner = Learner(net(kind).double(), "product_feedback_alignment", example=X, **DECAY)

    def apart():
        return [
            (own.matrix - torch.tensordot(own.mixing.T, layer.weight, dims=1)).detach() for layer, own in pairs(learner)
        ]

    before = apart()
    for x, y in DATA:
        learner.step(x, y)
    left = (1 - 0.1 * 0.05) ** len(DATA)
    assert all(torch.allclose(now, left * then) for now, then in zip(apart(), before, strict=True))
    own = next(iter(pairs(learner)))[1]
    assert torch.allclose(own.mixing @ own.mixing.T, torch.eye(len(own.mixing), dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_product_feedback_that_has_aligned_is_backprop_and_stays_so(kind):
    """From R = B^T W on, B R = W in every step, since R keeps B^T W and B B^T = I."""
    model = net(kind).double()
    learner = Learner(copy.deepcopy(model), "product_feedback_alignment", example=X, **DECAY)
    with torch.no_grad():
        for layer, own in pairs(learner):
            own.matrix.copy_(torch.tensordot(own.mixing.T, layer.weight, dims=1))
    for x, y in DATA:
        alignment = learner.step(x, y).read()["head/alignment"]
    assert close(learner.network, trained(model, "backprop", DATA, **DECAY).network, rtol=1e-9)
    assert alignment == pytest.approx(1.0)


# --- Direct feedback


@pytest.mark.parametrize("mode", ["dfa", "dkp"])
def test_direct_feedback_by_the_output_weights_is_backprop_below_them(mode):
    """One hidden layer. A learned matrix that starts there stays there, since both have the gradient e h^T."""
    model = two_layers()
    learner = Learner(copy.deepcopy(model), fa(mode), example=X, **DECAY)
    learner.auxiliary["0"].matrix.data.copy_(learner.network.model[3].weight)
    for x, y in DATA if mode == "dkp" else DATA[:1]:
        learner.step(x, y)
    expected = trained(model, "backprop", DATA if mode == "dkp" else DATA[:1], **DECAY)
    assert close(learner.network, expected.network, rtol=1e-9)


@pytest.mark.parametrize("mode", ["sdfa", "drtp", "ebd"])
def test_direct_feedback_moves_the_first_layer_by_its_closed_form(mode):
    model = two_layers()
    first, last = model[1], model[3]
    learner = Learner(model, fa(mode, memory=0.75), example=X, **PLAIN_SGD)
    x, count = X.flatten(1), len(X)
    h = (x @ first.weight.T + first.bias).tanh().detach()
    e = output_error(learner.task, h @ last.weight.T + last.bias, Y)
    feedback = learner.auxiliary["0"]
    start = feedback.current().clone()
    sent = {
        "sdfa": lambda: e.sign() / count @ feedback.matrix,
        "drtp": lambda: -feedback.matrix[Y] / count,
        "ebd": lambda: e @ (0.75 * start + 0.25 * e.T @ h),
    }[mode]()
    expected = first.weight - 0.1 * (sent * (1 - h**2)).T @ x
    learner.step(X, Y)
    assert torch.allclose(first.weight, expected)
    if mode == "ebd":
        assert torch.allclose(feedback.running_matrix, 0.75 * start + 0.25 * e.T @ h)


def test_another_function_stands_in_for_the_derivative():
    """A step is ReLU's own derivative; a constant one makes the feedback linear."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES)).double()
    own, step, one = (trained(model, fa("dfa", derivative=d), [(X, Y)], **PLAIN_SGD) for d in ("own", "step", "one"))
    assert same_bits(own, step)
    learner = Learner(copy.deepcopy(model), fa("dfa"), example=X)
    e = output_error(learner.task, model(X), Y)
    expected = model[1].weight - 0.1 * (e @ learner.auxiliary["0"].matrix).T @ X.flatten(1)
    assert torch.allclose(one.network.model[1].weight, expected)


def test_the_error_is_all_that_is_sent_and_parts_of_a_batch_add_up_to_it():
    seen, kind = [], type(fa())

    class Spy(kind):
        def signal(self, at):
            seen.append(at.message)
            return super().signal(at)

    model = net("mlp").double()
    whole = trained(model, Spy("dfa"), [(X, Y)], **PLAIN_SGD)
    assert all(message.shape == (len(X), CLASSES) for message in seen) and len(seen) == 4
    parts = trained(model, fa("dfa"), [(X, Y)], micro=3, **PLAIN_SGD)
    assert close(whole.network, parts.network, rtol=1e-9)


def test_blocks_are_whole_or_cut_at_every_unit():
    """Macro and micro feedback of a transformer are two ways to cut it."""
    model = net("vit")
    cuts = [f"{block}.{unit}" for block in model.block_names for unit in ("attn", "mlp")]
    learner = Learner(Partition(model, cuts), fa("dfa"), lr=0.01)
    x, y = problem(64)
    losses = [learner.step(x, y).read()["head/loss"] for _ in range(20)]
    assert len(learner.groups) == 7 and losses[-1] < 0.95 * losses[0]


# --- What every mode keeps


@pytest.mark.parametrize(
    "mode",
    [m if m in ("fa", "sdfa", "kolen_pollack") else pytest.param(m, marks=pytest.mark.slow) for m in MODES],
)
def test_every_mode_learns_and_goes_on_from_its_state_to_the_same_bits(mode):
    model, data = net("mlp", dropout=0.2), batches(3)
    assert same_bits(gone_on(model, fa(mode), data, 2), trained(model, fa(mode), data))
    learner, (x, y) = Learner(net("mlp"), fa(mode), lr=0.01), problem(64)
    losses = [learner.step(x, y).read()["head/loss"] for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]


def test_target_projection_runs_in_a_pipeline_and_what_needs_the_error_is_refused():
    groups = [range(i, i + 1) for i in range(4)]
    check_can_pipeline(fa("drtp"), groups)
    for mode in MODES:
        if mode != "drtp":
            with pytest.raises(LayerwiseError, match="cannot be trained by a pipeline, because its locality is"):
                check_can_pipeline(fa(mode), fa(mode).groups(3))


def test_activations_of_target_projection_do_not_grow_with_depth_and_those_of_chains_do():
    def held(mode, depth):
        learner, (x, y) = Learner(net("mlp", depth=depth, width=64), fa(mode)), problem(32)
        learner.step(x, y)
        use = learner.measured_step(x, y)[1]
        return use.activations + use.gradients

    assert held("drtp", 16) <= 1.01 * held("drtp", 4)
    assert held("fa", 16) > 1.2 * held("fa", 4)


def test_what_cannot_be_done_is_said_in_a_sentence():
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, CLASSES))
    with pytest.raises(LayerwiseError, match="grouped convolution"):
        Learner(Partition(grouped, ["0"]), "product_feedback_alignment", example=torch.zeros(2, 2, 4, 4))
    with pytest.raises(LayerwiseError, match="cannot do regression: its mode drtp projects classes"):
        Learner(net("mlp"), fa("drtp"), task="regression", example=problem()[0])
    tokens = nn.Sequential(nn.Linear(6, 8), nn.Flatten(1), nn.Linear(32, 3))
    learner = Learner(Partition(tokens, ["0"]), fa("dfa"))
    learner.step(torch.randn(4, 4, 6), torch.tensor([0, 1, 2, 0]))  # one error per sample, sent to all positions
