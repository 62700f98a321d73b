"""Whose matrix reads a block's outputs: its own, the network's, one random one for all, or one of a low rank."""

import copy

import pytest
import torch
from support.nets import CLASSES, PLAIN_SGD, batches, net, same_bits
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, Segmentation, models, rules

V, T, WIDTH = 40, 6, 12
TASK = LanguageModel(shift=False)
KINDS = ("private", "shared", "random", "low_rank")
RULES = ("local_ce", "mono_forward", "sll", "svp", "sid")


def decoder(depth=3, vocabulary=V, seed=0, **options):
    torch.manual_seed(seed)
    return models.create("gpt", (1, 1, T), vocabulary, depth=depth, **{"width": WIDTH, "heads": 2, **options})


def tokens(step=0, vocabulary=V):
    draw = torch.Generator().manual_seed(step)
    x = torch.randint(vocabulary, (4, T), generator=draw)
    y = torch.randint(vocabulary, (4, T), generator=draw)
    y[:, ::3] = -100
    return x, y


def learner_of(rule, model=None, **options):
    return Learner(model or decoder(), rule, task=TASK, example=tokens()[0], **{**PLAIN_SGD, **options})


def readout_of(learner, block=0):
    found = learner.auxiliary[str(block)]
    return getattr(found, "readout", None) or found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_shared_matrix_is_no_parameter_and_learns_through_the_head_alone(rule, kind):
    if kind == "low_rank" and rule in ("sll", "svp"):
        pytest.skip("its projection is never trained")
    learner = learner_of(rules.create(rule, readout=kind))
    own = sum(p.numel() for p in learner.auxiliary["0"].parameters())
    allowed = {"shared": 2 * WIDTH, "random": 2 * WIDTH, "low_rank": 64 * (V + WIDTH) + 2 * WIDTH}[kind]
    assert own <= allowed
    matrix = learner.network.model.head.linear.weight
    seen = []
    for group in learner.groups[:-1]:  # whose updates come before the head's
        group.parameters[0].register_post_accumulate_grad_hook(lambda _: seen.append(matrix.grad))
    for step in range(2):
        learner.step(*tokens(step))
    assert seen == [None] * len(seen) and len(seen) == 4


@pytest.mark.parametrize("rule", ["local_ce", "mono_forward", "sll", "sid"])
def test_what_a_block_says_moves_with_the_shared_matrix_and_not_with_a_random_one(rule):
    def loss_of_first(kind, factor):
        learner = learner_of(rules.create(rule, readout=kind))
        with torch.no_grad():
            learner.network.model.head.linear.weight.mul_(factor)
        return learner.evaluate(*tokens()).read()["block1/loss"]

    assert loss_of_first("shared", 1.0) != loss_of_first("shared", 3.0)
    assert loss_of_first("random", 1.0) == loss_of_first("random", 3.0)
    assert loss_of_first("private", 1.0) == loss_of_first("private", 3.0)


def test_the_matrix_is_that_of_the_start_of_the_step():
    """A block's update by hand: the gradient of its loss through the matrix as the last step left it."""
    learner = learner_of(rules.create("local_ce", readout="shared"))
    for step in range(2):
        model, head = copy.deepcopy(learner.network.model), copy.deepcopy(learner.auxiliary["1"])
        x, y = tokens(step)
        h = model.block1(model.stem(x)).detach()
        loss = torch.nn.functional.cross_entropy(
            (head.norm(model.block2(h)) @ model.head.linear.weight.detach().T).flatten(0, 1), y.flatten()
        )
        learner.step(x, y)
        # Block 1 has moved before block 2 reads: what it sent is the activation of before.
        gradients = torch.autograd.grad(loss, [*model.block2.parameters()])
        for p, g, now in zip(
            model.block2.parameters(), gradients, learner.network.model.block2.parameters(), strict=True
        ):
            torch.testing.assert_close(now, p - 0.1 * g, atol=1e-6, rtol=1e-5)


def test_where_all_blocks_are_one_graph_the_matrix_still_learns_from_the_head_alone():
    learner, (x, y) = learner_of(rules.create("deep_supervision", readout="shared")), tokens()
    model = copy.deepcopy(learner.network.model)
    torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    weight = model.head.linear.weight
    learner.step(x, y)
    torch.testing.assert_close(
        learner.network.model.head.linear.weight, weight - 0.1 * weight.grad, atol=1e-6, rtol=1e-5
    )


def test_one_random_matrix_is_held_once():
    learner = learner_of(rules.create("local_ce", readout="random"))
    first, second = (readout_of(learner, block).matrix for block in (0, 1))
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(
        first, readout_of(learner_of(rules.create("local_ce", readout="random"), decoder(seed=3))).matrix
    )
    assert abs(float(first.square().sum(1).mean()) - 1) < 0.3  # rows of mean square length 1
    assert "0.matrix" not in learner.auxiliary.state_dict()


