"""Windows with their own losses: which loss trains which block, against gradients by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches, gone_on, net, problem, same_bits, trained

from layerwise import LayerwiseError, Learner, rules
from layerwise.rules.windows import WindowHeads

X, Y = problem(32)
SGD = {"optimizer": "sgd", "optimizer_options": {"momentum": 0.0, "nesterov": False}, "weight_decay": 0.0, "lr": 1.0}


def gradients(learner):
    """What a step with the rate 1 subtracts from each parameter."""
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    learner.step(X, Y)
    return {name: before[name] - p.detach() for name, p in learner.named_parameters()}


def close(found, name, loss, parameter):
    wanted = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
    return torch.allclose(found[name], wanted, atol=1e-5)


def test_a_block_learns_from_its_own_head_and_from_those_of_the_windows_that_it_sees():
    learner = Learner(net("mlp", 4), rules.create("local_ce", overlap=1, own=True), example=X, **SGD)
    one = copy.deepcopy(learner)
    model, heads = one.network.model, one.auxiliary
    found = gradients(learner)
    assert {name: (h.own is not None, h.window is not None) for name, h in heads.items()} == {
        "0": (True, False),  # no window ends at the first block
        "1": (True, True),
        "2": (True, True),
    }

    def ce(head, h):
        return F.cross_entropy(head(h), Y)

    h0 = model.block1(X)
    loss = ce(heads["0"].own, h0) + ce(heads["1"].window, model.block2(h0))
    assert close(found, "block1.linear.weight", loss, model.block1.linear.weight)
    h1 = model.block2(h0.detach())
    loss = ce(heads["1"].own, h1) + ce(heads["1"].window, h1) + ce(heads["2"].window, model.block3(h1))
    assert close(found, "block2.linear.weight", loss, model.block2.linear.weight)
    assert close(found, "auxiliary.1.own.weight", ce(heads["1"].own, h1), heads["1"].own.weight)
    assert close(found, "auxiliary.1.window.weight", ce(heads["1"].window, h1), heads["1"].window.weight)
    h2 = model.block3(h1.detach())
    head = F.cross_entropy(model.head(model.block4(h2)), Y)  # the window of the last block but one ends at the head
    loss = ce(heads["2"].own, h2) + ce(heads["2"].window, h2) + head
    assert close(found, "block3.linear.weight", loss, model.block3.linear.weight)


def test_without_own_losses_a_block_learns_from_windows_alone():
    learner = Learner(net("mlp", 3), rules.create("local_ce", overlap=1), example=X, **SGD)
    one = copy.deepcopy(learner)
    model, heads = one.network.model, one.auxiliary
    assert [*heads] == ["1"]
    loss = F.cross_entropy(heads["1"](model.block2(model.block1(X))), Y)
    assert close(gradients(learner), "block1.linear.weight", loss, model.block1.linear.weight)


def test_sll_reads_its_first_block_too():
    learner = Learner(net("mlp", 3), rules.create("sll", overlap=1, own=True, surrogate="none"), example=X, **SGD)
    one = copy.deepcopy(learner)
    model, readouts = one.network.model, one.auxiliary
    assert [*readouts] == ["0", "1"] and [*Learner(net("mlp", 3), "sll", example=X).auxiliary] == ["0", "1"]
    h0 = model.block1(X)
    loss = F.cross_entropy(readouts["0"](h0), Y) + F.cross_entropy(readouts["1"](model.block2(h0)), Y)
    assert close(gradients(learner), "block1.linear.weight", loss, model.block1.linear.weight)


@pytest.mark.parametrize(
    ("rule", "options"),
    [pytest.param("dgl", {"ahead": "both"}, marks=pytest.mark.slow), ("local_ce", {"group": 2}), ("sll", {})],
)
def test_windows_continue_to_the_same_bits_with_other_options(rule, options):
    model, data = net("resnet", 5), batches(3)
    one = rules.create(rule, overlap=1, own=True, **options)
    learner = trained(model, one, data)
    assert same_bits(learner, gone_on(model, one, data, stop=2))
    heads = [getattr(head, "head", head) for head in learner.auxiliary.values()]
    assert rule == "sll" or all(isinstance(head, WindowHeads) for head in heads)
    named = {"block1/loss", "block2/own_loss"} if rule == "dgl" else {"block2/loss"}
    assert named <= set(learner.step(*data[0]).read())


@pytest.mark.parametrize("rule", ["local_ce", "dgl", "sll"])
def test_own_losses_without_windows_are_refused(rule):
    with pytest.raises(LayerwiseError, match=r"own=true .* with overlap=0 both are one"):
        rules.create(rule, own=True)
