"""Rules that only run forward: their estimates are the gradient on average, or in closed form."""

import copy

import pytest
import torch
from support.nets import CLASSES, PLAIN_SGD, batches, net, problem, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerwise import LayerwiseError, Learner, Partition, create_rule
from layerwise.core.perturbation import Estimate
from layerwise.core.perturbed_layers import error_without_graph, losses_of_samples
from layerwise.core.pullback import output_error
from layerwise.core.tasks import Classification
from layerwise.parallel.stage import check_can_pipeline

X, Y = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
UNIT = PLAIN_SGD | {"lr": 1.0}


def small(hidden=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 3)).double()


def gradient(rule, model=None, **options):
    """What one step of gradient descent with rate 1 takes away, in one vector."""
    model = small() if model is None else model
    before = nn.utils.parameters_to_vector(model.parameters())
    after = trained(model, rule, [(X, Y)], **UNIT, **options).network.model
    return (before - nn.utils.parameters_to_vector(after.parameters())).detach()


def estimates(rule, count, model=None):
    """Several estimates at the same weights, `(count, P)`."""
    learner = Learner(small() if model is None else model, rule, example=X, **UNIT)
    start, found = copy.deepcopy(learner.network.state_dict()), []
    for _ in range(count):
        learner.network.load_state_dict(start)
        before = nn.utils.parameters_to_vector(learner.network.parameters()).detach().clone()
        learner.step(X, Y)
        found.append(before - nn.utils.parameters_to_vector(learner.network.parameters()).detach())
    return torch.stack(found)


def agrees(found, expected, slack=1e-6):
    """Whether the mean lies within 4.5 standard errors of what is expected, everywhere (31 numbers: 1 in 5,000)."""
    error = found.std(0) / len(found) ** 0.5
    return bool(((found.mean(0) - expected).abs() <= 4.5 * error + slack).all())


# --- Forward gradients


def test_all_orthogonal_tangents_together_give_the_gradient():
    total = sum(p.numel() for p in small().parameters())
    rule = create_rule("forward_gradient", mode="weights", orthogonal=True, tangents=total)
    assert torch.allclose(gradient(rule), gradient("backprop"), atol=1e-6)  # the loss is computed in float32


@pytest.mark.slow
@pytest.mark.parametrize("orthogonal", [False, True])
def test_tangents_of_weights_give_the_gradient_on_average(orthogonal):
    found = estimates(create_rule("forward_gradient", mode="weights", tangents=4, orthogonal=orthogonal), 60)
    assert agrees(found, gradient("backprop"))
    assert not agrees(found, -gradient("backprop"))


@pytest.mark.slow
def test_tangents_of_activities_give_the_gradient_on_average_and_vary_less():
    expected = gradient("backprop")
    found = estimates(create_rule("forward_gradient", mode="activities", tangents=4), 60)
    assert agrees(found, expected) and not agrees(found, -expected)
    assert torch.allclose(found[:, -15:], expected[-15:], atol=1e-6)  # the output layer has its true gradient
    weights = estimates(create_rule("forward_gradient", mode="weights", tangents=4), 40)
    assert found.var(0).sum() < weights.var(0).sum()


def test_units_that_relu_silences_get_no_estimate():
    model = small()
    with torch.no_grad():
        model[0].bias[1] = -100.0
    found = estimates(create_rule("forward_gradient", mode="activities"), 3, model)
    assert (found[:, 3:6] == 0).all() and (found[:, 0:3] != 0).any()


