"""The Learner from outside: continuing from a saved state, what it refuses, and what it does not change."""

import copy
import cProfile

import numpy as np
import pytest
import torch
from support.nets import CLASSES, KINDS, batches, net, problem, same_bits, tensors, trained
from torch import nn

from layerwise import LayerwiseError, Learner, Rule, Signal
from layerwise.core.tasks import UNLABELLED

DATA = batches(5)
X, Y = DATA[0]
NAN = torch.full_like(X, float("nan"))


# --- Going on from a saved state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("built", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_goes_on_from_its_state_to_the_same_bits(kind, precision, built):
    """Stopped after 2 of 5 batches with 3 to an update: in the middle of an accumulation too."""
    model = net(kind, dropout=0.2)
    how = {"accumulate": 3, "precision": precision, "schedule": lambda update: 0.9**update, "lr": 0.01}
    for stop in (2, 3):
        learner = trained(model, "sll", DATA[:stop], **how)
        state = copy.deepcopy(learner.state_dict())
        for x, y in DATA[stop:]:
            learner.step(x, y)
        other = Learner(net(kind, dropout=0.2), "sll", **how, example=X if built else None)
        with torch.no_grad():
            next(other.network.parameters()).fill_(3.0)  # all comes from the state
        other.load_state_dict(state)
        for x, y in DATA[stop:]:
            other.step(x, y)
        assert same_bits(other, learner)
        assert other.steps == learner.steps == 5
        moments, expected = other.optimizer_states(), learner.optimizer_states()
        assert moments.keys() == expected.keys()
        assert all(same_bits(moments[name], expected[name]) for name in moments)


def test_two_learners_share_nothing_after_one_loaded_the_others_state():
    model = net("mlp")
    a, b = (trained(model, "sll", DATA[:2], accumulate=2) for _ in range(2))
    a.step(*DATA[2])  # an accumulated gradient too
    b.load_state_dict(a.state_dict())
    kept = copy.deepcopy(b.state_dict())
    for x, y in DATA:
        a.step(x, y)
    assert same_bits(kept["model"], b.state_dict()["model"])
    assert same_bits(kept["gradients"], b.state_dict()["gradients"])
    for name, state in b.optimizer_states().items():
        assert same_bits(kept["optimizer"][name], state)


def test_optimizer_state_is_kept_by_parameter_name_whatever_the_grouping():
    learner = trained(net("mlp"), "backprop", DATA[:1])
    assert set(learner.optimizer_states()) == {n for n, _ in learner.network.named_parameters()}
    local = trained(net("mlp"), "local_ce", DATA[:1])
    assert set(local.optimizer_states()) == {n for n, _ in local.named_parameters()}
    assert any(name.startswith("auxiliary.") for name in local.optimizer_states())


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: trained(net("mlp"), "local_ce", DATA[:1]), "rule 'local_ce', not 'sll'"),
        (lambda: trained(net("mlp", width=17), "sll", DATA[:1]), "has shape"),
        (lambda: trained(net("mlp", depth=2), "sll", DATA[:1]), "is missing from the checkpoint"),
        (lambda: trained(net("mlp", depth=4), "sll", DATA[:1]), "is not part of this one"),
    ],
)
def test_a_state_of_something_else_is_refused_and_nothing_is_changed(other, sentence):
    learner = trained(net("mlp"), "sll", DATA[:1])
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(LayerwiseError, match=sentence):
        learner.load_state_dict(other().state_dict())
    after = learner.state_dict()
    assert same_bits(before["model"], after["model"])
    assert same_bits(before["auxiliary"], after["auxiliary"])
    assert before["optimizer"].keys() == after["optimizer"].keys()
    for name, state in before["optimizer"].items():
        assert same_bits(state, after["optimizer"][name])
    assert after["steps"] == 1


def test_a_wrong_state_kept_for_the_first_step_is_refused_there():
    learner = Learner(net("mlp"), "sll")
    before = tensors(learner.network)
    learner.load_state_dict(trained(net("mlp", width=17), "sll", DATA[:1]).state_dict())
    with pytest.raises(LayerwiseError, match="has shape"):
        learner.step(X, Y)
    assert same_bits(tensors(learner.network), before)


# --- What is not finite


def one_output():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))


