"""NoProp: what trains the embeddings and the schedule, and where prototypes start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, batches, net, problem, same_bits, trained
from support.noprop import X, Y, every_rule, made
from torch.distributions import Normal, kl_divergence

from layerwise import LayerwiseError, Learner, data
from layerwise.core.functional import (
    medoid,
    signal_share,
)
from layerwise.runs.arguments import train_options
from layerwise.runs.training import Run

# --- Who trains the embeddings and the schedule


@every_rule
def test_embeddings_learn_in_the_head_and_blocks_hold_the_copy_of_the_steps_start(rule):
    learner = made(rule, labels="learned", label_size=6)
    blocks = [getattr(learner.network.model, name) for name in learner.network.model.block_names]
    for x, y in batches(3):
        before = learner.network.model.head.embedding.detach().clone()
        learner.step(x, y)
        assert all(torch.equal(block.embedding, before) for block in blocks)
        assert not torch.equal(learner.network.model.head.embedding, before)


@pytest.mark.parametrize("rule", ["noprop_dt", "noprop_ct"])
def test_no_blocks_loss_moves_the_embeddings(rule):
    """They and the head have the same bits after a step, however much the blocks' losses count."""
    some, more = (made(rule, {"eta": eta}, labels="learned") for eta in (0.1, 10.0))
    for learner in (some, more):
        learner.step(X, Y)
    assert same_bits(some.network.model.head, more.network.model.head)


def test_the_head_moves_the_embeddings_by_cross_entropy_and_divergence():
    learner, seen = made("noprop_dt", labels="learned", label_size=6, depth=2), {}
    u = learner.network.model.head.embedding

    def loss(state):
        logits = learner.network.model.head(state)
        share = torch.tensor(signal_share(0, 2))
        q = Normal(share.sqrt() * u[Y], (1 - share).sqrt())
        divergence = kl_divergence(q, Normal(torch.zeros(()), torch.ones(()))).sum(1).mean()
        return F.cross_entropy(logits, Y) + divergence

    def keep(optimizer, *_):
        seen["found"] = u.grad.clone()

    learner.groups[-1].optimizers[0].register_step_pre_hook(keep)
    learner.network.model.head.register_forward_pre_hook(lambda module, given: seen.update(state=given[0]))
    expected = copy.deepcopy(learner.network.model.head.state_dict())
    learner.step(X, Y)
    learner.network.model.head.load_state_dict(expected)
    (wanted,) = torch.autograd.grad(loss(seen["state"].clone()), u)
    assert torch.allclose(seen["found"], wanted, atol=1e-6)


def test_the_schedule_learns_with_the_block_and_its_end_is_fixed():
    learner = made("noprop_ct")
    schedule = learner.network.model.block1.schedule
    before = {name: p.detach().clone() for name, p in schedule.named_parameters()}
    end = schedule(torch.ones(1, 1))[0].item()
    for x, y in batches(3):
        learner.step(x, y)
    assert not [name for name, p in schedule.named_parameters() if torch.equal(p, before[name])]
    assert schedule(torch.ones(1, 1))[0].item() == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize("offload", ["none", "host"])
def test_learned_embeddings_go_on_from_a_state_and_are_streamed_to_the_same_bits(offload):
    model = net("noprop", labels="learned")
    straight = trained(model, "noprop_dt", batches(3))
    state = copy.deepcopy(trained(model, "noprop_dt", batches(3)[:2]).state_dict())
    resumed = Learner(net("noprop", labels="learned"), "noprop_dt", offload=offload, example=X)
    resumed.load_state_dict(state)
    resumed.step(*batches(3)[2])
    logits = resumed(X)
    resumed.onload()
    assert same_bits(resumed, straight)
    assert torch.equal(logits, straight(X))


# --- Prototypes


def medoids(x, y):
    return torch.stack([x[y == k].flatten(1)[medoid(x[y == k].flatten(1))] for k in range(CLASSES)])


@every_rule
def test_prototypes_start_as_the_medoids_of_what_the_rule_is_shown(rule):
    x, y = problem(40, seed=3)
    shown, first = (made(rule, labels="prototype", embedding="mlp") for _ in range(2))
    shown.prepare(x, y)
    assert torch.equal(shown.network.model.head.embedding, medoids(x, y))
    shown.step(X, Y)
    first.step(X, Y)
    for learner, (images, labels) in ((shown, (x, y)), (first, (X, Y))):  # the block's copy is of the step's start
        assert torch.equal(learner.network.model.block1.embedding, medoids(images, labels))


def test_a_class_without_an_image_is_told():
    with pytest.raises(LayerwiseError, match=r"class 2 has none among the 2 samples .* Learner\.prepare"):
        made("noprop_dt", labels="prototype").step(X[:2], Y[:2])


def test_a_run_shows_the_rule_its_training_data(tmp_path):
    words = ["--data", "digits", "--rule", "noprop_fm", "--model", "noprop_fm", "--model.labels", "prototype"]
    run = Run(train_options([*words, "--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "run")], "train"))
    images = next(
        data.Batches(
            run.dataset.train, len(run.dataset.train), seed=0, mean=run.dataset.mean, std=run.dataset.std
        ).epoch(0)
    )
    for k, prototype in enumerate(run.learner.network.model.head.embedding):
        same = (images[0].flatten(1) - prototype).abs().amax(1) < 1e-6
        assert images[1][same].tolist()[:1] == [k]
