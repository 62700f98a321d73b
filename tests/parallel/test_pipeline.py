"""The forward-only pipeline: the bits of one process, and a clear end where a rank fails."""

import copy
import datetime
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from shlex import split
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from support.jobs import (
    DATA,
    LONG,
    PIPELINE,
    TINY,
    check_hangs,
    check_killed,
    check_refused,
    ended,
    job,
    new_store,
    run,
    under_way,
)
from support.nets import KINDS, batches, net, problem, same_bits, trained
from support.ranks import same_state
from support.runs import lines, result, state, weights
from support.stages import stages, through
from torch import nn
from torch.utils._pytree import tree_leaves

from layerwise import LayerwiseError, Learner, rules
from layerwise.cli.main import main
from layerwise.core.cost import balanced_ends
from layerwise.data import Batches, InMemorySource
from layerwise.learner.state import joined
from layerwise.parallel.heartbeat import Heartbeat
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.rendezvous import Job, StoreClient
from layerwise.parallel.serialization import TensorSpec, encode
from layerwise.parallel.stage import Stage
from layerwise.parallel.transport import TreeBuffers
from layerwise.runs.pipelined import PipelineRun
from layerwise.runs.training import Run


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["sll", "sid", "local_ce"])
def test_stages_have_the_bits_of_one_process(rule, kind, ranks):
    rule = rules.create(rule, **({"dropout": 0.2} if rule == "sll" else {}))
    model = net(kind, 4, **({} if kind == "vgg" else {"dropout": 0.2}))
    data = batches(3)
    one = trained(model, rule, data)
    learners = stages(model, rule, ranks, data[0][0])
    for x, y in data:
        through(learners, "step", x, y)
    assert same_state(joined([learner.state_dict() for learner in learners]), one.state_dict())
    x, y = problem(24, seed=5)
    assert same_state(through(learners, "evaluate", x, y), one.evaluate(x, y).blocks)
    # No rank holds anything of another one's.
    held = [{n for n, p in learner.named_parameters() if not p.is_meta} for learner in learners]
    assert sum(map(len, held)) == len(set.union(*held)) == len(dict(one.named_parameters()))


@pytest.mark.parametrize("name", [name for name in rules.names() if name != "sid_cascade"])
def test_a_rule_is_served_to_the_same_bits_or_refused(name):
    model, data = net("mlp", 4), batches(2)
    # graph_forward begins with the network's graph, NoProp with its embeddings.
    if rules.get(name).locality != "local" or name.startswith(("graph_forward", "noprop")):
        with pytest.raises(LayerwiseError, match=f"{name!r} cannot be trained by a pipeline, because"):
            stages(model, name, 2, data[0][0])
        return
    learners = stages(model, name, 2, data[0][0])
    for x, y in data:
        through(learners, "step", x, y)
    state = joined([learner.state_dict() for learner in learners])
    assert same_state(state, trained(model, name, data).state_dict())


FAMILIES = [
    ("forward_forward", {"peer": 0.03}),
    ("forward_forward", {"predictor": "softmax", "loss": "symba"}),
    ("forward_forward", {"predictor": "softmax", "negatives": "hybrid"}),
    ("layer_collaboration", {}),
    ("mono_forward", {"predictor": "sum"}),
    ("mono_forward", {}),
    ("boosted", {"updates": 1}),
    ("ssl_local", {}),
    ("scalable_ff", {}),
    ("scalable_ff", {"predictor": "last"}),
]


@pytest.mark.parametrize(("kind", "ranks"), [("mlp", 2), ("mlp", 4), ("vgg", 4), ("vit", 2)])
@pytest.mark.parametrize(("rule", "options"), FAMILIES)
def test_rules_that_make_samples_or_add_up_votes_have_the_bits_of_one_process(rule, options, kind, ranks):
    rule = rules.create(rule, **options)
    model, data = net(kind, 4), batches(3)
    one = trained(model, rule, data)
    learners = stages(model, rule, ranks, data[0][0])
    for x, y in data:
        through(learners, "step", x, y)
    assert same_state(joined([learner.state_dict() for learner in learners]), one.state_dict())
    x, y = problem(24, seed=5)
    expected = one.evaluate(x, y).blocks
    assert same_state(through(learners, "evaluate", x, y), expected)
    # What is evaluated is what is predicted.
    assert expected["head"]["accuracy"] == (one(x).argmax(1) == y).float().mean()


