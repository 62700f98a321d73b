"""Rules for streams: hedge backpropagation and continual backpropagation."""

import pytest
import torch
import torch.nn.functional as F
from support.nets import KINDS, PLAIN_SGD, batches, linear_blocks, net, problem, same_bits, trained, vectors

from layerwise import LayerwiseError, Learner, create_rule
from layerwise.core.tasks import Classification
from layerwise.rules.hedge_backprop import HedgeWeights

DATA = batches(3)
X, Y = problem(32)


# --- Hedge backpropagation


def weights_of(learner):
    return [*learner.auxiliary.values()][-1].running_weights


def test_without_a_floor_a_weight_is_the_discount_to_the_sum_of_its_losses():
    losses, hedge = torch.tensor([[0.3, 2.0, 0.7], [1.0, 0.1, 0.5], [0.0, 3.0, 0.2]]), HedgeWeights(3)
    for row in losses:
        hedge.follow(row, discount=0.9, smoothing=0.0)
    expected = 0.9 ** losses.sum(0)
    torch.testing.assert_close(hedge.running_weights, expected / expected.sum())


def test_no_classifier_falls_under_the_floor_and_a_better_one_gets_the_weight_back():
    hedge, (s, n) = HedgeWeights(2), (0.2, 2)
    for _ in range(50):
        hedge.follow(torch.tensor([0.0, 9.0]), discount=0.5, smoothing=s)
    # The fixed point of a <- a / (a + s/N).
    torch.testing.assert_close(hedge.running_weights, torch.tensor([1 - s / n, s / n]))
    for _ in range(2):  # the first makes both as large as the floor
        hedge.follow(torch.tensor([9.0, 0.0]), discount=0.5, smoothing=s)
    assert hedge.running_weights.argmax() == 1


def test_the_weights_of_a_learner_follow_the_losses_of_its_classifiers():
    """By the definition: from the losses that each step reports, and that of the network's own output."""
    learner = Learner(net("mlp"), create_rule("hedge_backprop", discount=0.7, smoothing=0.3), example=X)
    expected = [1 / 3] * 3
    for x, y in DATA:
        with torch.no_grad():
            last = float(F.cross_entropy(learner.network.model(x), y))
        read = learner.step(x, y).read()
        losses = [read["block1/loss"], read["block2/loss"], last]
        assert read["head/depth"] == pytest.approx(sum(w * i for i, w in enumerate(expected, 1)), rel=1e-5)
        raised = [max(w * 0.7**loss, 0.1) for w, loss in zip(expected, losses, strict=True)]
        expected = [w / sum(raised) for w in raised]
        assert weights_of(learner).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_classifier_it_is_backpropagation_to_the_bit(kind):
    model = net(kind, depth=1, dropout=0.2)
    found = trained(model, "hedge_backprop", DATA)
    assert same_bits(found.network, trained(model, "backprop", DATA).network)


def test_a_block_follows_the_gradient_of_the_weighted_losses():
    model, (x, y) = linear_blocks(), vectors()
    cuts = {"cuts": ["0", "1", "2"], "example": x}
    learner = Learner(model, create_rule("hedge_backprop", discount=0.1, smoothing=0.0), **PLAIN_SGD, **cuts)
    learner.step(x, y)  # so that the weights differ
    alpha, first = weights_of(learner).clone(), model[0].weight
    h, losses = x, []
    for block, classifier in zip(model[:2], learner.auxiliary.values(), strict=False):
        h = block(h)
        losses.append(F.cross_entropy(classifier.readout(h), y))
    losses.append(F.cross_entropy(model[3](model[2](h)), y))
    weighted = sum(a * loss for a, loss in zip(alpha, losses, strict=True))
    (gradient,) = torch.autograd.grad(weighted, first)
    before = first.detach().clone()
    learner.step(x, y)
    assert alpha.std() > 0.01
    torch.testing.assert_close(first.detach(), before - 0.1 * gradient)


def test_the_prediction_is_the_weighted_sum_of_the_classifiers_probabilities():
    learner = trained(net("mlp"), create_rule("hedge_backprop", discount=0.5), DATA)
    model = learner.network.model.eval()
    with torch.no_grad():
        h1 = model.block1(X)
        h2 = model.block2(h1)
        outputs = [learner.auxiliary["0"].readout(h1), learner.auxiliary["1"].readout(h2), model(X)]
        expected = sum(w * z.softmax(-1) for w, z in zip(weights_of(learner), outputs, strict=True))
        torch.testing.assert_close(learner(X).softmax(-1), expected)
        loss = F.nll_loss(expected.log(), Y)
    assert learner.evaluate(X, Y).read()["head/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_labels_per_position_need_the_task_of_positions():
    x, y = torch.randint(8, (4, 5)), torch.randint(8, (4, 5))
    model = torch.nn.Sequential(torch.nn.Embedding(8, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 8))
    learner = Learner(model, "hedge_backprop", cuts=["0", "1"], task=Classification(8), example=x)
    with pytest.raises(LayerwiseError, match="language model"):
        learner.step(x, y)
