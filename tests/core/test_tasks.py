"""Losses and metrics of each task, against torch's and scikit-learn's own functions."""

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as judged

from layerwise import Classification, LanguageModel, LayerwiseError, Loss, MultiLabel, Regression, Segmentation
from layerwise.core.posteriors import Bernoullis, Categorical, Gaussian, divergence


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(high, *shape, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def values(found):
    return {name: float(value) for name, value in found.items()}


def summed(task, pieces):
    """The metrics of several batches, out of the sums of each."""
    parts = [task.statistics(outputs, y) for outputs, y in pieces]
    return values(task.measures({name: sum(part[name] for part in parts) for name in parts[0]}))


# --- Classes


def test_classes_have_torchs_weights_smoothing_and_ignored_label():
    logits, y = draw(12, 3), numbers(3, 12)
    y[4] = 7
    task = Classification(3, 0.1, weights=(1, 2, 0.5), ignore_index=7)
    wanted = F.cross_entropy(logits, y, torch.tensor([1, 2, 0.5]), ignore_index=7, label_smoothing=0.1)
    assert torch.equal(task.loss(logits, y), wanted)
    assert task.counted(y, True) == pytest.approx(sum({0: 1, 1: 2, 2: 0.5}[int(k)] for k in y if k != 7))
    right = (logits.argmax(1) == y).sum() / 11
    assert values(task.metrics(logits, y)) == {"accuracy": pytest.approx(float(right))}


def test_soft_labels_are_probabilities_of_classes():
    logits, y = draw(6, 3), draw(6, 3, seed=4).softmax(-1)
    task = Classification(3)
    assert torch.equal(task.loss(logits, y), F.cross_entropy(logits, y))
    assert task.loss(logits, F.one_hot(numbers(3, 6), 3).float()) == pytest.approx(
        float(task.loss(logits, numbers(3, 6)))
    )
    assert float(task.accuracy(logits, y)) == pytest.approx(float((logits.argmax(1) == y.argmax(1)).float().mean()))
    assert not task.per_position(y) and task.per_position(numbers(3, 6, 2))
    for wrong in (2 * y, -y, y[:, :2]):
        with pytest.raises(LayerwiseError, match="probabilit"):
            task.check(wrong)


def test_a_weight_is_needed_for_every_class_and_no_weight_is_negative():
    with pytest.raises(LayerwiseError, match="one per class"):
        Classification(weights=(1.0, 2.0)).fitted(torch.zeros(1, 3))
    with pytest.raises(LayerwiseError, match="weights"):
        Classification(weights=(1.0, -2.0))


# --- Numbers


TORCHS = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": lambda o, t: F.huber_loss(o, t, delta=0.7),
    "gaussian": lambda o, t: F.gaussian_nll_loss(o[:, :2], t, o[:, 2:].exp(), full=True),
}


@pytest.mark.parametrize("name", TORCHS)
def test_a_regression_has_torchs_loss_on_standardised_targets(name):
    outputs, y = draw(9, 4 if name == "gaussian" else 2), 10 * draw(9, 2, seed=3) + 5
    mean, std = (5.0, 4.0), (10.0, 8.0)
    task = Regression(name, delta=0.7, mean=mean, std=std).fitted(outputs)
    wanted = TORCHS[name](outputs, (y - torch.tensor(mean)) / torch.tensor(std))
    assert float(task.loss(outputs, y)) == pytest.approx(float(wanted), rel=1e-5)
    assert task.targets == 2
    predicted = outputs[:, :2] * torch.tensor(std) + torch.tensor(mean)
    assert torch.allclose(task.decode(outputs), predicted)
    assert values(task.metrics(outputs, y)) == {
        "rmse": pytest.approx(judged.mean_squared_error(y, predicted) ** 0.5, rel=1e-5),
        "mae": pytest.approx(judged.mean_absolute_error(y, predicted), rel=1e-5),
        "r2": pytest.approx(judged.r2_score(y, predicted), rel=1e-5),
    }