@pytest.mark.parametrize(
    ("rule", "options", "why"),
    [
        ("forward_forward", {"negatives": "hard"}, "its locality is 'broadcast'"),
        ("layer_collaboration", {"gamma": "all"}, "its locality is 'broadcast'"),
        ("counter_current", {}, "feedback activations of the K classes downwards"),
        ("sll", {"overlap": 1}, "its signals pass through blocks of later groups"),
    ],
)
def test_a_rule_that_needs_later_blocks_is_refused_with_the_reason(rule, options, why):
    with pytest.raises(LayerwiseError, match=f"{rule}' cannot be trained by a pipeline, because .*{why}"):
        stages(net("mlp", 4), rules.create(rule, **options), 2, problem(2)[0])


@dataclass(frozen=True)
class LooksAround(rules.get("local_ce")):
    """Declares nothing of what it begins with."""

    def begin(self, start):
        return start.x, start.forward(start.x)


@dataclass(frozen=True)
class AllAtOnce(rules.get("local_ce")):
    """Predicts from the whole network."""

    def predict(self, network, auxiliary, x):
        return -network(x)


@pytest.mark.parametrize(("rule", "why"), [(LooksAround, "begins with may look at"), (AllAtOnce, "network at once")])
def test_a_rule_that_declares_nothing_is_refused(rule, why):
    with pytest.raises(LayerwiseError, match=why):
        stages(net("mlp", 4), rule(), 2, problem(2)[0])


def test_what_is_skipped_anywhere_is_counted_once():
    model, data = net("mlp", 4), batches(2)
    data[1][0][0, 0, 0, 0] = torch.nan
    one = trained(model, "sll", data, nonfinite="skip")
    learners = stages(model, "sll", 3, data[0][0], nonfinite="skip")
    for x, y in data:
        through(learners, "step", x, y)
    assert learners[-1].skipped == one.skipped == 1


def test_what_only_an_early_stage_skips_is_counted_at_the_end():
    """The first block's gradient is infinite and its output is not, so nobody after it skips anything."""
    model, (x, y) = net("mlp", 4), batches(1)[0]
    learners = stages(model, "local_ce", 3, x, nonfinite="skip")
    found = [learner.network.model for learner in learners]
    found[0].block1.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    through(learners, "step", x, y)
    assert [learner.skipped for learner in learners] == [1, 1, 1]
    assert not same_bits(found[-1].head, model.head)


def test_a_state_is_read_by_any_number_of_stages():
    model, data = net("vit", 4), batches(4)
    one = trained(model, "sid", data, clip=1.0)
    first = stages(model, "sid", 4, data[0][0], clip=1.0)
    for x, y in data[:2]:
        through(first, "step", x, y)
    second = stages(model, "sid", 2, data[0][0], clip=1.0)
    for learner in second:
        learner.load_state_dict(joined([part.state_dict() for part in first]))
    for x, y in data[2:]:
        through(second, "step", x, y)
    assert same_state(joined([learner.state_dict() for learner in second]), one.state_dict())


class Sleeping(nn.Module):
    samples: ClassVar[set[int]] = set()

    def forward(self, x):
        self.samples.add(len(x))
        time.sleep(0.01)
        return x


def test_the_cut_is_balanced_or_as_given():
    x, _ = problem(2)
    given = stages(net("mlp", 4), "sll", 2, x, counts=[3, 1])
    assert [len(learner.groups) for learner in given] == [3, 1]
    assert given[0].stage.blocks == ["block1..block3", "block4..head"]
    # By brute force over all cuts into three.
    cost = [5, 1, 1, 7, 2, 3]
    best = min(max(sum(cost[:a]), sum(cost[a:b]), sum(cost[b:])) for a in range(1, 5) for b in range(a + 1, 6))
    ends = [0, *balanced_ends(cost, 3)]
    assert max(sum(cost[a:b]) for a, b in itertools.pairwise(ends)) == best
    # Blocks one of which takes far longer on the first rank than its operations tell: it stands alone.
    slow = nn.Sequential(*[nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(4)], nn.Linear(5, 2))
    slow[3][1] = Sleeping()
    said = []

    def agree(numbers):
        said.append(numbers)
        return said[0]

    kept = []
    for rank in range(2):
        learner = Learner(copy.deepcopy(slow), "local_ce", stage=Stage(rank, 2, None, agree, samples=7))
        learner.build(torch.randn(2, 5))
        kept.append(len(learner.groups))
    assert len(said[0]) == 5 and said[1] == [], said  # blocks and head; the other rank measures nothing
    assert max(said[0]) == said[0][3] > 0.01
    assert Sleeping.samples == {2, 7}  # two to learn the shapes, a whole batch to take the time
    assert kept == [3, 1]
    for counts in ([2, 1], [4], [4, 0], [5, -1]):
        with pytest.raises(LayerwiseError, match="give one number per rank"):
            stages(net("mlp", 4), "sll", 2, x, counts=counts)


