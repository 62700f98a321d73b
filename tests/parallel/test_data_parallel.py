"""Replicas: the gradient of the whole batch, the same bits on every rank, and a clear error if a rank fails."""

import copy
import os
import shutil
import signal
from shlex import split

import pytest
import torch
from support.jobs import DATA, LONG, TINY, check_hangs, check_killed, check_refused, ended, job, run, under_way
from support.nets import PLAIN_SGD, batches, by_parameter, dense, kinds, net, problem, same_bits, trained
from support.own import decoder, text
from support.ranks import close, learned, normed, same_state, share, similar, spread
from support.runs import lines, result, state, weights
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, rules
from layerwise.cli.main import main
from layerwise.data import Batches, InMemorySource
from layerwise.parallel.replicas import Replicas, check_shares

OF_SHARES = {"predsim", "dgl", "periodic_guidance", "forward_forward", "layer_collaboration", "ssl_local"}
OF_SHARES |= {"forward_gradient", "likelihood_ratio", "hebbian_global", "hebbian_local"}
"""Rules that compare, normalise or draw within a batch: theirs is the share of a rank."""


class Events(Replicas):
    """A reducer in one process that notes when it is asked."""

    rank, count = 0, 1

    def __init__(self):
        self.seen = []

    def copy_from_first(self, tensors, facts=None):
        pass

    def adopt(self, model, units):
        pass

    def reduce(self, parameters, running, loss):
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        self.seen.append("start")

        def arrived():
            self.seen.append("arrived")
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            return loss

        return arrived


