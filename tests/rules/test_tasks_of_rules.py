"""Every rule with every task: those that it declares are trained, the others refused in one sentence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import PLAIN_SGD, by_family, made, same_bits
from support.pages import ROOT
from torch import nn

from layerwise import (
    Classification,
    LanguageModel,
    LayerwiseError,
    Learner,
    Loss,
    MultiLabel,
    Regression,
    Segmentation,
    rule_names,
)
from layerwise.core.rule import ANY_TASK
from layerwise.rules import get

RULES = [name for name in rule_names() if not get(name).models]
B, D, K = 16, 6, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perceptron(outputs, inputs=D, width=12):
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers)


def pyramid(outputs=K):
    """Maps of 8 x 8, of 4 x 4, of 4 x 4, and outputs of 8 x 8."""
    torch.manual_seed(0)
    steps = [nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(
        *(nn.Sequential(step, nn.ReLU()) for step in steps),
        nn.Sequential(nn.Conv2d(8, outputs, 1), nn.Upsample(scale_factor=2)),
    )


X = draw(B, D)
LINEAR = draw(D, K, seed=1)
TARGETS = X @ LINEAR
TOKENS = draw(B, 4, D)
MAPS = draw(4, 2, 8, 8)
PIXELS = (MAPS[:, 0] > 0).long() + (MAPS[:, 1] > 0.5).long()
PROBLEMS = {
    "classification": lambda: (perceptron(K), Classification(K), X, TARGETS.argmax(1)),
    "soft_labels": lambda: (perceptron(K), Classification(K), X, (2 * TARGETS).softmax(1)),
    "language_model": lambda: (perceptron(K), LanguageModel(shift=False), TOKENS, (TOKENS @ LINEAR).argmax(2)),
    "regression": lambda: (perceptron(2), Regression(), X, TARGETS[:, :2]),
    "multilabel": lambda: (perceptron(K), MultiLabel(), X, (TARGETS > 0).float()),
    "segmentation": lambda: (pyramid(), Segmentation(), MAPS, PIXELS),
    "loss": lambda: (perceptron(2), Loss(F.smooth_l1_loss), X, TARGETS[:, :2]),
}
VARIANTS = {
    "huber": lambda: (perceptron(1), Regression("huber", mean=1.0, std=2.0), X, TARGETS[:, 0]),
    "l1": lambda: (perceptron(1), Regression("l1"), X, TARGETS[:, :1]),
    "gaussian": lambda: (perceptron(4), Regression("gaussian"), X, TARGETS[:, :2]),
    "weights": lambda: (perceptron(K), Classification(weights=(1.0, 0.5, 2.0)), X, TARGETS.argmax(1)),
    "ignored pixels": lambda: (
        pyramid(), Segmentation(ignore=9), MAPS, PIXELS.masked_fill(draw(4, 8, 8, seed=8) > 1, 9)
    ),
    "maps of numbers": lambda: (pyramid(1), Regression(positions="pixel"), MAPS, MAPS.sum(1)),
}  # fmt: skip


def rule_of(name):
    return get(name)(pool="none") if name == "sid" else made(name)


def test_the_problems_are_all_kinds_of_tasks():
    assert set(PROBLEMS) == set(ANY_TASK)
    assert all(set(get(name).tasks) <= set(ANY_TASK) and "classification" in get(name).tasks for name in rule_names())


@pytest.mark.parametrize("kind", ANY_TASK)
@pytest.mark.parametrize("name", by_family(RULES))
def test_a_rule_learns_the_tasks_that_it_declares_and_refuses_the_others(name, kind):
    model, task, x, y = PROBLEMS[kind]()
    rule = made(name) if kind != "language_model" else rule_of(name)
    if kind not in rule.tasks:
        with pytest.raises(LayerwiseError, match=f"{name}.* cannot .*{rule.only[:20]}.*rules that can: .*backprop"):
            Learner(model, rule, task=task).step(x, y)
        return
    learner = Learner(model, rule, task=task, lr=0.03)
    before = float(learner.evaluate(x, y).loss)
    for _ in range(5):
        metrics = learner.step(x, y)
    if name not in (
        "forward_forward",
        "layer_collaboration",
        "boosted",
    ):  # slow, or 0 at first
        assert float(learner.evaluate(x, y).loss) < before
    assert {"loss", *learner.task.metrics(learner(x), y)} <= metrics.blocks["head"].keys()
    assert learner(x).shape == model(x).shape


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["sll", "sid", "local_ce", "mono_forward", "dgl", "backprop"])
def test_losses_of_regression_weights_and_ignored_pixels_are_learned_by_every_block(name, variant):
    model, task, x, y = VARIANTS[variant]()
    learner = Learner(model, name, task=task, lr=0.01)
    before = learner.evaluate(x, y).read()
    for _ in range(6):
        learner.step(x, y)
    after = learner.evaluate(x, y).read()
    assert all(after[key] < before[key] for key in before if key.endswith("/loss"))


@pytest.mark.parametrize("kind", [*PROBLEMS, *VARIANTS])
def test_backprop_with_a_task_is_the_plain_loop_with_its_loss_bit_for_bit(kind):
    model, task, x, y = (PROBLEMS | VARIANTS)[kind]()
    plain, learner = copy.deepcopy(model), Learner(model, "backprop", task=task, **PLAIN_SGD)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        learner.step(x, y)
        optimizer.zero_grad()
        task.fitted(plain(x)).loss(plain(x), y).backward()
        optimizer.step()
    assert same_bits(model, plain)


def test_batches_that_accumulate_weigh_as_much_as_counts_in_them():
    for variant in ("weights", "ignored pixels"):
        model, task, x, y = VARIANTS[variant]()
        if variant == "ignored pixels":
            y[3:] = y[3:].masked_fill(draw(1, 8, 8, seed=3) > -1, 9)  # hardly any of these count
        one = Learner(copy.deepcopy(model), "local_ce", task=task, **PLAIN_SGD)
        one.step(x, y)
        two = Learner(model, "local_ce", task=task, accumulate=2, **PLAIN_SGD)
        two.step(x[:3], y[:3])
        two.step(x[3:], y[3:])
        if variant == "weights":  # a block of half the resolution counts its own cells
            for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
                assert torch.allclose(a, b, atol=1e-6)
        else:
            assert torch.allclose(one.network.model[-1][0].bias, two.network.model[-1][0].bias, atol=1e-6)


# --- The objectives, written down


def linear_net(outputs):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, outputs))


def normal(mean, variance):
    return torch.distributions.Normal(mean, variance**0.5)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["mse", "gaussian"])
def test_sll_on_numbers_is_a_likelihood_and_the_distance_of_two_gaussians(loss):
    outputs = 2 if loss == "gaussian" else 1
    model, y = linear_net(outputs), TARGETS[:, 0]
    learner = Learner(model, "sll", task=Regression(loss), example=X)
    posteriors, likelihoods, h = [], [], X
    for i in range(2):
        h = model[i](h)
        v = F.layer_norm(h, h.shape[-1:]) @ learner.auxiliary[str(i)].matrix.T
        mean, variance = v[:, 0], v[:, 1].exp() if loss == "gaussian" else torch.full((B,), 0.5)
        posteriors.append((mean, variance))
        surprise = -normal(mean, variance).log_prob(y)
        likelihoods.append(surprise.mean() if loss == "gaussian" else (mean - y).square().mean())
    (m, a), (n, b) = posteriors
    grid = torch.linspace(-40, 40, 20_001)[:, None]
    coefficient = torch.trapezoid(
        (normal(m, a).log_prob(grid) / 2 + normal(n, b).log_prob(grid) / 2).exp(), grid, dim=0
    )
    found = learner.evaluate(X, y).read()
    assert found["0/loss"] == pytest.approx(float(likelihoods[0]), rel=1e-4)
    assert found["1/divergence"] == pytest.approx(float(-coefficient.log().mean()), rel=1e-3)
    assert found["1/loss"] == pytest.approx(float(likelihoods[1] - coefficient.log().mean()), rel=1e-3)


@torch.no_grad()
def test_sid_on_numbers_refines_a_gaussian_whose_divergence_is_torchs():
    model, y = linear_net(2), TARGETS[:, 0]
    learner = Learner(model, "sid", task=Regression("gaussian"), example=X, cuts=["0", "2"])
    learner.auxiliary["2"].weight.copy_(draw(2, 2))
    belief, h, wanted = torch.zeros(B, 2), X, {}
    for i, name in enumerate(["0", "head"]):
        h = model[0](h) if i == 0 else model[1:](h)
        new = learner.auxiliary["0"](belief, h) if i == 0 else h + belief @ learner.auxiliary["2"].weight.T
        before, after = (normal(z[:, 0], z[:, 1].exp()) for z in (belief, new))
        consistency = torch.distributions.kl_divergence(before, after).mean()
        surprise = -after.log_prob(y).mean()
        wanted[f"{name}/consistency"] = consistency
        wanted[f"{name}/label_kl"] = wanted["head/loss"] = surprise
        belief = new
    found = learner.evaluate(X, y).read()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(float(value), rel=1e-4)
    assert torch.allclose(learner(X), belief, atol=1e-5)


def test_a_posterior_of_another_resolution_is_averaged_over_the_cells():
    model = pyramid()
    learner = Learner(model, "sll", task=Segmentation(), example=MAPS)
    with torch.no_grad():
        fine, coarse = model[0](MAPS), model[1](model[0](MAPS))
        v = [
            F.layer_norm(h.movedim(1, -1), (8,)) @ learner.auxiliary[str(i)].matrix.T
            for i, h in enumerate((fine, coarse))
        ]
        p = v[0].softmax(-1).unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))
        distance = -(p * v[1].softmax(-1)).sqrt().sum(-1).log().mean()
    assert learner.evaluate(MAPS, PIXELS).read()["1/divergence"] == pytest.approx(float(distance), rel=1e-4)


@torch.no_grad()
def test_a_readout_of_pixels_is_a_1x1_convolution():
    learner = Learner(pyramid(), "local_ce", task=Segmentation(), example=MAPS)
    head, h = learner.auxiliary["1"], learner.network.model[1](learner.network.model[0](MAPS))
    logits = F.conv2d(h, head.weight[:, :, None, None], head.bias)
    wanted = F.cross_entropy(logits, learner.task.at(PIXELS, (4, 4)))
    assert learner.evaluate(MAPS, PIXELS).read()["1/loss"] == pytest.approx(float(wanted), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_boosting_steps_to_the_minimum_of_the_loss_along_the_stage(kind):
    """Newton's step is exact for squares; for several labels it is that of the quadratic model at F = 0."""
    model, task, x, y = PROBLEMS[kind]()
    learner = Learner(model, get("boosted")(updates=1), task=task, lr=1e-9)
    with torch.enable_grad():
        learner.step(x, y)
    stage = learner.auxiliary["0"]
    f = stage.readout(model[1](model[0](x)) if learner.network.blocks[0].name != "0" else model[0](x))
    if kind == "regression":
        wanted = (f * y).sum() / f.square().sum()
    else:
        wanted = (f * (y - 0.5)).sum() / (0.25 * f.square()).sum()
    assert float(stage.step()) == pytest.approx(max(float(wanted), 0.0), rel=1e-3)


