"""Closed forms of the rules' losses and gradients, their options, and how rules are found by name."""

import importlib.metadata
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, batches, net, problem, same_bits, tensors, trained
from torch import nn

from layerwise import BlockContext, Classification, LayerwiseError, Learner, Site, create_rule, rule_names
from layerwise.core.progress import Trace
from layerwise.core.rule import by_depth
from layerwise.rules import SLL, get

X, Y = batches(1)[0]
TASK = Classification(CLASSES)
PLAIN = {"norm": "none", "projection": "orthonormal"}


def moment(rule, h, y, *, index=0, blocks=3, task=TASK, message=None):
    site = Site(index, blocks, f"block{index + 1}")
    torch.manual_seed(index)
    auxiliary = rule.auxiliary(site, h.detach(), task)
    return BlockContext(site, h, h, message, y, task, auxiliary, training=True)


def hidden(samples=6, width=CLASSES, seed=0):
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed))


def readout(at):
    """The block's v, whatever the readout is."""
    return at.auxiliary(at.h).detach()


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


# --- SLL


@pytest.mark.parametrize("dim", [None, CLASSES, 9])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_the_likelihood_of_a_uniform_posterior_is_the_logarithm_of_its_size(dim, norm):
    rule = create_rule("sll", dim=dim, norm=norm)
    loss = rule.signal(moment(rule, torch.zeros(6, 5), LABELS)).loss
    assert loss.item() == pytest.approx(math.log(dim or CLASSES), rel=1e-5)


