"""The pipeline in processes: the bits of one process, and a clear error if a rank fails."""

import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
from shlex import split
from types import SimpleNamespace

import pytest
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
from support.nets import same_bits
from support.ranks import same_state
from support.runs import lines, result, state, weights

from layerwise.cli.main import main
from layerwise.parallel.heartbeat import Heartbeat
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.rendezvous import Job, StoreClient
from layerwise.runs.training import Run

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, "--rule sll --rule.dropout 0.1 --model mlp --model.dropout 0.1"),
        pytest.param(4, "--rule sid --model vit --model.heads 2 --model.dropout 0.1 --log-every 2", marks=SLOW),
        pytest.param(4, "--rule local_ce --rule.ahead both --model vgg --clip 1 --val-fraction 0", marks=SLOW),
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


@pytest.mark.slow
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


@pytest.mark.parametrize("victim", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW)])
def test_a_killed_rank_ends_the_others(victim, tmp_path):
    blocks = ["block1", "block2", "block3..head"]
    name = f"rank {victim} ({blocks[victim]})"
    check_killed(3, victim, name, tmp_path / "out", tmp_path / "job", [*PIPELINE, *LONG, "--stages", "1,1,2"])


@pytest.mark.slow
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


@pytest.mark.parametrize("words", [PIPELINE, pytest.param(DATA, marks=pytest.mark.slow)])
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
        pytest.param("--model.depth 1", {}, "2 ranks cannot share 1 groups of blocks", marks=pytest.mark.slow),
        pytest.param("--stages 1,1", {}, "--stages 1,1 does not share 4 groups among 2 ranks", marks=pytest.mark.slow),
        ("", {1: ["--label-noise", "0.5"]}, "the ranks differ in --label-noise (0.0 on rank 0, 0.5 on rank 1)"),
        pytest.param("", {1: ["--lr", "0.5"]}, "the ranks differ in --lr (", marks=pytest.mark.slow),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_killed_rank_of_one_pipeline_ends_both(tmp_path):
    words = [*TWO_BY_TWO, *LONG, "--stages", "2,2"]
    check_killed(4, 3, "rank 3 (block3..head)", tmp_path / "out", tmp_path / "job", words)


@pytest.mark.slow
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


@pytest.mark.slow
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