def test_labels_alone_are_the_labels():
    source = InMemorySource(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20))
    both = Batches(source, 6, seed=3, mean=(0.5,), std=(0.5,))
    for (x, y), (nothing, alone) in zip(both.epoch(2, 1), both.without_images().epoch(2, 1), strict=True):
        assert torch.equal(y, alone)
        assert nothing.shape == (len(x), 0)


def test_later_ranks_keep_no_images(tmp_path, monkeypatch):
    def train(run):
        data, batches = run.dataset, (run.train_batches, run.val_batches, run.test_batches)
        sources = [data.train, data.val, data.test, *(b.source for b in batches)]
        assert [source.images.is_meta for source in sources] == [not run.stage.first] * 6
        return real(run)

    real = PipelineRun.train
    monkeypatch.setattr(PipelineRun, "train", train)
    codes, errors = run(3, tmp_path / "job", [*PIPELINE, *TINY, "--out", str(tmp_path / "out")])
    assert codes == [0, 0, 0], errors


def test_a_tree_keeps_its_layout_on_the_way():
    """Kernels may depend on the order of dimensions in memory, and their bits with them."""
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tree = {"h": image, "parts": (torch.ones(3, dtype=torch.bool), None, 7), "empty": torch.empty(0, 2)}
    slot = TreeBuffers()
    slot.fit(encode(tree), torch.device("cpu"))
    assert slot.tree["h"].stride() == image.stride()
    assert slot.tree["parts"][0].dtype == torch.bool and slot.tree["parts"][1:] == (None, 7)
    before = slot.flat
    slot.fit(encode(copy.deepcopy(tree)), torch.device("cpu"))
    assert slot.flat is before  # the same buffers for the same layout
    assert TensorSpec.of(image[:, :, :, 0]).shape == (2, 3, 4)
    assert len(tree_leaves(slot.tree)) == 5


# Processes.


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, "--rule sll --rule.dropout 0.1 --model mlp --model.dropout 0.1"),
        (4, "--rule sid --model vit --model.heads 2 --model.dropout 0.1 --log-every 2"),
        (4, "--rule local_ce --model vgg --clip 1 --val-fraction 0"),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_a_run_on_several_ranks_is_the_run_in_one_process(ranks, words, tmp_path):
    words = [*split(words), *TINY]
    one, many = tmp_path / "one", tmp_path / "many"
    codes, errors = run(ranks, tmp_path / "job", [*PIPELINE, *words, "--out", str(many)])
    assert codes == [0] * ranks, errors
    assert "test accuracy" in (tmp_path / "job" / f"out{ranks - 1}").read_text()
    assert not "".join(errors[:-1])  # one rank speaks
    assert main(["train", *words, "--out", str(one)]) == 0
    assert same_bits(weights(one), weights(many))
    assert same_state(state(one), state(many))
    assert lines(one) == lines(many)
    changed = {"train_seconds", "samples_per_second", "memory_mib", "command", "notes"}
    a, b = ({k: v for k, v in result(folder).items() if k not in changed} for folder in (one, many))
    assert a == b
    assert result(many)["memory_mib"]["parameters"] < result(one)["memory_mib"]["parameters"]