@pytest.mark.parametrize("surrogate", ["neg_log_bc", "one_minus_bc", "hellinger", "kl"])
def test_neighbours_that_agree_have_no_divergence(surrogate):
    rule = create_rule("sll", surrogate=surrogate)
    first = moment(rule, hidden(), LABELS)
    sent = rule.signal(first)
    assert "divergence" not in sent.metrics  # the first block has no neighbour
    second = rule.signal(replace(first, message=sent.message))
    assert second.metrics["divergence"].item() == pytest.approx(0, abs=1e-3)
    assert second.loss.item() == pytest.approx(sent.loss.item(), abs=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("likelihood_weight", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("surrogate", ["neg_log_bc", "one_minus_bc"])
def test_the_gradient_on_the_logits_is_its_closed_form(surrogate, weight, likelihood_weight):
    """w (q - e_y) + (lambda / 2) (q - r), r = sqrt(p q) / BC, per sample and over B; times BC for 1 - BC."""
    rule = create_rule("sll", surrogate=surrogate, weight=weight, likelihood_weight=likelihood_weight, **PLAIN)
    first = moment(rule, hidden(seed=1), LABELS)
    message = rule.signal(first).message
    h = hidden(seed=2).requires_grad_()
    at = moment(rule, h, LABELS, index=1, message=message)
    rule.signal(at).loss.backward()
    matrix = at.auxiliary(torch.eye(CLASSES)).T  # v = R h, and R is orthonormal here
    assert torch.allclose(matrix @ matrix.T, torch.eye(CLASSES), atol=1e-5)
    found = h.grad @ matrix.T
    p, q = readout(first).softmax(-1), readout(at).softmax(-1)
    bc = (p * q).sqrt().sum(-1, keepdim=True)
    pull = 0.5 * (q - (p * q).sqrt() / bc) * (bc if surrogate == "one_minus_bc" else 1.0)
    expected = likelihood_weight * (q - F.one_hot(LABELS, CLASSES)) + weight * pull
    assert torch.allclose(found, expected / len(LABELS), atol=1e-6)


def test_no_gradient_reaches_the_neighbours_posterior():
    rule = create_rule("sll")
    h = hidden(seed=1).requires_grad_()
    message = rule.signal(moment(rule, h, LABELS)).message
    rule.signal(moment(rule, hidden(seed=2).requires_grad_(), LABELS, index=1, message=message)).loss.backward()
    assert h.grad is None


def test_kl_is_from_the_neighbour_to_the_block():
    rule = create_rule("sll", surrogate="kl", likelihood_weight=0.0)
    first = moment(rule, hidden(seed=1), LABELS)
    at = moment(rule, hidden(seed=2), LABELS, index=1, message=rule.signal(first).message)
    log_p, log_q = readout(first).log_softmax(-1), readout(at).log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert torch.allclose(rule.signal(at).loss, expected)


def test_before_previous_looks_two_blocks_back():
    rule = create_rule("sll", neighbour="before_previous", likelihood_weight=0.0, head="separate")
    first = moment(rule, hidden(seed=1), LABELS)
    second = moment(rule, hidden(seed=2), LABELS, index=1, message=rule.signal(first).message)
    sent = rule.signal(second)
    assert "divergence" not in sent.metrics
    third = moment(rule, hidden(seed=3), LABELS, index=2, message=sent.message)
    p, q = readout(first).softmax(-1), readout(third).softmax(-1)
    expected = -(p * q).sqrt().sum(-1).log().mean()
    assert torch.allclose(rule.signal(third).loss, expected, atol=1e-6)


def test_without_a_surrogate_the_neighbour_does_not_matter():
    rule = create_rule("sll", surrogate="none")
    at = moment(rule, hidden(), LABELS, index=1)
    alone = rule.signal(at).loss
    message = rule.signal(moment(rule, hidden(seed=5), LABELS)).message
    assert torch.equal(rule.signal(replace(at, message=message)).loss, alone)
    assert alone.item() == pytest.approx(F.cross_entropy(readout(at), LABELS).item())


def test_index_targets_are_the_first_coordinates_of_all():
    rule = create_rule("sll", dim=7)
    at = moment(rule, hidden(), LABELS)
    log_q = readout(at).log_softmax(-1)
    assert log_q.shape == (6, 7)
    expected = -log_q[torch.arange(6), LABELS].mean()
    assert torch.allclose(rule.signal(at).loss, expected)


def test_codebook_targets_are_fixed_rows_that_the_readout_is_compared_with():
    rule = create_rule("sll", dim=3, targets="codebook")
    at = moment(rule, hidden(), LABELS)
    code = at.auxiliary.class_logits(torch.eye(3)).T
    assert code.shape == (CLASSES, 3)
    expected = F.cross_entropy(readout(at) @ code.T, LABELS)
    assert torch.allclose(rule.signal(at).loss, expected)
    assert not list(at.auxiliary.parameters())


@pytest.mark.parametrize("projection", ["gaussian", "orthonormal"])
@pytest.mark.parametrize(("dim", "width"), [(8, 200), (200, 8), (64, 64)])
def test_rows_of_the_projection_have_mean_square_length_one_times_the_scale(projection, dim, width):
    rule = create_rule("sll", projection=projection, dim=dim, norm="none", scale=3.0)
    at = moment(rule, hidden(width=width), LABELS)
    matrix = at.auxiliary(torch.eye(width)).T / 3.0
    assert matrix.square().sum(1).mean().item() == pytest.approx(1, abs=0.15)
    if projection == "orthonormal":
        gram = matrix @ matrix.T if dim <= width else matrix.T @ matrix * width / dim
        assert torch.allclose(gram, torch.eye(min(dim, width)), atol=1e-4)


def test_the_layer_norm_makes_the_readout_blind_to_scale_and_shift():
    rule = create_rule("sll", norm="layer")
    h = hidden(width=32)
    at = moment(rule, h, LABELS)
    assert torch.allclose(at.auxiliary(h), at.auxiliary(5 * h - 2), atol=1e-3)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    at = moment(create_rule("sll", dropout=0.5, **PLAIN), hidden(width=8), LABELS)
    h = hidden(1, 8).expand(20000, 8)
    at.auxiliary.eval()
    exact = at.auxiliary(h)[0]
    assert torch.equal(at.auxiliary(h)[0], at.auxiliary(h)[1])
    at.auxiliary.train()
    torch.manual_seed(0)
    dropped = at.auxiliary(h)
    assert dropped.std(0).min() > 0.1
    assert torch.allclose(dropped.mean(0), exact, atol=0.05)


def test_label_smoothing_reaches_every_local_loss():
    task = Classification(CLASSES, label_smoothing=0.2)
    rule = create_rule("sll")
    at = moment(rule, hidden(), LABELS, task=task)
    target = F.one_hot(LABELS, CLASSES) * 0.8 + 0.05
    assert torch.allclose(task.distribution(LABELS), target)
    expected = -(target * readout(at).log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(rule.signal(at).loss, expected)
    plain, smooth = (Learner(net("mlp"), "local_ce", label_smoothing=s).evaluate(X, Y).read() for s in (0.0, 0.2))
    for block in ("block1", "block2", "head"):
        assert plain[f"{block}/loss"] != smooth[f"{block}/loss"]


@pytest.mark.parametrize("rule", ["sll", "svp", "local_ce"])
def test_grouped_blocks_share_one_readout_at_their_end(rule):
    made = create_rule(rule, group=2)
    learner = Learner(net("mlp", depth=5), made)
    metrics = learner.step(X, Y).read()
    told = {key.split("/")[0] for key in metrics}
    assert told <= {"block2", "block4", "block5", "head"}
    assert {"block2", "block4", "head"} <= told
    assert [list(group) for group in made.groups(5)] == [[0, 1], [2, 3], [4, 5]]


def test_a_separate_head_does_not_reach_the_last_block():
    model, other = net("mlp"), net("mlp")
    with torch.no_grad():
        other.head.weight.mul_(-3)
    for head, same in (("separate", True), ("joint", False)):
        a, b = (trained(m, create_rule("sll", head=head), [(X, Y)]).network.model for m in (model, other))
        assert same_bits(a.block3, b.block3) is same
        assert same_bits(a.block2, b.block2)


def test_the_joint_head_is_aligned_with_the_last_projection():
    rule = create_rule("sll", weight=0.5)
    message = rule.signal(moment(rule, hidden(seed=5), LABELS)).message
    logits = hidden().requires_grad_()
    at = replace(moment(rule, logits, LABELS, index=3), message=message)
    rule.signal(at).loss.backward()
    p, q = message[-1].softmax(-1), logits.detach().softmax(-1)
    r = (p * q).sqrt() / (p * q).sqrt().sum(-1, keepdim=True)
    expected = q - F.one_hot(LABELS, CLASSES) + 0.5 * 0.5 * (q - r)
    assert torch.allclose(logits.grad, expected / len(LABELS), atol=1e-6)


def test_an_overlap_over_the_whole_network_is_backprop():
    x, y = problem()
    through = create_rule("sll", overlap=3)
    a = trained(net("mlp").double(), through, [(x.double(), y)] * 3, optimizer="sgd", lr=0.1)
    b = trained(net("mlp").double(), "backprop", [(x.double(), y)] * 3, optimizer="sgd", lr=0.1)
    for name, weight in tensors(a.network.model).items():
        assert torch.allclose(weight, tensors(b.network.model)[name], atol=1e-12)


def test_projections_stand_where_views_end():
    for group, overlap, expected in (
        (2, 0, {1, 3}),
        (2, 1, {2, 4}),
        (3, 1, {3}),
        (1, 0, {0, 1, 2, 3, 4}),
        (1, 2, {2, 3, 4}),
    ):
        rule = create_rule("sll", group=group, overlap=overlap)
        sites = [Site(i, 6, f"block{i + 1}") for i in range(6)]
        read = {site.index for site in sites if rule.auxiliary(site, hidden(), TASK) is not None}
        assert read == expected  # a view that holds the last block (5) ends at the head


def test_a_rule_with_overlap_says_that_it_is_not_local():
    assert create_rule("sll").locality == "local"
    assert create_rule("sll", overlap=1).locality == "interlocking"
    assert "gradients back over 1" in create_rule("sll", overlap=1).boundary


def test_an_overlap_of_one_reads_behind_the_next_block_and_leaves_that_block_alone():
    rule = create_rule("sll", overlap=1)
    learner = Learner(net("mlp"), rule, optimizer="sgd", lr=1.0, optimizer_options={"momentum": 0.0, "nesterov": 0.0})
    x, y = problem()
    learner.build(x)
    group = learner.groups[0]
    assert [unit.site.name for unit in [*group.units, *group.ahead]] == ["block1", "block2"]
    first, second = group.units[0].block, group.ahead[0].block
    signals, h, _ = learner.engine.forward(group, x, None, y, 0, Trace())
    assert torch.equal(h, first(x))  # what goes on to the next group is the first block's own output
    readout = learner.auxiliary["1"](second(first(x)))
    (loss,) = [signal.loss for signal, _ in signals if signal.loss is not None]
    assert torch.allclose(loss, F.cross_entropy(readout, y))
    expected = torch.autograd.grad(F.cross_entropy(readout, y), first.parameters())
    before = tensors(learner.network.model)
    learner.engine.take(y)
    learner.engine.update(group, x, None, y, 0, Trace())
    for (name, weight), gradient in zip(first.named_parameters(), expected, strict=True):
        decay = 0.01 * before[name] if weight.dim() > 1 else 0.0
        assert torch.allclose(weight.detach(), before[name] - gradient - decay, atol=1e-6)
    for name, weight in second.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.grad is None


def test_numbers_over_depth_are_piecewise_linear():
    sites = [Site(i, 5, "b") for i in range(6)]
    assert [by_depth(0.7, s) for s in sites] == [0.7] * 6
    assert [by_depth((2.0,), s) for s in sites] == [2.0] * 6
    assert [by_depth((0.0, 1.0), s) for s in sites] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [by_depth((0.0, 4.0, 2.0), s) for s in sites] == [0.0, 2.0, 4.0, 3.0, 2.0, 2.0]
    assert by_depth((3.0, 5.0), Site(0, 1, "only")) == 3.0


def test_a_weight_over_depth_reaches_the_loss():
    flat, rising = (create_rule("sll", weight=w, head="separate") for w in (0.5, (0.0, 1.0)))
    message = flat.signal(moment(flat, hidden(seed=5), LABELS)).message
    middle, last = (moment(flat, hidden(), LABELS, index=i, message=message) for i in (1, 2))
    assert torch.allclose(flat.signal(middle).loss, rising.signal(middle).loss)
    extra = rising.signal(last).loss - flat.signal(last).loss
    assert torch.allclose(extra, 0.5 * flat.signal(last).metrics["divergence"], atol=1e-6)


def test_labels_per_position_get_a_posterior_per_position():
    rule = create_rule("sll")
    h, y = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 2, 1]])
    at = moment(rule, h, y)
    expected = F.cross_entropy(readout(at).flatten(0, 1), y.flatten())
    assert torch.allclose(rule.signal(at).loss, expected)