def test_one_target_may_be_a_vector_and_does_not_broadcast():
    outputs, y = draw(8, 1), draw(8, seed=2)
    task = Regression().fitted(outputs)
    assert float(task.loss(outputs, y)) == pytest.approx(float(F.mse_loss(outputs[:, 0], y)))
    with pytest.raises(LayerwiseError, match="shape"):
        Regression().fitted(draw(8, 2)).check(y)
    with pytest.raises(LayerwiseError, match="two per target"):
        Regression("gaussian").fitted(outputs)
    with pytest.raises(LayerwiseError, match="not finite"):
        task.check(y.where(y > 0, torch.nan))
    with pytest.raises(LayerwiseError, match="loss is 'mae'"):
        Regression("mae")


def test_a_map_of_numbers_is_averaged_over_the_cells_of_a_coarser_block():
    y = draw(2, 4, 6)
    coarse = Regression(positions="pixel").with_outputs(1).at(y, (2, 3))
    assert torch.allclose(coarse[:, 0], y.unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean((2, 4)))


# --- Several labels


def test_several_labels_have_the_binary_cross_entropy_and_metrics_that_are_sums():
    logits, y = draw(10, 5), (draw(10, 5, seed=2) > 0.3).float()
    task = MultiLabel().fitted(logits)
    assert float(task.loss(logits, y)) == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, y)))
    z, labels = draw(64, 7).requires_grad_(), (draw(64, 7, seed=2) > 0).float()
    ours, plain = (
        torch.autograd.grad(loss(z, labels), z)[0] for loss in (task.loss, F.binary_cross_entropy_with_logits)
    )
    assert torch.equal(ours, plain)
    predicted = (logits >= 0).int()
    wanted = {
        "f1": pytest.approx(judged.f1_score(y.int(), predicted, average="micro")),
        "exact_match": pytest.approx(judged.accuracy_score(y.int(), predicted)),
    }
    assert values(task.metrics(logits, y)) == wanted == summed(task, [(logits[:3], y[:3]), (logits[3:], y[3:])])
    for wrong in (y + 1, y[:, :4], y[:, 0]):
        with pytest.raises(LayerwiseError):
            task.check(wrong)


# --- Pixels


def test_pixels_have_the_cross_entropy_and_the_intersection_over_union_of_scikit_learn():
    logits, y = draw(3, 4, 6, 5), numbers(3, 3, 6, 5)  # class 3 is in no label
    y[:, 0] = 255
    task = Segmentation(ignore=255).fitted(logits)
    assert float(task.loss(logits, y)) == pytest.approx(float(F.cross_entropy(logits, y, ignore_index=255)), rel=1e-6)
    keep, predicted = y != 255, logits.argmax(1)
    wanted = {
        "miou": pytest.approx(judged.jaccard_score(y[keep], predicted[keep], average="macro")),
        "pixel_accuracy": pytest.approx(judged.accuracy_score(y[keep], predicted[keep])),
    }
    assert values(task.metrics(logits, y)) == wanted == summed(task, [(logits[:1], y[:1]), (logits[1:], y[1:])])
    assert task.counted(y, False) == int(keep.sum())