@pytest.mark.parametrize("rule", ["local_ce", "mono_forward", "sll", "sid", "predsim"])
@pytest.mark.parametrize("kind", ["mlp", "vgg"])
def test_blocks_of_other_widths_are_adapted(rule, kind):
    learner = Learner(net(kind), rules.create(rule, readout="shared"), lr=0.01)
    data = batches(1)[0]
    first = learner.step(*data).read()
    for _ in range(12):
        last = learner.step(*data).read()
    block = learner.network.blocks[0].name
    assert last[f"{block}/loss"] < first[f"{block}/loss"]
    assert learner(data[0]).shape == (16, CLASSES)


@pytest.mark.parametrize("rule", ["local_ce", "sid"])
def test_a_state_and_an_offloaded_head_give_the_same_bits(rule):
    made = rules.create(rule, readout="shared")
    plain, offloaded = learner_of(made), learner_of(made, offload="host")
    for step in range(2):
        plain.step(*tokens(step))
        offloaded.step(*tokens(step))
    again = learner_of(made, decoder(seed=5))
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    for learner in (plain, offloaded, again):
        learner.step(*tokens(2))
    assert same_bits(again, plain)
    assert all(torch.equal(offloaded.state_dict()["model"][name], t) for name, t in plain.state_dict()["model"].items())
    assert torch.equal(plain(tokens(3)[0]), again(tokens(3)[0]))


def test_at_calls_with_a_tied_embedding_the_head_trains_the_matrix():
    learner = learner_of(rules.create("local_ce", readout="shared"), decoder(tied=True))
    before = learner.network.model.stem.embedding.weight.clone()
    learner.step(*tokens())
    assert not torch.equal(before, learner.network.model.stem.embedding.weight)
    with pytest.raises(LayerwiseError, match="this network has none"):
        learner_of(rules.create("local_ce", readout="shared"), decoder(tied=True), tied="first")


def test_mistakes_are_one_sentence():
    for name, options, words in [
        ("dgl", {"readout": "shared"}, "has no option 'readout'"),
        ("sll", {"readout": "low_rank"}, "choose private, shared or random"),
        ("sll", {"readout": "shared", "dim": 50}, "leave them out"),
        ("sid", {"readout": "random", "hidden": 8}, "leave it out"),
    ]:
        with pytest.raises(LayerwiseError, match=words):
            rules.create(name, **options)
    with pytest.raises(LayerwiseError, match="legal names: private, shared"):
        learner_of(rules.create("local_ce", readout="public"))
    maps = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 1))
    learner = Learner(maps, rules.create("local_ce", readout="shared"), cuts=["0", "1"], task=Segmentation())
    with pytest.raises(LayerwiseError, match='choose readout="private"'):
        learner.step(torch.randn(2, 1, 8, 8), torch.randint(3, (2, 4, 4)))


def test_a_warning_names_the_sizes_where_readouts_outweigh_the_blocks():
    x = tokens(vocabulary=9000)[0]
    with pytest.warns(UserWarning, match=r"readouts of rule 'local_ce' .* 234,000 .* blocks") as seen:
        Learner(decoder(vocabulary=9000), "local_ce", task=TASK, example=x)
    assert len(seen) == 1
    for rule in (rules.create("local_ce", readout="shared"), "backprop"):
        Learner(decoder(vocabulary=9000), rule, task=TASK, example=x)


@pytest.mark.parametrize("rule", ["sll", "svp", "sid", "local_ce"])
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_positions_without_a_label_are_as_if_they_were_not_there(rule, kind):
    """In a network that looks at every position alone."""

    def after(x, y):
        torch.manual_seed(0)
        layers = [
            nn.Embedding(V, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, V),
        ]
        model = nn.Sequential(*layers)
        learner = Learner(model, rules.create(rule, readout=kind), cuts=["0", "2", "3"], task=TASK, **PLAIN_SGD)
        found = [learner.step(x, y).read() for _ in range(2)]
        return learner, found

    x, y = torch.randint(V, (4, T)), torch.randint(V, (4, T))
    ignored = y.clone()
    ignored[:, 3:] = -100
    (one, found), (other, wanted) = after(x, ignored), after(x[:, :3], y[:, :3])
    for step in (0, 1):
        assert found[step] == pytest.approx(wanted[step], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [("local_ce", {"readout": "shared"}), ("solo", {"depth": 1})])
def test_memory_is_flat_in_depth_and_below_the_rivals_with_a_large_vocabulary(rule):
    vocabulary, length = 32_000, 64

    def held(name, depth, /, **options):
        torch.manual_seed(0)
        model = models.create("gpt", (1, 1, length), vocabulary, depth=depth, width=24, heads=4)
        task = LanguageModel(shift=False, positions_at_once=4)
        learner = Learner(model, rules.create(name, **options), task=task, **PLAIN_SGD)
        x = torch.randint(vocabulary, (8, length))
        learner.step(x, x)
        _, use = learner.measured_step(x, x)
        return use.activations + use.gradients

    name, options = rule
    few, some, many = (held(name, depth, **options) for depth in (4, 16, 64))
    assert max(few, some, many) <= 1.02 * min(few, some, many)
    for rival in ("backprop", "backprop_checkpoint"):  # with the same loss in chunks
        assert few < held(rival, 8)