ILLEGAL = [
    ("sll", {"group": 0}),
    ("sll", {"overlap": -1}),
    ("sll", {"dropout": 1.0}),
    ("sll", {"dropout": -0.1}),
    ("sll", {"scale": 0.0}),
    ("sll", {"scale": float("nan")}),
    ("sll", {"dim": CLASSES - 1}),
    ("sll", {"surrogate": "bc"}),
    ("sll", {"neighbour": "next"}),
    ("sll", {"targets": "random"}),
    ("sll", {"projection": "sparse"}),
    ("sll", {"norm": "batch"}),
    ("sll", {"pool": "max"}),
    ("sll", {"head": "none"}),
    ("svp", {"surrogate": "bc"}),
    ("local_ce", {"group": 0}),
    ("local_ce", {"pool": "max"}),
    ("deep_supervision", {"pool": "max"}),
]


@pytest.mark.parametrize(("rule", "option"), ILLEGAL, ids=str)
def test_an_illegal_value_is_refused_before_training(rule, option):
    (value,) = option.values()
    with pytest.raises(LayerwiseError, match=str(value)):
        Learner(net("mlp"), create_rule(rule, **option), example=X)


# --- SVP


def test_svp_adds_the_cosine_distance_of_neighbouring_readouts():
    rule = create_rule("svp", weight=0.0, likelihood_weight=0.0, feature_weight=2.0)
    first = moment(rule, hidden(seed=1), LABELS)
    message = rule.signal(first).message
    assert "feature_distance" not in rule.signal(first).metrics
    at = moment(rule, hidden(seed=2), LABELS, index=1, message=message)
    u, v = readout(first), readout(at)
    expected = 2 * (1 - ((u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))).mean())
    assert torch.allclose(rule.signal(at).loss, expected, atol=1e-6)