class Burst(nn.Module):
    """Passes its input on; its gradient is infinite when asked for."""

    active = False

    def forward(self, h):
        if self.active:
            h.register_hook(lambda g: g * float("inf"))
        return h


def bursting():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, 8), nn.BatchNorm1d(8), Burst(),
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def test_a_gradient_that_is_not_finite_stops_with_name_step_and_advice():
    model = bursting()
    learner = Learner(model, "local_ce", accumulate=1)
    learner.step(X, Y)
    second = [p.detach().clone() for p in model[3:5].parameters()]
    model[5].active = True
    with pytest.raises(LayerwiseError, match=r"block '5' .* step 1: lower the learning rate, clip"):
        learner.step(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(second, model[3:5].parameters(), strict=True))
    assert all(p.grad is None for _, p in learner.named_parameters())
    model[5].active = False
    assert learner.step(X, Y).loss.isfinite()  # whoever catches the error can go on


def test_skipping_leaves_the_block_as_it_was_and_goes_on():
    model = bursting()
    learner = Learner(model, "local_ce", nonfinite="skip")
    learner.step(X, Y)
    before = copy.deepcopy(model)
    model[5].active = True
    metrics = learner.step(X, Y)
    assert metrics.skipped == ("5",)
    assert learner.skipped == 1
    assert same_bits(before[3:5], model[3:5])  # running statistics too
    assert not same_bits(before[1], model[1])  # the other blocks learn
    assert not same_bits(before[6:], model[6:])
    model[5].active = False
    assert learner.step(X, Y).skipped == ()
    assert not same_bits(before[3:5], model[3:5])
    assert (learner.skipped, learner.steps) == (1, 3)


def test_skipping_goes_back_to_before_the_first_batch_of_the_update():
    model = bursting()
    learner = Learner(model, "local_ce", nonfinite="skip", accumulate=2)
    learner.step(X, Y)
    learner.step(X, Y)
    before = copy.deepcopy(model)
    learner.step(X, Y)
    assert not same_bits(before[3:5], model[3:5])  # running statistics of a batch that is finite
    model[5].active = True
    assert learner.step(X, Y).skipped == ("5",)
    assert same_bits(before[3:5], model[3:5])


@pytest.mark.parametrize("kind", KINDS)
def test_skipping_a_batch_of_nan_changes_no_weight_and_no_running_statistic(kind):
    learner = trained(net(kind), "sll", DATA[:1], nonfinite="skip")
    before = tensors(learner.network)
    metrics = learner.step(NAN, Y)
    assert set(metrics.skipped) >= {"block1", "block2"}
    assert same_bits(tensors(learner.network), before)
    assert learner(X).isfinite().all()
    assert learner.step(X, Y).loss.isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nan_in_the_input_is_named_as_such(precision):
    learner = trained(net("vgg"), "sll", DATA[:1], precision=precision)
    before = [p.clone() for p in learner.network.parameters()]
    with pytest.raises(LayerwiseError, match=r"block 'block1'.*its input already holds NaN"):
        learner.step(NAN, Y)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.network.parameters(), strict=True))


def test_an_overflow_of_scaled_gradients_lowers_the_scale_and_stops_nothing():
    learner = Learner(net("mlp"), "sll", precision="fp16", example=X)
    for group in learner.groups:
        group.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = tensors(learner.network)
    learner.step(X, Y)
    assert same_bits(tensors(learner.network), before)
    assert all(group.scaler.get_scale() < 2.0**60 for group in learner.groups)


# --- Metrics, modes, prediction


def test_metrics_are_those_of_the_batch():
    model = net("mlp")
    expected = nn.functional.cross_entropy(model(X), Y)
    metrics = Learner(model, "backprop").step(X, Y)
    assert (metrics.step, metrics.samples) == (0, len(X))
    assert torch.equal(metrics.loss, expected)
    assert not metrics.loss.requires_grad
    values = metrics.read()
    assert values["head/loss"] == expected.item()
    assert values["head/accuracy"] == metrics.accuracy.item()
    share = (net("mlp")(X).argmax(-1) == Y).float().mean().item()
    assert values["head/accuracy"] == pytest.approx(share)