def test_a_group_steps_while_the_next_one_has_run_forward():
    model, events = net("mlp", 2), Events()
    for name in ("block1", "block2", "head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: events.seen.append(name))
    data = batches(2)
    learner = Learner(model, "local_ce", replicas=events, example=data[0][0])
    events.seen.clear()
    before = copy.deepcopy(model)
    learner.step(*data[0])
    # The last block learns through the head, so there are two groups.
    assert events.seen == ["block1", "start", "block2", "head", "arrived", "start", "arrived"]
    learner.step(*data[1])
    assert same_bits(learner, trained(before, "local_ce", data))


class OneOfTwo(Events):
    """One of two replicas, in one process: its own gradients not the mean, running statistics from elsewhere."""

    count = 2

    def __init__(self, total, running=0.0):
        super().__init__()
        self.labels, self.average = total, running

    def total(self, value):
        return self.labels

    def reduce(self, parameters, running, loss):
        for buffer in running:
            buffer.fill_(self.average)
        return super().reduce(parameters, running, loss)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mean_of_two_replicas_weighs_each_by_its_labels(accumulate):
    """One has 3 labels, then 2, the other 1, then 4."""
    model, (x, y) = dense().double(), problem(10)
    x = x.flatten(1).double()
    shares = ([(0, 3), (4, 6)], [(3, 4), (6, 10)])
    one = trained(model, "local_ce", [(x[:4], y[:4]), (x[4:], y[4:])][:accumulate], accumulate=accumulate, **PLAIN_SGD)
    ours = []
    for own in shares:
        replica = OneOfTwo(4.0)
        learner = Learner(copy.deepcopy(model), "local_ce", replicas=replica, accumulate=accumulate, **PLAIN_SGD)
        for (start, end), replica.labels in [*zip(own, (4.0, 6.0), strict=True)][:accumulate]:
            learner.step(x[start:end], y[start:end])
        ours.append(learner)
    for first, second, expected in zip(*(list(each.network.parameters()) for each in (*ours, one)), strict=True):
        assert torch.allclose((first + second) / 2, expected, atol=1e-12)


@pytest.mark.parametrize("flush", [False, True])
def test_running_statistics_of_blocks_at_rest_come_from_all_replicas(flush):
    learner = Learner(normed(), "last_layer", replicas=OneOfTwo(16.0, 7.0), accumulate=1 + flush, **PLAIN_SGD)
    learner.step(torch.randn(8, 64), torch.arange(8) % 4)
    assert not flush or learner.flush()
    means = [b for name, b in learner.network.named_buffers() if "running" in name]
    assert len(means) == 4 and all(torch.equal(b, torch.full_like(b, 7.0)) for b in means)


def test_units_are_not_renewed_in_shares_of_weights():
    events = Events()
    events.shares_parameters = True
    with pytest.raises(LayerwiseError, match="choose --parallel data"):
        Learner(net("mlp"), "continual_backprop", replicas=events, example=problem(4)[0])


@pytest.mark.slow
def test_every_rule_has_the_gradient_of_the_whole_batch(tmp_path):
    names = [name for name in rules.names() if "mlp" in kinds(name) and not by_parameter(name)]
    cases = [(name, kind) for kind in ("mlp", "vit") for name in (names if kind == "mlp" else ["sll", "sid"])]
    data = batches(2, size=24)

    def work(replicas):
        return {
            (name, kind): learned(replicas, net(kind, 3), name, data, clip=0.5, **PLAIN_SGD) for name, kind in cases
        }

    first, second = spread(2, tmp_path, work)
    for name, kind in cases:
        one = trained(net(kind, 3), name, data, clip=0.5, **PLAIN_SGD)
        assert same_state(first[name, kind], second[name, kind]), name
        if name not in OF_SHARES:
            assert close(first[name, kind], one.state_dict()), name
            untrained = Learner(net(kind, 3), name, example=data[0][0]).state_dict()
            assert not close(untrained, one.state_dict()), name


@pytest.mark.slow
def test_replicas_renew_the_same_units_with_the_same_weights(tmp_path):
    model, data = net("mlp", 3), batches(4, size=24)
    rule = rules.create("continual_backprop", replacement_rate=0.1, maturity=1)
    first, second = spread(2, tmp_path, lambda replicas: learned(replicas, model, rule, data, **PLAIN_SGD))
    one = trained(model, rule, data, **PLAIN_SGD).state_dict()
    ages = [age for name, age in one["auxiliary"].items() if name.endswith("running_age")]
    assert any(bool((age < 4).any()) for age in ages)
    assert same_state(first, second) and close(first, one)


def test_a_trunk_has_the_gradient_of_the_whole_batch(tmp_path):
    model, data = net("sid_cascade", 3), batches(3, size=24)
    found = spread(3, tmp_path, lambda replicas: learned(replicas, model, "sid_cascade", data, **PLAIN_SGD))
    assert same_state(found[0], found[1]) and same_state(found[0], found[2])
    assert close(found[0], trained(model, "sid_cascade", data, **PLAIN_SGD).state_dict())


@pytest.mark.slow
def test_options_and_running_statistics(tmp_path):
    """Accumulation, a step skipped by all, draws of each replica's own, and batch norm over the shares."""
    data = [(x.flatten(1), y) for x, y in batches(4, size=16)]
    broken = copy.deepcopy(data)
    broken[1][0][-1, 0] = torch.nan  # in the last share
    dropping = net("mlp", 3, dropout=0.5)
    images, four = batches(2), batches(4)
    options = {"accumulate": 2, **PLAIN_SGD}

    def work(replicas):
        other = net("mlp", 3)
        if replicas.rank:
            nn.init.ones_(next(other.parameters()))  # the first one's weights count
        own = Learner(copy.deepcopy(dropping), "sll", replicas=replicas, example=images[0][0])
        losses = [float(own.step(*images[0]).blocks["block2"]["loss"])]
        half = learned(replicas, net("mlp", 3), "local_ce", images[:1], **options)["gradients"]
        memory = []
        for depth in (4, 16):
            learner = Learner(net("mlp", depth, width=64), "sll", replicas=replicas)
            learner.step(*images[0])
            use = learner.measured_step(*images[1])[1]
            memory.append(use.activations + use.gradients)
        return {
            "accumulated": learned(replicas, net("mlp", 3), "local_ce", four, **options),
            "half": half,
            "skipped": learned(replicas, normed(), "local_ce", broken, nonfinite="skip", **PLAIN_SGD),
            "normed": learned(replicas, normed(), "local_ce", data[:1], **PLAIN_SGD),
            "copied": learned(replicas, other, "local_ce", images, **PLAIN_SGD),
            "losses": losses,
            "dropped": own.state_dict(),
            "memory": memory,
        }

    first, second = spread(2, tmp_path, work)
    for name in ("accumulated", "skipped", "normed", "copied", "dropped"):
        assert same_state(first[name], second[name]), name
    assert close(first["accumulated"], trained(net("mlp", 3), "local_ce", four, **options).state_dict())
    assert close(first["copied"], trained(net("mlp", 3), "local_ce", images, **PLAIN_SGD).state_dict())
    # Between two batches of one update, gradients are a replica's own.
    assert not same_state(first["half"], second["half"])
    # One share was not finite: no replica has learned from that batch.
    assert first["skipped"]["skipped"] == 1
    assert all(t.isfinite().all() for t in first["skipped"]["model"].values())
    # Same batch, other draws.
    assert first["losses"] != second["losses"]
    # The mean over the batch is that of the shares' means; a variance is the mean of the shares' variances.
    h = nn.functional.linear(data[0][0], *normed().model[0].parameters())
    means = h.mean(0)
    variances = torch.stack([part.var(0) for part in h.chunk(2)]).mean(0)
    assert torch.allclose(first["normed"]["model"]["1.running_mean"], 0.1 * means, atol=1e-6)
    assert torch.allclose(first["normed"]["model"]["1.running_var"], 0.9 + 0.1 * variances, atol=1e-6)
    # Flat in depth, but for a bucket that gloo's thread may hold a moment longer; twelve blocks more have twelve.
    shallow, deep = first["memory"]
    assert deep <= shallow + 2 * 4 * 64 * 65


def test_shares_are_the_images_of_the_batch():
    images = torch.randint(256, (26, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {"seed": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    whole = Batches(InMemorySource(images, torch.arange(26)), 12, augment=("flip", "crop", "cutout"), **options)
    for ranks in (2, 3):
        parts = zip(*(whole.share(rank, ranks).epoch(1) for rank in range(ranks)), strict=True)
        for (x, y), found in zip(whole.epoch(1), parts, strict=True):
            assert torch.equal(torch.cat([part for part, _ in found]), x)
            assert torch.equal(torch.cat([labels for _, labels in found]), y)
    # In evaluation every sample is seen once, however many ranks there are.
    rest = Batches(InMemorySource(images, torch.arange(26)), 12, shuffle=False, drop_last=False, **options)
    seen = torch.cat([y for rank in range(5) for _, y in rest.share(rank, 5).epoch(0)])
    assert seen.sort().values.tolist() == list(range(26))


def test_equal_shares_are_required():
    check_shares(128, 4)
    with pytest.raises(LayerwiseError, match=r"3 replicas cannot share a batch of 128 .* use --batch-size 126 or 129"):
        check_shares(128, 3)
    with pytest.raises(LayerwiseError, match="use --batch-size 3"):
        check_shares(2, 3)


# Runs.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "words"),
    [(2, "--rule sll --accumulate 4 --save-every 5"), (4, "--rule backprop --model vit --model.heads 2")],
    ids=["sll", "backprop"],
)
def test_a_run_of_replicas_is_the_run_in_one_process(ranks, words, tmp_path):
    words = [*split(words), *TINY, *split("--optimizer sgd --log-every 1")]
    one, many = tmp_path / "one", tmp_path / "many"
    codes, errors = run(ranks, tmp_path / "job", [*DATA, *words, "--out", str(many)])
    assert codes == [0] * ranks, errors
    assert "test accuracy" in (tmp_path / "job" / "out0").read_text()
    assert not "".join(errors[1:])  # one rank speaks
    assert main(["train", *words, "--out", str(one)]) == 0
    a, b = weights(one), weights(many)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    similar(lines(one), lines(many))
    assert result(one)["flops_per_step"] == result(many)["flops_per_step"]
    assert state(one)["optimizer"].keys() == state(many)["optimizer"].keys()


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_replicas(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    words = [*TINY, *split("--optimizer sgd --save-every 3 --accumulate 2")]  # saved between two batches of an update
    assert main(["train", *words, "--out", str(one)]) == 0
    assert run(2, tmp_path / "job", [*DATA, *words, "--out", str(many)])[0] == [0, 0]
    for ranks in (4, 2, 1):
        shutil.rmtree(max((many / "checkpoints").iterdir()))
        (many / "result.json").unlink()
        if ranks == 1:
            assert main(["train", "--resume", str(many)]) == 0
        else:
            # Two ranks are a restart by torchrun, which knows of no --resume.
            again = ["--resume", str(many)] if ranks == 4 else [*words, "--out", str(many)]
            codes, errors = run(ranks, tmp_path / "job", [*DATA, *again], attempt=int(ranks == 2))
            assert codes == [0] * ranks, errors
        a, b = weights(one), weights(many)
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_a_signal_to_one_rank_stops_all_behind_the_same_step(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "job"
    with job(2, folder, [*DATA, *LONG, "--out", str(out)]) as processes:
        under_way(out, processes)
        os.kill(processes[1].pid, signal.SIGTERM)
        codes, errors = ended(processes, folder)
    assert codes == [128 + signal.SIGTERM] * 2, errors
    assert "continue with" in errors[0] and not errors[1]
    assert state(out)["steps"] == lines(out, "train")[-1]["step"]
    assert not (out / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_rank_ends_the_others(victim, tmp_path):
    words = [*DATA, *LONG, "--batch-size", "129"]
    check_killed(3, victim, f"rank {victim}", tmp_path / "out", tmp_path / "job", words)


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed_within_the_limit(tmp_path):
    # Gloo closes its connections where it has waited too long, so that one of the two may see them closed.
    check_hangs(3, 1, "rank 1", tmp_path / "out", tmp_path / "job", [*DATA, *LONG, "--batch-size", "129"])


@pytest.mark.parametrize(
    ("words", "of_rank", "sentence"),
    [
        ("--batch-size 127", {}, "2 replicas cannot share a batch of 127 samples equally"),
        ("", {1: ["--data", "nothing"]}, "nothing"),
        pytest.param(
            *("", {1: ["--label-noise", "0.5"]}, "the ranks differ in --label-noise (0.0 on rank 0, 0.5 on rank 1)"),
            marks=pytest.mark.slow,
        ),
        pytest.param("", {1: ["--lr", "0.5"]}, "the ranks differ in --lr (", marks=pytest.mark.slow),
        ("--out FULL", {}, "is not empty"),
    ],
)
def test_a_mistake_is_one_sentence_of_one_rank(words, of_rank, sentence, tmp_path):
    check_refused(2, [*DATA, *TINY, *split(words)], of_rank, sentence, tmp_path)


def test_a_loss_that_is_not_finite_stops_all_replicas(tmp_path):
    words = [*DATA, *TINY, *split("--optimizer sgd --lr 1e30 --schedule constant --out"), str(tmp_path / "out")]
    codes, errors = run(2, tmp_path / "job", words)
    assert codes == [2, 2] and all("non-finite" in error for error in errors), errors
    assert not (tmp_path / "out" / "result.json").exists()


def test_replicas_of_a_model_that_is_cut_at_its_calls(tmp_path):
    """Each replica has a share of a batch that is a mapping; together they make one process's update."""
    batch = text(samples=4)
    batch["labels"] = batch["tokens"]  # all tokens count, so that the shares weigh the same

    def work(replicas=None):
        options = {} if replicas is None else {"replicas": replicas}
        learner = Learner(decoder(), "local_ce", cuts="layers.*", task=LanguageModel(), **PLAIN_SGD, **options)
        for _ in range(3):
            given = batch
            if replicas is not None:
                given = {name: share(value, replicas.rank, replicas.count) for name, value in batch.items()}
            learner.step(given)
        return copy.deepcopy(learner.state_dict())

    first, second = spread(2, tmp_path, work)
    assert same_state(first["model"], second["model"])
    assert close(first, work())


def test_unequal_shares_weigh_as_much_as_their_labels(tmp_path):
    """Two replicas with 3 and 1 samples, or with as many tokens that count, make the update of all of them."""
    data = [(x.flatten(1).double(), y) for x, y in batches(2, size=4)]
    tokens = text(samples=2)["tokens"]
    labels = tokens.clone()
    labels[1, 2:] = -100  # the second replica has one next token
    options = {"accumulate": 2, **PLAIN_SGD}
    rows = (slice(0, 3), slice(3, 4))

    def work(replicas=None):
        given = {} if replicas is None else {"replicas": replicas}
        part = slice(None) if replicas is None else rows[replicas.rank]
        row = slice(None) if replicas is None else slice(replicas.rank, replicas.rank + 1)
        model = dense().double()
        learners = [Learner(copy.deepcopy(model), "local_ce", **given, **o) for o in (PLAIN_SGD, options)]
        for x, y in data:
            for learner in learners:
                assert learner.step(x[part], y[part]).samples == len(y[part])
        torch.manual_seed(0)
        told = Learner(decoder(), "local_ce", cuts="layers.*", task=LanguageModel(), **PLAIN_SGD, **given)
        told.step({"tokens": tokens[row]}, labels[row])
        return [copy.deepcopy(learner.state_dict()) for learner in (*learners, told)]

    first, second = spread(2, tmp_path, work)
    for a, b, one, limit in zip(first, second, work(), (1e-12, 1e-12, 1e-6), strict=True):
        assert same_state(a, b)
        assert close(a, one, limit)


def test_running_statistics_at_rest_are_averaged_too(tmp_path):
    """Blocks that never learn run in training mode all the same; one replica's broken share is nobody's batch."""
    data = [(x.flatten(1), y) for x, y in batches(2, size=16)]
    broken = copy.deepcopy(data)
    broken[1][0][-1, 0] = torch.nan  # in the last share

    def work(replicas):
        skipped = learned(replicas, normed(), "last_layer", broken, nonfinite="skip", **PLAIN_SGD)
        half = Learner(normed(), "last_layer", replicas=replicas, accumulate=3, **PLAIN_SGD)
        half.step(*(share(part, replicas.rank, 2) for part in data[0]))
        half.flush()
        return learned(replicas, normed(), "last_layer", data[:1], **PLAIN_SGD), skipped, half.state_dict()

    first, second = spread(2, tmp_path, work)
    for a, b in zip(first, second, strict=True):
        assert same_state(a["model"], b["model"])
    means = nn.functional.linear(data[0][0], *normed().model[0].parameters()).mean(0)
    for found in first:
        assert torch.allclose(found["model"]["1.running_mean"], 0.1 * means, atol=1e-6)