@pytest.mark.parametrize("places", [(6, 4), (3, 4), (3, 2), (4, 3), (1, 1), (12, 4), (9, 2)])
def test_the_label_of_a_cell_is_its_most_frequent_class(places):
    y = numbers(3, 2, 6, 4).masked_fill(draw(2, 6, 4) > 0.5, -100)
    y[0, :, 0] = -100
    found = Segmentation().with_outputs(3).at(y, places)
    assert found.shape == (2, *places)
    for b in range(2):
        for i in range(places[0]):
            for j in range(places[1]):
                rows = [r for r in range(6) if r * places[0] // 6 == i] if places[0] <= 6 else None
                columns = [c for c in range(4) if c * places[1] // 4 == j]
                if rows is None:  # finer than the labels: the one at its middle
                    rows = [((2 * i + 1) * 6 // (2 * places[0]))]
                cell = [int(y[b, r, c]) for r in rows for c in columns if y[b, r, c] != -100]
                wanted = min(set(cell), key=lambda k: (-cell.count(k), k)) if cell else -100
                assert int(found[b, i, j]) == wanted


def test_labels_of_pixels_are_checked():
    task = Segmentation().with_outputs(3)
    for wrong in (numbers(3, 4), numbers(3, 2, 4, 4).float(), numbers(9, 2, 4, 4), torch.full((2, 4, 4), -100)):
        with pytest.raises(LayerwiseError):
            task.check(wrong)
    with pytest.raises(LayerwiseError, match="scale the output up"):
        task.loss(draw(2, 3, 2, 2), numbers(3, 2, 4, 4))
    with pytest.raises(LayerwiseError, match="needs maps"):
        Segmentation().fitted(draw(2, 3))


# --- Any function


def test_a_loss_of_ones_own_is_called_in_single_precision_and_gives_a_scalar():
    seen = []
    task = Loss(lambda outputs, y: seen.append(outputs.dtype) or (outputs - y).square().mean())
    outputs = draw(4, 2)
    assert float(task.loss(outputs.bfloat16(), outputs)) < 1e-4 and seen == [torch.float32]
    assert task.fitted(outputs).outputs == 2 and Loss(F.mse_loss, outputs=5).fitted(outputs).outputs == 5
    with pytest.raises(LayerwiseError, match="scalar"):
        Loss(lambda outputs, y: outputs).loss(outputs, outputs)
    with pytest.raises(LayerwiseError, match="give a function"):
        Loss("focal")
    for broken in (lambda outputs, y: 1 / 0, lambda outputs: outputs.sum(), lambda outputs, y: outputs[9]):
        with pytest.raises(LayerwiseError, match=r"the loss function fails for outputs of shape \(.*correct it"):
            Loss(broken).loss(outputs, outputs)


# --- Posteriors


def test_distances_of_gaussians_are_the_integrals_that_define_them():
    p = Gaussian(torch.tensor([0.3]), torch.tensor([0.4]))
    q = Gaussian(torch.tensor([-0.9]), torch.tensor([-0.7]))
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    one, two = (
        torch.distributions.Normal(g.mean.double(), (0.5 * g.log_variance.double()).exp()).log_prob(x) for g in (p, q)
    )
    coefficient = float(torch.trapezoid((0.5 * (one + two)).exp(), x))
    assert float(p.log_bc(q).exp()) == pytest.approx(coefficient, rel=1e-5)
    assert float(p.kl(q)) == pytest.approx(float(torch.trapezoid(one.exp() * (one - two), x)), rel=1e-5)
    assert float(p.entropy()) == pytest.approx(float(torch.trapezoid(-one.exp() * one, x)), rel=1e-5)
    assert float(p.log_bc(p).abs()) < 1e-6 and float(p.kl(p).abs()) < 1e-6


def test_the_coefficient_of_independent_labels_is_the_product_of_theirs():
    a, b = draw(4, 3), draw(4, 3, seed=5)
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # (8, 3)
    joint = [
        Categorical((outcomes * F.logsigmoid(z)[:, None] + (1 - outcomes) * F.logsigmoid(-z)[:, None]).sum(-1))
        for z in (a, b)
    ]
    p, q = Bernoullis(a), Bernoullis(b)
    assert torch.allclose(p.log_bc(q).sum(-1), joint[0].log_bc(joint[1]), atol=1e-6)
    assert torch.allclose(p.kl(q).sum(-1), joint[0].kl(joint[1]), atol=1e-5)
    assert torch.allclose(p.entropy().sum(-1), joint[0].entropy(), atol=1e-5)


@pytest.mark.parametrize("name", ["neg_log_bc", "one_minus_bc", "hellinger", "kl"])
@pytest.mark.parametrize(
    "made", [Bernoullis, lambda z: Gaussian(z, (0.5 * z).clamp(-12, 12)), lambda z: Categorical(z.log_softmax(-1))]
)
def test_a_divergence_is_zero_for_the_same_posterior_and_finite_far_apart(name, made):
    z = draw(5, 3).requires_grad_()
    same, far = divergence(name, made(z.detach()), made(z)), divergence(name, made(-40 * z.detach()), made(40 * z))
    assert bool((same.abs() < 4e-4).all()) and bool(torch.isfinite(far).all())
    assert bool((divergence(name, made(z.detach() + torch.tensor([1.0, 0, 0])), made(z)) > 1e-3).any())
    (same.sum() + far.sum()).backward()
    assert bool(torch.isfinite(z.grad).all())


def test_the_shift_of_a_language_model_is_where_it_was():
    y = torch.tensor([[1, 2, 0, -100]])
    assert LanguageModel().with_classes(3).aligned(y).tolist() == [[2, 0, -100, -100]]
    assert LanguageModel(ignore=2).with_classes(3).aligned(y).tolist() == [[-100, 0, -100, -100]]