def test_an_accuracy_that_nobody_has_read_is_that_of_its_step():
    """It is computed when it is read: after other steps, and after the loader has written over the labels."""
    model, y = net("mlp"), Y.clone()
    share = (model(X).argmax(-1) == Y).float().mean().item()
    learner = Learner(model, "backprop")
    metrics = learner.step(X, y)
    assert callable(metrics.recorded["head"]["accuracy"])
    learner.step(X, y)
    y.fill_(-100)
    assert metrics.accuracy.item() == pytest.approx(share)
    assert not callable(metrics.recorded["head"]["accuracy"])


def test_accuracy_of_labels_that_are_all_right_is_one():
    learner = Learner(net("mlp"), "sll")
    assert learner.evaluate(X, learner(X).argmax(-1)).read()["head/accuracy"] == 1.0


@pytest.mark.parametrize("rule", ["backprop", "local_ce"])
def test_the_owners_modes_are_followed(rule):
    """Without dropout where the owner has called eval(), as in a loop of one's own; of single modules too."""
    whole, part = net("mlp", dropout=0.5), net("mlp", dropout=0.5)
    for module in part.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    without = trained(net("mlp", dropout=0.0), rule, [(X, Y)] * 2)
    for model in (whole.eval(), part):
        learner = Learner(model, rule)
        modes = [module.training for module in model.modules()]
        for _ in range(2):
            learner.step(X, Y)
        learner(X)
        assert [module.training for module in model.modules()] == modes
        assert same_bits(learner, without)


def test_prediction_and_evaluation_keep_every_modules_mode():
    model = net("vgg", dropout=0.5)
    learner = Learner(model, "sll", example=X)
    model.block1.norm.eval()
    modes = [m.training for m in model.modules()]
    learner(X)
    learner.evaluate(X, Y)
    assert [m.training for m in model.modules()] == modes
    assert not model.block1.norm.training


def test_a_step_works_where_gradients_are_switched_off():
    with torch.no_grad():
        a = trained(net("mlp"), "sll", DATA[:2])
    assert same_bits(a, trained(net("mlp"), "sll", DATA[:2]))


def test_prediction_has_no_graph_and_needs_no_step():
    out = Learner(net("vit"), "sll")(X)
    assert out.shape == (len(X), CLASSES)
    assert not out.requires_grad


# --- Frozen parts


def test_frozen_parameters_stay_and_the_rest_learns():
    model = net("mlp")
    model.block2.requires_grad_(False)
    before = copy.deepcopy(model)
    for rule in ("sll", "local_ce", "backprop"):
        after = trained(model, rule, DATA[:2]).network.model
        assert same_bits(before.block2, after.block2)
        assert not same_bits(before.block1, after.block1)
        assert not same_bits(before.head, after.head)


def test_a_block_without_parameters_is_passed_through():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    for rule in ("sll", "local_ce", "last_layer"):
        learner = trained(model, rule, DATA[:2], cuts=["0", "2"])
        assert not same_bits(learner.network.model[3], model[3])


class Quiet(Rule):
    """Trains one site of a group: the others get no gradient that would stay behind."""

    name, locality, boundary, flat_memory, source = "quiet", "global", "all", False, "this test"

    def groups(self, blocks):
        return [range(blocks + 1)]

    def trains(self, site):
        return site.is_head

    def signal(self, at):
        return Signal(loss=at.task.loss(at.h, at.y)) if at.site.is_head else Signal()


def test_no_gradient_stays_where_a_rule_trains_a_part_of_a_group():
    learner = trained(net("mlp"), Quiet(), DATA[:2])
    assert all(p.grad is None for p in learner.network.parameters())
    assert same_bits(learner.network.model.block1, net("mlp").block1)


# --- Wrong use


def learner():
    return trained(net("mlp"), "sll", DATA[:1])


