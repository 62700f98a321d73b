"""SOLO: the network's own matrix and kind of block read every module; its equations, and where it is `local_ce`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import PLAIN_SGD, batches, net, same_bits, trained

from layerwise import LanguageModel, LayerwiseError, Learner, cut_at_calls, models, rules

V, T, WIDTH = 40, 6, 12
TASK = LanguageModel(shift=False)


def decoder(depth=4, seed=0, **options):
    torch.manual_seed(seed)
    return models.create("gpt", (1, 1, T), V, depth=depth, **{"width": WIDTH, "heads": 2, **options})


def tokens(step=0):
    draw = torch.Generator().manual_seed(step)
    x, y = (torch.randint(V, (4, T), generator=draw) for _ in range(2))
    y[:, ::3] = -100
    return x, y


def solo(**options):
    return rules.create("solo", **options)


@pytest.mark.parametrize("group", [1, 2])
def test_without_blocks_and_with_private_matrices_it_is_local_ce_bit_for_bit(group):
    data = [tokens(step) for step in range(3)]
    made = solo(depth=0, readout="private", group=group)
    one = trained(decoder(), made, data, task=TASK)
    assert same_bits(one, trained(decoder(), rules.create("local_ce", group=group), data, task=TASK))
    assert made.locality == "local"
    data = batches(3)
    ours = [trained(net(kind), solo(depth=0, readout="private"), data) for kind in ("mlp", "vgg")]
    theirs = [trained(net(kind), "local_ce", data) for kind in ("mlp", "vgg")]
    assert all(map(same_bits, ours, theirs))


def test_with_a_separate_head_the_matrix_learns_alone_and_the_last_module_like_the_others():
    made = solo(depth=0, group=2, head="separate")
    assert made.groups(4) == [range(0, 2), range(2, 4), range(4, 5)]
    learner = Learner(decoder(), made, task=TASK, example=tokens()[0], **PLAIN_SGD)
    assert list(learner.auxiliary) == ["1", "3"]
    model, own, (x, y) = copy.deepcopy(learner.network.model), copy.deepcopy(learner.auxiliary["3"]), tokens()
    with torch.no_grad():
        h = model.block2(model.block1(model.stem(x)))
    matrix = model.head.linear.weight.detach()
    out = model.block4(model.block3(h))
    u = own.scale * F.rms_norm(out, (WIDTH,), own.readout.norm.weight, eps=1e-6)
    leaves = [*model.block3.parameters(), *model.block4.parameters()]
    gradients = torch.autograd.grad(F.cross_entropy((u @ matrix.T).flatten(0, 1), y.flatten()), leaves)
    loss = F.cross_entropy(model.head(out.detach()).flatten(0, 1), y.flatten())
    gradients += torch.autograd.grad(loss, list(model.head.parameters()))
    wanted = [p.detach() - 0.1 * g for p, g in zip([*leaves, *model.head.parameters()], gradients, strict=True)]
    learner.step(x, y)
    now = learner.network.model
    found = [p.detach() for part in (now.block3, now.block4, now.head) for p in part.parameters()]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_the_loss_of_a_module_is_that_of_the_equations():
    learner = Learner(decoder(), solo(group=2, depth=1), task=TASK, example=tokens()[0], **PLAIN_SGD)
    head = learner.auxiliary["1"]
    assert list(learner.auxiliary) == ["1"]
    with torch.no_grad():
        head.scale.fill_(1.7)
        head.readout.norm.weight.uniform_(0.5, 1.5)
    model, own, (x, y) = copy.deepcopy(learner.network.model), copy.deepcopy(head), tokens()
    h = model.block2(model.block1(model.stem(x)))
    matrix = model.head.linear.weight.detach()
    u = F.rms_norm(own.copies.layers(h), (WIDTH,), own.readout.norm.weight, eps=1e-6)
    loss = F.cross_entropy((own.scale * u @ matrix.T).flatten(0, 1), y.flatten())
    leaves = [*model.block1.parameters(), *model.block2.parameters(), *own.parameters()]
    gradients = torch.autograd.grad(loss, leaves)
    found = learner.step(x, y)
    torch.testing.assert_close(found.blocks["block2"]["loss"].detach(), loss.detach())
    now = [*learner.network.model.block1.parameters(), *learner.network.model.block2.parameters(), *head.parameters()]
    for p, g, moved in zip(leaves, gradients, now, strict=True):
        torch.testing.assert_close(moved, p - 0.1 * g, atol=1e-6, rtol=1e-5)


def test_the_matrix_has_no_gradient_until_the_last_module_learns_and_no_weight_decay_moves_the_scale():
    learner = Learner(decoder(), solo(group=2), task=TASK, example=tokens()[0], lr=1e-3, weight_decay=0.5)
    matrix, seen = learner.network.model.head.linear.weight, []
    scale = learner.auxiliary["1"].scale
    scale.register_post_accumulate_grad_hook(lambda _: seen.append(matrix.grad))
    learner.step(*tokens())
    assert seen == [None]
    kept = [group for o in learner.groups[0].optimizers for group in o.param_groups]
    decays = [group["weight_decay"] for group in kept if any(p is scale for p in group["params"])]
    assert decays == [0.0]


@pytest.mark.slow
def test_a_copy_is_renewed_every_few_steps_and_a_state_keeps_it():
    def losses(learner, steps):
        return [learner.step(*tokens(step)).read()["block2/loss"] for step in steps]

    often, seldom = (Learner(decoder(), solo(group=2, refresh=n), task=TASK, lr=0.02) for n in (1, 3))
    one, other = losses(often, range(5)), losses(seldom, range(5))
    assert one[0] == other[0] and one[1] != other[1]  # the first step looks, the second does not
    first, copy_of = decoder().head.linear.weight, lambda learner: learner.network.output_copy
    fresh = Learner(decoder(), solo(group=2, refresh=3), task=TASK, lr=0.02)
    for step in range(4):
        before = fresh.network.model.head.linear.weight.detach().clone()
        fresh.step(*tokens(step))
        assert torch.equal(copy_of(fresh), before if step == 3 else first)
    again = Learner(decoder(seed=1), solo(group=2, refresh=3), task=TASK, lr=0.02)
    again.load_state_dict(copy.deepcopy(fresh.state_dict()))
    assert losses(again, [4]) == losses(fresh, [4]) and same_bits(again, fresh)
    same = Learner(decoder(), solo(group=2, refresh=1, depth=2), task=TASK, lr=0.02)
    assert losses(same, range(5)) == one
    in_parts = Learner(decoder(), solo(group=2, refresh=3), task=TASK, lr=0.02, micro=2)
    assert losses(in_parts, range(5)) == pytest.approx(other, rel=1e-4)
    damaged = copy.deepcopy(fresh.state_dict())
    del damaged["output_matrix"]
    with pytest.raises(LayerwiseError, match="the copy of the output matrix, 'output_matrix', is missing"):
        again.load_state_dict(damaged)


@pytest.mark.parametrize("readout", ["shared", "private", "random", "low_rank"])
def test_it_learns_and_predicts_plainly(readout):
    learner = Learner(decoder(), solo(group=2, depth=1, readout=readout), task=TASK, lr=0.01)
    x, y = tokens()
    first = learner.step(x, y).read()
    for _ in range(15):
        last = learner.step(x, y).read()
    assert last["block2/loss"] < first["block2/loss"] and last["head/loss"] < first["head/loss"]
    torch.testing.assert_close(learner(x), learner.network.model.eval()(x))
    assert learner.rule.locality == ("broadcast" if readout == "shared" else "local")


def test_at_calls_it_copies_the_modules_of_regular_models():
    model = decoder()
    learner = Learner(cut_at_calls(model, model.block_names), solo(group=2, depth=1), task=TASK, **PLAIN_SGD)
    plain = Learner(decoder(), solo(group=2, depth=1), task=TASK, **PLAIN_SGD)
    for step in range(2):
        learner.step(*tokens(step))
        plain.step(*tokens(step))
    assert same_bits(learner.network.model, plain.network.model)
