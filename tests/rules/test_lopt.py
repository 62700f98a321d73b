"""LoPT and its control: which block learns from which loss, by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import PLAIN_SGD, batches, net, same_bits, trained

from layerwise import LanguageModel, Learner, models, rules

V, T, WIDTH = 20, 6, 12
TASK = LanguageModel(shift=False)


def decoder(depth=4):
    torch.manual_seed(0)
    return models.create("gpt", (1, 1, T), V, depth=depth, width=WIDTH, heads=2)


def tokens(step=0):
    draw = torch.Generator().manual_seed(step)
    return torch.randint(V, (4, T), generator=draw), torch.randint(V, (4, T), generator=draw)


def test_a_module_reconstructs_its_input_and_only_the_last_learns_the_task():
    cuts = ["stem", "block1", "block2", "block3", "block4"]  # modules: the embedding and two blocks, two blocks
    learner = Learner(decoder(), "lopt", cuts=cuts, task=TASK, example=tokens()[0], **PLAIN_SGD)
    assert [group.name for group in learner.groups] == ["stem..block2", "block3..head"]
    assert list(learner.auxiliary) == ["2"]
    decoding = learner.auxiliary["2"]
    assert [layer.weight.shape for layer in decoding.layers if isinstance(layer, torch.nn.Linear)] == [(3, 12), (12, 3)]
    plain, decode, (x, y) = copy.deepcopy(learner.network.model), copy.deepcopy(decoding), tokens()
    embedded = plain.stem(x)
    h = plain.block2(plain.block1(embedded))
    loss = 10 * F.mse_loss(decode(h), embedded.detach())
    lower = [*plain.stem.parameters(), *plain.block1.parameters(), *plain.block2.parameters(), *decode.parameters()]
    gradients = torch.autograd.grad(loss, lower)
    upper = [*plain.block3.parameters(), *plain.block4.parameters(), *plain.head.parameters()]
    logits = plain.head(plain.block4(plain.block3(h.detach())))
    gradients += torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), y.flatten()), upper)
    found = learner.step(x, y).read()
    assert found["block2/reconstruction"] == pytest.approx(float(loss.detach()) / 10, rel=1e-5)
    model = learner.network.model
    now = [p for name in ("stem", "block1", "block2") for p in getattr(model, name).parameters()]
    now += [*decoding.parameters()] + [
        p for name in ("block3", "block4", "head") for p in getattr(model, name).parameters()
    ]
    for p, g, moved in zip([*lower, *upper], gradients, now, strict=True):
        torch.testing.assert_close(moved, p - 0.1 * g, atol=1e-6, rtol=1e-4)


def test_the_mean_over_the_lower_modules_has_the_weight():
    learner = Learner(decoder(), rules.create("lopt", modules=4, weight=6.0), task=TASK)
    found = learner.step(*tokens()).read()
    for block in ("block1", "block2", "block3"):
        assert found[f"{block}/loss"] == pytest.approx(2 * found[f"{block}/reconstruction"], rel=1e-5)


def test_without_a_weight_it_is_its_control_whose_lower_modules_keep_their_bits():
    data = [tokens(step) for step in range(3)]
    frozen = trained(decoder(), "freeze_lower", data, task=TASK)
    assert same_bits(frozen, trained(decoder(), rules.create("lopt", weight=0), data, task=TASK))
    start, end = decoder(), frozen.network.model
    for name, block in start.named_children():
        assert same_bits(block, getattr(end, name)) == (name in ("stem", "block1", "block2"))
    assert not frozen.groups[0].optimizers and len(frozen.groups) == 2
    # The upper half is backprop on what the lower half gives.
    plain = decoder()
    for parameter in [*plain.stem.parameters(), *plain.block1.parameters(), *plain.block2.parameters()]:
        parameter.requires_grad_(False)
    whole = trained(plain, "backprop", data, task=TASK)
    torch.testing.assert_close(dict(whole.network.model.named_parameters()), dict(end.named_parameters()))


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_inputs_of_other_shapes_are_reconstructed_too(kind):
    learner = Learner(net(kind, depth=4), rules.create("lopt", modules=4), lr=0.01)
    before = {name: p.clone() for name, p in learner.network.named_parameters()}
    found = learner.step(*batches(1)[0]).read()
    assert len([name for name in found if name.endswith("reconstruction")]) == 3
    assert not [name for name, p in learner.network.named_parameters() if torch.equal(p, before[name])]