WRONG = {
    "label -1 is out of range": lambda: learner().step(X, Y - 1),
    "label 4 is out of range": lambda: learner().step(X, Y + 1),
    "give class numbers as int64": lambda: learner().step(X, Y.float()),
    "labels are bool": lambda: learner().step(X, Y.bool()),
    "labels are int32": lambda: learner().step(X, Y.int()),
    r"labels have shape \(16, 1\)": lambda: learner().step(X, Y[:, None]),
    "labels have shape": lambda: learner().step(X, nn.functional.one_hot(Y)),
    "16 inputs and 15 labels": lambda: learner().step(X, Y[:-1]),
    "0 inputs and 0 labels": lambda: learner().step(X[:0], Y[:0]),
    r"block 'block1' cannot take .*\(2, 3, 8, 8\)": lambda: Learner(net("vgg"), "sll").step(X.repeat(1, 3, 1, 1), Y),
    "block 'block1' cannot take .*int64": lambda: Learner(net("mlp"), "sll").step(X.long(), Y),
    "did you mean 'sll'": lambda: Learner(net("mlp"), "sl"),
    "unknown cut 'block9'": lambda: Learner(net("mlp"), "sll", cuts=["block9"]),
    "names no block 'blok1'; did you mean 'block1'": lambda: Learner(net("mlp"), "sll", lr_multipliers={"blok1": 1.0}),
    "unknown optimizer 'adamv'; did you mean 'adam": lambda: Learner(net("mlp"), optimizer="adamv"),
    "AdamW has no option 'momentum'": lambda: Learner(net("mlp"), optimizer_options={"momentum": 0.9}),
    "AdamW refuses its options": lambda: Learner(net("mlp"), optimizer_options={"betas": (2.0, 0.9)}, example=X),
    "LBFGS needs a closure": lambda: Learner(net("mlp"), optimizer="LBFGS"),
    "lr is 0": lambda: Learner(net("mlp"), lr=0.0),
    "lr is nan": lambda: Learner(net("mlp"), lr=float("nan")),
    "weight_decay is -1": lambda: Learner(net("mlp"), weight_decay=-1.0),
    "clip is 0": lambda: Learner(net("mlp"), clip=0.0),
    "accumulate is 0": lambda: Learner(net("mlp"), accumulate=0),
    "unknown precision 'fp8'": lambda: Learner(net("mlp"), precision="fp8"),
    "nonfinite is 'ignore'": lambda: Learner(net("mlp"), nonfinite="ignore"),
    "the network has 1 output, .* 2 outputs or more": lambda: Learner(one_output()).step(X, torch.zeros_like(Y)),
    "label_smoothing is 1.0": lambda: Learner(net("mlp"), label_smoothing=1.0),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_use_is_answered_by_one_sentence(sentence):
    with pytest.raises(LayerwiseError, match=sentence) as error:
        WRONG[sentence]()
    assert "\n" not in str(error.value)


def test_wrong_labels_change_nothing():
    learner = trained(net("vgg"), "sll", DATA[:1])
    before = tensors(learner.network)
    for y in (Y + 1, Y[:, None], Y.int(), Y[:-1]):
        with pytest.raises(LayerwiseError):
            learner.step(X, y)
    parameters = dict(learner.network.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in parameters.items())
    assert learner.steps == 1


def test_optimizers_of_torch_train():
    x, y = problem(32)
    for name in ("adamw", "adam", "sgd", "rmsprop", "Adagrad", "NAdam", "Rprop"):
        learner = Learner(net("mlp"), "sll", optimizer=name, lr=0.01)
        first = learner.evaluate(x, y).loss
        for _ in range(15):
            learner.step(x, y)
        assert learner.evaluate(x, y).loss < first, name


@pytest.mark.parametrize("rule", ["sll", "sid", "local_ce", "backprop"])
def test_the_next_labels_may_be_written_into_the_same_memory(rule):
    """As a loader with a buffer of its own does; torch counts no change where NumPy has written."""
    buffer = np.zeros(len(X), dtype=np.int64)
    shared = torch.from_numpy(buffer)

    def told(labels):
        learner = Learner(net("mlp"), rule)
        buffer[:] = UNLABELLED
        buffer[:4] = 0
        learner.step(X, labels())
        buffer[:] = np.arange(len(X)) % CLASSES
        return learner.step(X, labels()).read()

    assert told(lambda: shared) == told(shared.clone)


def test_what_it_takes_to_build_grows_with_depth_and_not_with_its_square():
    def calls(depth):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth)), nn.Linear(4, 2))
        profile = cProfile.Profile()
        with profile:
            Learner(model, "sll", example=torch.zeros(4, 4))
        return sum(entry.callcount for entry in profile.getstats())

    calls(2)  # what is done once
    assert calls(64) < 4.5 * calls(16)