def test_a_signal_stops_all_ranks_behind_the_same_step(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "job"
    with job(3, folder, [*PIPELINE, *LONG, "--out", str(out)]) as processes:
        under_way(out, processes)
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        codes, errors = ended(processes, folder)
    assert codes == [128 + signal.SIGTERM] * 3, errors
    assert "continue with" in errors[2] and not errors[0] and not errors[1]
    assert state(out)["steps"] == lines(out, "train")[-1]["step"]
    assert not (out / "result.json").exists()


def test_a_stopped_run_goes_on_with_another_number_of_ranks(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    words = [*TINY, *split("--model.dropout 0.1 --save-every 2")]
    assert main(["train", *words, "--out", str(one)]) == 0
    assert run(3, tmp_path / "job", [*PIPELINE, *words, "--out", str(many)])[0] == [0] * 3

    def stop_earlier():
        """As if it had been killed before its last checkpoint."""
        shutil.rmtree(max((many / "checkpoints").iterdir()))
        (many / "result.json").unlink()

    stop_earlier()
    codes, errors = run(2, tmp_path / "job", [*PIPELINE, "--resume", str(many)])
    assert codes == [0, 0], errors
    assert same_state(state(many), state(one)) and lines(many) == lines(one)
    stop_earlier()
    assert main(["train", "--resume", str(many)]) == 0
    assert same_state(state(many), state(one)) and same_bits(weights(many), weights(one))
    assert result(many)["flops_per_step"] == result(one)["flops_per_step"]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_the_others(victim, tmp_path):
    blocks = ["block1", "block2", "block3..head"]
    name = f"rank {victim} ({blocks[victim]})"
    check_killed(3, victim, name, tmp_path / "out", tmp_path / "job", [*PIPELINE, *LONG, "--stages", "1,1,2"])


def test_a_rank_that_hangs_is_noticed_within_the_limit(tmp_path):
    words = [*PIPELINE, *LONG, "--stages", "1,1,2"]
    told = check_hangs(3, 1, "rank 1 (block2)", tmp_path / "out", tmp_path / "job", words)
    assert all("has not answered" in text and "for 2 s" in text for text in told), told


def test_a_rank_that_fails_is_named_with_its_reason(tmp_path):
    words = [*PIPELINE, *TINY, *split("--optimizer sgd --lr 1e30 --schedule constant --out"), str(tmp_path / "out")]
    codes, errors = run(2, tmp_path / "job", words)
    assert codes == [2, 2]
    assert all("non-finite" in error for error in errors), errors
    assert any("has stopped: block" in error for error in errors)
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("words", [PIPELINE, DATA])
def test_an_unexpected_error_of_a_rank_is_one_sentence(words, tmp_path, monkeypatch):
    def broken(run, x, y):
        if run.ranks.rank == 1:
            raise ZeroDivisionError("nobody has foreseen this")
        return step(run, x, y)

    step = Run._step
    monkeypatch.setattr(Run, "_step", broken)
    codes, errors = run(2, tmp_path / "job", [*words, *TINY, "--out", str(tmp_path / "out")])
    assert codes == [2, 2]
    for error in errors:
        sentence = error.strip().splitlines()[-1]
        assert "unexpected ZeroDivisionError: nobody has foreseen this" in sentence, errors
        assert "please report it" in sentence and "Traceback" not in error, errors
    assert "rank 1" in errors[0] and "has stopped: unexpected" in errors[0]


@pytest.mark.parametrize(
    ("words", "of_rank", "sentence"),
    [
        ("--rule backprop", {}, "'backprop' cannot be trained by a pipeline, because its locality is 'global'"),
        ("--model.depth 1", {}, "2 ranks cannot share 1 groups of blocks"),
        ("--stages 1,1", {}, "--stages 1,1 does not share 4 groups among 2 ranks"),
        ("", {1: ["--label-noise", "0.5"]}, "the ranks differ in --label-noise (0.0 on rank 0, 0.5 on rank 1)"),
        ("", {1: ["--lr", "0.5"]}, "the ranks differ in --lr ("),
        ("", {1: ["--augment", "spin"]}, "spin"),
        ("--out FULL", {}, "is not empty"),
    ],
)
def test_a_mistake_is_one_sentence_of_one_rank(words, of_rank, sentence, tmp_path):
    check_refused(2, [*PIPELINE, *TINY, *split(words)], of_rank, sentence, tmp_path)


def test_without_torchrun_it_says_how(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main([*PIPELINE, *TINY]) == 2
    assert "start it with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *TINY]) == 2
    assert "add --parallel pipeline" in capsys.readouterr().err
    for words, sentence in (
        ("--stages 2,x", "such as 3,3"),
        ("--timeout 0", "it must be a finite number in"),
        ("--replicas 0", "1 or more"),
        ("--parallel data --replicas 2", "goes with --parallel pipeline"),
    ):
        assert main([*PIPELINE, *TINY, *split(words)]) == 2
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_limit(capsys, monkeypatch):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert main([*PIPELINE, *TINY, "--timeout", "1"]) == 2
    assert "did not find one another within 1 s" in capsys.readouterr().err


def test_a_port_in_use_is_told(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        assert main([*PIPELINE, *TINY]) == 2
    assert f"port {port} of localhost is in use" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "layerwise"]
    words += [*PIPELINE, *TINY, "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert result(tmp_path / "out")["steps"] == 6


# Pipelines side by side.

TWO_BY_TWO = [*PIPELINE, "--replicas", "2"]


@pytest.mark.parametrize(
    "words", ["--rule sll --model.dropout 0.1 --save-every 3 --accumulate 2", "--rule local_ce --clip 1"]
)
def test_pipelines_side_by_side_have_the_bits_of_replicas(words, tmp_path):
    words = [*split(words), *TINY, *split("--log-every 1")]
    two, four = tmp_path / "two", tmp_path / "four"
    assert run(2, tmp_path / "job", [*DATA, *words, "--out", str(two)])[0] == [0, 0]
    codes, errors = run(4, tmp_path / "job", [*TWO_BY_TWO, *words, "--out", str(four)])
    assert codes == [0] * 4, errors
    assert "test accuracy" in (tmp_path / "job" / "out1").read_text()
    assert not "".join(error for rank, error in enumerate(errors) if rank != 1)  # one rank speaks
    same_run(four, two)
    for ranks, again in ((4, TWO_BY_TWO), (2, DATA)) if "sll" in words else ():
        shutil.rmtree(max((four / "checkpoints").iterdir()))  # as if killed between two batches of an update
        (four / "result.json").unlink()
        codes, errors = run(ranks, tmp_path / "job", [*again, "--resume", str(four)])
        assert codes == [0] * ranks, errors
        same_run(four, two)


def same_run(a, b):
    assert same_bits(weights(a), weights(b))
    assert same_state(state(a), state(b))
    assert lines(a) == lines(b)
    assert result(a)["flops_per_step"] == result(b)["flops_per_step"]


def test_a_killed_rank_of_one_pipeline_ends_both(tmp_path):
    words = [*TWO_BY_TWO, *LONG, "--stages", "2,2"]
    check_killed(4, 3, "rank 3 (block3..head)", tmp_path / "out", tmp_path / "job", words)


def test_a_rank_that_hangs_is_named_by_those_that_wait_for_others(tmp_path):
    words = [*TWO_BY_TWO, *LONG, "--stages", "2,2"]
    check_hangs(4, 0, "rank 0 (block1..block2)", tmp_path / "out", tmp_path / "job", words)


@pytest.mark.parametrize(("alive", "guilty"), [({1, 2}, 1), ({1}, 2)])
def test_who_gives_no_sign_of_life_is_to_blame_not_who_waits_for_it(alive, guilty, monkeypatch):
    ranks = object.__new__(Ranks)  # no processes: what the others write is written here
    ranks.store, ranks.rank, ranks.count, ranks.blocks = StoreClient(new_store(), 30), 0, 3, []
    ranks.job = Job(0, 3, "localhost", 1, True, 0)
    ranks.limit = datetime.timedelta(seconds=30)
    monkeypatch.setattr(Heartbeat, "_beats", lambda self: None)
    Heartbeat(ranks, range(2))
    for rank in (1, 2):
        ranks.store.set(f"heartbeat/{rank}", "0 0")

    def sleep(_):
        for rank in alive:
            ranks.store.set(f"heartbeat/{rank}", "1 0")

    monkeypatch.setattr("layerwise.parallel.heartbeat.time", SimpleNamespace(sleep=sleep))
    assert str(ranks.lost(1, "closed")).startswith(f"rank {guilty} has ended")


def test_a_signal_to_one_pipeline_stops_both_behind_the_same_step(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "job"
    with job(4, folder, [*TWO_BY_TWO, *LONG, "--out", str(out)]) as processes:
        under_way(out, processes)
        os.kill(processes[2].pid, signal.SIGTERM)
        codes, errors = ended(processes, folder)
    assert codes == [128 + signal.SIGTERM] * 4, errors
    assert state(out)["steps"] == lines(out, "train")[-1]["step"]


@pytest.mark.parametrize(
    ("ranks", "words", "sentence"),
    [
        (3, "", "3 ranks cannot form 2 pipelines of equal length; start a multiple of 2 ranks (--nproc-per-node 4)"),
        (4, "--batch-size 127", "2 replicas cannot share a batch of 127 samples equally"),
    ],
)
def test_a_mistake_with_pipelines_is_one_sentence(ranks, words, sentence, tmp_path):
    check_refused(ranks, [*TWO_BY_TWO, *TINY, *split(words)], {}, sentence, tmp_path)