@pytest.mark.parametrize("neighbour", ["previous", "before_previous"])
def test_svp_compares_with_the_block_right_before_it(neighbour):
    """Also where the message holds the readouts of two blocks, because the posteriors compare with the earlier one."""
    rule = create_rule("svp", weight=0.0, likelihood_weight=0.0, feature_weight=1.0, neighbour=neighbour)
    message, readouts = None, []
    for index in range(3):
        at = moment(rule, hidden(seed=index), LABELS, index=index, message=message, blocks=4)
        signal, message = rule.signal(at), rule.signal(at).message
        readouts.append(readout(at))
    expected = 1 - F.cosine_similarity(readouts[2], readouts[1]).mean()
    assert torch.allclose(signal.loss, expected, atol=1e-6)
    assert not torch.allclose(signal.loss, 1 - F.cosine_similarity(readouts[2], readouts[0]).mean(), atol=1e-3)


def test_svp_is_sll_with_kl_where_features_have_no_weight():
    svp, sll = create_rule("svp", feature_weight=0.0), create_rule("sll", surrogate="kl")
    data = batches(3)
    assert same_bits(trained(net("mlp"), svp, data), trained(net("mlp"), sll, data))


# --- Controls


def test_deep_supervision_has_the_losses_of_local_ce():
    local, deep = (Learner(net("vit"), rule).evaluate(X, Y).read() for rule in ("local_ce", "deep_supervision"))
    assert local == deep
    assert len([key for key in local if key.endswith("loss")]) == 3