@pytest.mark.slow
def test_local_losses_have_the_gradient_of_local_ce_on_average_and_readouts_their_own():
    """The first of two blocks, and its readout, beside a rule that differentiates the same loss."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
    model = Partition(nn.Sequential(*layers).double(), ["1", "3"])
    rule = create_rule("forward_gradient", tangents=300)
    learner, exact = Learner(copy.deepcopy(model), rule, **UNIT), Learner(copy.deepcopy(model), "local_ce", **UNIT)
    for one in (learner, exact):
        one.build(X)
    exact.auxiliary["0"].load_state_dict(learner.auxiliary["0"].state_dict())
    start = model.model[0].weight.detach().clone()
    learner.step(X, Y)
    exact.step(X, Y)
    assert torch.allclose(learner.auxiliary["0"].weight, exact.auxiliary["0"].weight)
    found, expected = ((start - one.network.model[0].weight.detach()).flatten() for one in (learner, exact))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.97
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.2)


# --- Likelihood ratio


def test_the_likelihood_ratio_gives_the_gradient_on_average():
    """Of the loss that noise smooths, which differs from the loss by the order of sigma squared."""
    found = estimates(create_rule("likelihood_ratio", pairs=12, sigma=0.03), 20)
    expected = gradient("backprop")
    assert agrees(found, expected, slack=0.005)
    assert not agrees(found, -expected, slack=0.005)


def test_a_noisy_linear_layer_has_the_closed_form_of_its_score():
    """One layer, one pair: dW = ((L+ - L) z x^T - (L- - L) z x^T) / 2 sigma, which lies in the span of z x^T."""
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3).double())
    seen = []

    class Spy(type(create_rule("likelihood_ratio"))):
        def signal(self, at):
            seen.append(at.message)
            return super().signal(at)

    start = copy.deepcopy(model)
    learner = trained(Partition(model, ["0"]), Spy(pairs=1, sigma=0.5), [(X, Y)], **UNIT)
    noise, task = seen[-1].noises[0], Classification(3)
    z = noise.draw(learner.network.head, 0, torch.zeros(6, 3, dtype=torch.float64))
    clean = start(X)
    up, down, quiet = (losses_of_samples(task, clean + s * 0.5 * z, Y) for s in (1, -1, 0))
    expected = (((up - quiet) - (down - quiet)) / 1.0)[:, None] * z
    moved = start[1].weight - learner.network.model[1].weight
    assert torch.allclose(moved, expected.T @ X)


# --- PEPITA


@pytest.mark.parametrize("time_local", [False, True])
def test_pepita_moves_layers_by_how_their_activities_change(time_local):
    model = small(5)
    learner = Learner(model, create_rule("pepita", scale=0.8, time_local=time_local), example=X, **UNIT)
    first, last = (copy.deepcopy(model[i]) for i in (0, 2))
    error = (last(first(X).relu()).softmax(-1) - torch.eye(3)[Y]).detach()
    moved = X + error @ learner.auxiliary["0"].matrix
    h, h_moved = first(X).relu(), first(moved).relu()
    error_moved = last(h_moved).softmax(-1) - torch.eye(3)[Y]
    below = ((h - h_moved).T @ (X if time_local else moved)) / 6
    above = error_moved.T @ (h if time_local else h_moved) / 6
    learner.step(X, Y)
    assert torch.allclose(first.weight - model[0].weight, below, atol=1e-6)
    assert torch.allclose(last.weight - model[2].weight, above, atol=1e-6)


def test_mirrored_noise_turns_the_projection_against_the_weights():
    """A linear network's correlation of noise and output is the product of its weights, transposed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, CLASSES)).double()
    learner = Learner(model, create_rule("pepita", mirror=0.1, scale=0.5), lr=1e-6)
    x, y = torch.randn(256, 8, dtype=torch.float64), torch.arange(256) % CLASSES
    for _ in range(60):
        learner.step(x, y)
    product = (model[1].weight @ model[0].weight).flatten()
    assert torch.cosine_similarity(learner.auxiliary["0"].running_matrix.flatten(), -product, dim=0) > 0.95


def test_both_passes_have_the_same_dropout_and_evaluation_is_of_the_batch_itself():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    learner = Learner(model, "pepita", example=X, **UNIT)
    learner.auxiliary["0"].matrix.zero_()
    before = model[0].weight.detach().clone()
    learner.step(X, Y)
    assert torch.equal(model[0].weight, before)  # no error in the input, and nothing has changed
    loss = learner.task.loss(learner(X), Y)
    assert learner.evaluate(X, Y).read()["head/loss"] == pytest.approx(float(loss))


# --- What all of them keep


@pytest.mark.parametrize("y", [Y, torch.tensor([0, -100, 2, -100, 1, 1]), torch.full((6, 3), 1 / 3)], ids=str)
@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 2.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_error_at_the_outputs_is_that_of_the_loss(y, weights, smoothing):
    task = Classification(3, weights=weights, label_smoothing=smoothing)
    assert torch.allclose(error_without_graph(task, X, y), output_error(task, X, y), atol=1e-6)
    assert torch.allclose(losses_of_samples(task, X, y).sum(), task.loss(X, y).double(), atol=1e-6)