# --- Refusals


@pytest.mark.parametrize(
    ("rule", "task", "match"),
    [
        ("local_ce", "regresion", "regression"),
        ("local_ce", "loss", "no task 'loss'"),
        ("local_ce", Regression, "give an instance"),
        ("sll", Loss(F.mse_loss), "cannot learn from a custom loss"),
        ("auglocal", Regression(positions="pixel"), "cannot learn from a label per pixel"),
        ("svp", Regression(), "cannot do regression"),
    ],
)
def test_a_task_that_cannot_be_is_refused_in_a_sentence(rule, task, match):
    with pytest.raises(LayerwiseError, match=match):
        Learner(perceptron(2), rule, task=task)


def test_options_that_are_about_classes_are_refused_with_other_tasks():
    about_classes = (("sll", {"dim": 5}), ("sll", {"targets": "codebook"}), ("mono_forward", {"predictor": "sum"}))
    for rule, options in about_classes:
        with pytest.raises(LayerwiseError, match="classes"):
            Learner(perceptron(2), get(rule)(**options), task=Regression(), example=X)
    with pytest.raises(LayerwiseError, match="direction"):
        Learner(perceptron(2), get("sid")(direction="reverse"), task=MultiLabel(), example=X)
    with pytest.raises(LayerwiseError, match="every pixel"):
        Learner(pyramid(), get("local_ce")(pool="mean"), task=Segmentation()).step(MAPS, PIXELS)


def test_metrics_have_an_accuracy_where_there_are_classes_alone():
    learner = Learner(perceptron(1), "local_ce", task="regression")
    with pytest.raises(LayerwiseError, match="rmse, mae, r2"):
        _ = learner.step(X, TARGETS[:, 0]).accuracy


def test_the_page_of_tasks_says_which_rule_can_do_which():
    page = (ROOT / "docs" / "tasks.md").read_text()
    kinds = ("classification", "soft_labels", "language_model", "regression", "multilabel", "segmentation", "loss")
    for name in rule_names():
        able = " | ".join("yes" if kind in get(name).tasks else "" for kind in kinds)
        assert f"| [`{name}`](rules/{name}.md) | {able} |" in page


@pytest.mark.parametrize("name", by_family(name for name in RULES if "segmentation" in get(name).tasks))
def test_labels_of_another_resolution_than_the_outputs_are_refused(name):
    learner = Learner(pyramid(), made(name), task=Segmentation(), example=MAPS)
    with pytest.raises(LayerwiseError, match="label"):
        learner.step(MAPS, PIXELS[:, ::2, ::2])