def test_deep_supervision_follows_the_gradient_of_the_sum_of_the_losses():
    model = net("mlp")
    learner = Learner(model, "deep_supervision", lr=0.1, weight_decay=0.0, optimizer=torch.optim.SGD, example=X)
    h, total = X, 0.0
    for i, name in enumerate(model.block_names):
        h = model.get_submodule(name)(h)
        if i < 2:
            total = total + F.cross_entropy(learner.auxiliary[str(i)](h), Y)
    total = total + F.cross_entropy(model.head(h), Y)
    parameters = [p for _, p in learner.named_parameters()]
    gradients = torch.autograd.grad(total, parameters)
    expected = [(p - 0.1 * g).detach() for p, g in zip(parameters, gradients, strict=True)]
    learner.step(X, Y)
    for found, wanted in zip(parameters, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_last_layer_trains_the_head_and_nothing_else(kind):
    model = net(kind)
    after = trained(model, "last_layer", batches(3)).network.model
    for name in model.block_names:
        assert same_bits(getattr(model, name), getattr(after, name))
    assert not same_bits(model.head, after.head)


# --- Rules by name


def entry_point(name, value):
    return importlib.metadata.EntryPoint(name, value, "layerwise.rules")


@pytest.fixture
def outside(monkeypatch):
    points = importlib.metadata.EntryPoints(
        [
            entry_point("outside", f"{__name__}:Outside"),
            entry_point("not_a_rule", "math:sqrt"),
            entry_point("sll", f"{__name__}:Outside"),
        ]
    )
    monkeypatch.setattr("layerwise.rules.entry_points", lambda **how: points.select(**how))


class Outside(SLL):
    name = "outside"


def test_a_rule_of_another_package_is_found_by_its_entry_point(outside):
    assert rule_names().count("outside") == 1
    assert rule_names().count("sll") == 1
    rule = create_rule("outside", weight=0.25)
    assert type(rule).__name__ == "Outside"
    assert rule.weight == 0.25
    assert get("sll") is SLL  # nobody takes a built-in name


def test_an_entry_point_that_is_no_rule_is_refused(outside):
    with pytest.raises(LayerwiseError, match=r"layerwise\.rules:not_a_rule .* not a subclass"):
        get("not_a_rule")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: create_rule("sl"), "unknown rule 'sl'; did you mean 'sll'.*layerwise ls rules"),
        (lambda: create_rule("zzz"), "unknown rule 'zzz'; legal names: sll"),
        (lambda: create_rule("sll", wieght=1.0), "no option 'wieght'; did you mean 'weight'"),
        (lambda: create_rule("backprop", weight=1.0), "rule 'backprop' has no option 'weight'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(call, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        call()


# --- Tasks


def test_the_loss_is_the_mean_over_predictions_in_float32():
    logits = torch.randn(2, 3, CLASSES, dtype=torch.bfloat16)
    y = torch.tensor([[0, 1, 2], [3, 0, 1]])
    loss = TASK.loss(logits, y)
    assert loss.dtype == torch.float32
    picked = logits.float().log_softmax(-1).gather(-1, y[..., None])
    assert torch.allclose(loss, -picked.mean())


def test_the_correct_are_counted():
    logits = nn.functional.one_hot(torch.tensor([0, 1, 2, 3]), CLASSES).float()
    assert TASK.correct(logits, torch.tensor([0, 1, 0, 0])).item() == 2