@pytest.mark.parametrize("mode", ["activities", "weights"])
def test_other_modes_build_no_graph_and_do_not_grow_with_depth(mode):
    saved = []

    def held(depth):
        rule = create_rule("forward_gradient", mode=mode)
        learner, (x, y) = Learner(net("mlp", depth=depth, width=64), rule), problem(32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            learner.step(x, y)
        use = learner.measured_step(x, y)[1]
        return use.activations + use.gradients

    assert held(12) <= 1.01 * held(4)
    assert not saved


def test_local_forward_gradients_run_in_a_pipeline_and_the_rest_is_refused_in_a_sentence():
    groups = [range(i, i + 1) for i in range(4)]
    check_can_pipeline(create_rule("forward_gradient"), groups)
    for rule in (
        create_rule("forward_gradient", mode="weights"),
        create_rule("pepita"),
        create_rule("likelihood_ratio"),
    ):
        with pytest.raises(LayerwiseError, match="cannot be trained by a pipeline, because its locality is"):
            check_can_pipeline(rule, groups)


def test_what_is_not_defined_is_refused_in_a_sentence():
    x, _ = batches(1)[0]
    with pytest.raises(LayerwiseError, match="pepita is defined for chains"):
        Learner(net("vit"), "pepita", example=x)
    with pytest.raises(LayerwiseError, match="orthogonal=True is for mode"):
        create_rule("forward_gradient", orthogonal=True)
    with pytest.raises(LayerwiseError, match="40 orthogonal directions do not fit into 31 weights"):
        gradient(create_rule("forward_gradient", mode="weights", orthogonal=True, tangents=40))
    with pytest.raises(LayerwiseError, match="cannot do regression: it needs the loss of each sample"):
        Learner(net("mlp"), "likelihood_ratio", task="regression", example=x)
    with pytest.raises(LayerwiseError, match="micro"):
        Learner(net("mlp"), "likelihood_ratio", micro=2, example=x)


@pytest.mark.parametrize("rule", ["likelihood_ratio", "forward_gradient", "pepita"])
def test_a_frozen_block_changes_nothing_for_those_after_it(rule):
    """The passes go through it all the same: the other blocks take the step that they take when it learns."""
    steps = []
    for frozen in (False, True):
        model = net("mlp")
        model.block1.requires_grad_(not frozen)
        learner = Learner(model, rule, **UNIT)
        learner.step(*problem(16))
        steps.append({name: p.detach() for name, p in model.named_parameters()})
    moving, resting = steps
    assert [name for name in moving if not torch.equal(moving[name], resting[name])] == [
        name for name in moving if name.startswith("block1.")
    ]


def test_labels_of_another_shape_are_refused_and_not_broadcast():
    with pytest.raises(LayerwiseError, match=r"labels have shape \(6, 3\)"):
        Learner(small(), "likelihood_ratio").step(X, nn.functional.one_hot(Y))


@pytest.mark.parametrize(
    "rule", ["pepita", "forward_gradient", "likelihood_ratio", "hebbian_global", "hebbian_local", "zeroth_order", "sll"]
)
def test_hooks_of_parameters_see_gradients_that_no_backward_pass_makes(rule):
    """A gradient that the user sets to zero, or masks, moves nothing; who watches gradients sees each once a step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    masked, cleared, others = model[0].weight, model[2].weight, model[4].weight
    seen = []
    masked.register_hook(lambda gradient: gradient * (torch.arange(gradient.shape[1]) > 0))
    cleared.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.zeros_like(p)))
    others.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    before = [p.detach().clone() for p in (masked, cleared, others)]
    learner = Learner(model, rule, optimizer="sgd", lr=0.5, weight_decay=0.0)
    for _ in range(2):
        learner.step(X, Y)
    moved = [(p - old).abs() > 1e-6 for p, old in zip((masked, cleared, others), before, strict=True)]
    assert not moved[0][:, 0].any() and moved[0][:, 1:].any()
    assert not moved[1].any() and moved[2].any() and len(seen) == 2


def test_an_interrupt_between_two_parameters_leaves_none_of_them_moved():
    weight, broken = torch.zeros(2), torch.zeros(1).expand(2)  # torch refuses to write into the second
    with pytest.raises(RuntimeError):
        Estimate([weight, broken], seeds=[0]).measure(1e-3, weight.sum)
    assert weight.abs().max() < 1e-9  # up to rounding


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("mode", ["local", "activities", "weights"])
def test_a_layer_whose_tangent_would_be_lost_is_refused(mode):
    """Its slope would be zero: it would stay what it is, and nothing would say so."""

    class Recomputed(nn.Sequential):
        def forward(self, x):
            return checkpoint(self[0], x, use_reentrant=True)

    inner = Recomputed(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), inner, nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(LayerwiseError, match=r"use_reentrant=False|jvp"):
        Learner(model, create_rule("forward_gradient", mode=mode)).step(X, Y)
