"""Checkpoints that several ranks write, and restarts: complete or nothing, the same bits for any number of ranks."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.jobs import PIPELINE, TINY, job, new_store, run
from support.nets import same_bits
from support.runs import STARTED, contents, lines, result, split, weights

from layerwise import models
from layerwise.cli.main import main
from layerwise.runs import checkpoint, folders
from layerwise.runs import distributed_checkpoint as parts
from layerwise.runs.options import TrainOptions

DROPPING = [*TINY, *split("--model.dropout 0.1 --save-every 2")]
RANKS = ("rank-0.safetensors", "rank-1.safetensors", "rank-2.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in one process that the others must equal."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert main(["train", *DROPPING, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    codes, errors = run(3, folder / "job", [*PIPELINE, "--stages", "1,1,2", *DROPPING, "--out", str(folder / "run")])
    assert codes == [0, 0, 0], errors
    return folder / "run"


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def same_run(folder, one):
    assert same_bits(weights(folder), weights(one))
    assert lines(folder) == lines(one)
    assert result(folder)["flops_per_step"] == result(one)["flops_per_step"]


def test_each_rank_writes_its_own_part_and_nothing_is_a_pickle(one, three):
    newest = checkpoint.latest(three / "checkpoints")
    assert {file.name for file in newest.iterdir()} == {*RANKS, "state.json"}
    found = [load_file(newest / name) for name in RANKS]
    single = load_file(checkpoint.latest(one / "checkpoints") / "state.safetensors")
    assert sum(map(len, found)) == len(single)  # nothing twice
    assert same_bits({name: t for part in found for name, t in part.items()}, single)
    assert all("block1" in name or "/0." in name for name in found[0])
    about = json.loads((newest / "state.json").read_text())
    assert about["shards"] == {}


def test_one_process_reads_what_several_ranks_wrote(one, three, tmp_path, capsys):
    shown = []
    for folder in (one, three):
        assert main(["eval", str(folder), "--device", "cpu"]) == 0
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert main(["validate", str(three)]) == 0
    copy = copied(three, tmp_path)
    shutil.rmtree(checkpoint.latest(copy / "checkpoints"))
    assert main(["train", "--resume", str(copy)]) == 0
    same_run(copy, one)


def test_export_fills_the_models_own_class(one, three, tmp_path, capsys):
    model = models.create("mlp", (1, 8, 8), 10, width=8, depth=4, dropout=0.1)
    for folder in (one, three):
        assert main(["export", str(folder), str(tmp_path / "weights.safetensors")]) == 0
        assert not capsys.readouterr().err
        model.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert same_bits(model, weights(one))
    (copy := copied(three, tmp_path) / "result.json").unlink()
    assert main(["export", str(copy.parent), str(tmp_path / "weights.safetensors")]) == 0
    assert "not finished: these are its weights after step 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("RUN nowhere/file", "could not write nowhere/file"),
        ("RUN", "export needs FILE"),
        ("", "export needs RUN"),
        ("nowhere file", "nowhere holds no run"),
        ("RUN file --device cpu", "unknown options: --device"),
    ],
)
def test_a_mistake_in_export_is_one_sentence(words, sentence, three, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *split(words.replace("RUN", str(three)))]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and sentence in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "exchanged", "json"])
def test_a_torn_part_is_passed_over(damage, three, tmp_path):
    copy = copied(three, tmp_path) / "checkpoints"
    before, newest = checkpoint.complete(copy)
    part = newest / RANKS[1]
    if damage == "cut":
        os.truncate(part, part.stat().st_size - 1)
    elif damage == "changed":
        part.write_bytes(part.read_bytes()[:-1] + bytes([part.read_bytes()[-1] ^ 1]))
    elif damage == "gone":
        part.unlink()
    elif damage == "exchanged":  # whole, but of another step
        shutil.copy(before / RANKS[1], part)
    else:
        text = (newest / "state.json").read_text()
        (newest / "state.json").write_text(text.replace('"steps": 6', '"steps": 7'))
    found, notes = checkpoint.load_latest(copy)
    assert found["learner"]["steps"] == 4
    assert len(notes) == 1 and "damaged" in notes[0]


def test_one_rank_alone_writes_parts_with_digests(tmp_path):
    state = {"w": torch.arange(6.0).view(2, 3), "steps": 3}
    parts.save(tmp_path, 3, state, lambda trees: trees[0], None)
    (path,) = checkpoint.complete(tmp_path)
    assert torch.equal(checkpoint.load(path)["w"], state["w"])
    part = path / "rank-0.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    with pytest.raises(checkpoint.CorruptCheckpoint, match="do not match their digest"):
        checkpoint.load(path)


def test_a_restart_finds_the_folder_of_its_own_job(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = TrainOptions()
    claim, own = folders.new_folder(options), Path(f"{folders.wanted_folder(options)}-2")
    others = claim.folder
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "theirs")
    folders.mark(others)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    assert folders.new_folder(options).folder == own
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert folders.folder_of_restarted(options) is None  # the first attempt has not got so far
    folders.mark(own)
    assert folders.folder_of_restarted(options) == own
    assert folders.folder_of_restarted(TrainOptions(out=str(others))) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert folders.folder_of_restarted(options) is None
    # Without an id of its own, the process of torchrun tells.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    folders.mark(own)
    assert folders.folder_of_restarted(options) == own
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert folders.folder_of_restarted(options) is None


def test_sharded_tensors_are_put_together_again(tmp_path):
    whole = torch.arange(20.0).view(5, 4)

    def rank():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        values = {
            "rows": distribute_tensor(whole, mesh, [Shard(0)]),
            "columns": distribute_tensor(whole, mesh, [Shard(1)]),
            "all": distribute_tensor(whole, mesh, [Replicate()]),
            "alike": torch.ones(3),
            "scalar": torch.tensor(2.0),
            "empty": torch.empty(0, 2),
            f"own{dist.get_rank()}": torch.tensor([True]),
        }
        parts.save(tmp_path / "out", 3, {"tensors": values, "steps": 3}, join, None)
        dist.destroy_process_group()

    def join(trees):
        return {**trees[-1], "tensors": trees[0]["tensors"] | trees[1]["tensors"]}

    codes, errors = run(2, tmp_path / "job", rank)
    assert codes == [0, 0], errors
    (path,) = checkpoint.complete(tmp_path / "out")
    assert json.loads((path / "state.json").read_text())["shards"].keys() == {"tensors/rows", "tensors/columns"}
    found = checkpoint.load(path)
    expected = {"rows": whole, "columns": whole, "all": whole, "alike": torch.ones(3), "scalar": torch.tensor(2.0)}
    expected |= {"empty": torch.empty(0, 2), "own0": torch.tensor([True]), "own1": torch.tensor([True])}
    assert same_bits(found["tensors"], expected) and found["steps"] == 3


def test_a_part_that_cannot_be_written_ends_all_ranks_and_leaves_nothing(monkeypatch, tmp_path):
    def full(tensors, path):
        if os.environ["RANK"] == "1" and "000000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(parts, "save_file", full)
    out = tmp_path / "out"
    codes, errors = run(3, tmp_path / "job", [*PIPELINE, *DROPPING, "--out", str(out)])
    assert codes == [2, 2, 2]
    (told,) = [line for error in errors for line in error.splitlines() if line.startswith("layerwise: ")]
    assert told in errors[1]  # of the rank whose disk is full
    assert "could not write the checkpoint" in told and "No space left" in told
    assert "the last complete one is" in told and "Traceback" not in "".join(errors)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000002"]
    assert not (out / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "victim"), [(3, 0), (2, 1)])
def test_a_rank_killed_while_it_writes_and_the_restart(ranks, victim, one, monkeypatch, tmp_path):
    """What torchrun --max-restarts does: all ranks anew, the same command, the same store."""
    store = new_store()

    def kill(tensors, path):
        save_file(tensors, path)
        if os.environ["RANK"] == str(victim) and "000000004" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(parts, "save_file", kill)
    monkeypatch.chdir(tmp_path)
    words = [*PIPELINE, *DROPPING]  # without --out: the restart must find the folder that the first attempt made
    (tmp_path / "runs" / "digits-mlp-sll-seed0").mkdir(parents=True)
    (tmp_path / "runs" / "digits-mlp-sll-seed0" / "mine").touch()
    codes, errors = run(ranks, tmp_path / "job", words, store=store)
    out = tmp_path / "runs" / "digits-mlp-sll-seed0-2"
    for rank in set(range(ranks)) - {victim}:
        assert codes[rank] == 2
        assert f"rank {victim} (" in errors[rank].split("has ended")[0] and "Traceback" not in errors[rank]
    assert [path.name for path in checkpoint.complete(out / "checkpoints")] == ["step-000000002"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    codes, errors = run(ranks, tmp_path / "job", words, attempt=1, store=store)
    assert codes == [0] * ranks, errors
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"digits-mlp-sll-seed0", out.name}
    same_run(out, one)


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_writes_is_named(monkeypatch, tmp_path):
    def stop(tensors, path):
        save_file(tensors, path)
        if os.environ["RANK"] == "1" and "000000004" in str(path):
            os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(parts, "save_file", stop)
    out, folder = tmp_path / "out", tmp_path / "job"
    with job(3, folder, [*PIPELINE, *DROPPING, "--stages", "1,1,2", "--timeout", "2", "--out", str(out)]) as processes:
        for rank in (0, 2):
            processes[rank].join(30)
        assert [processes[rank].exitcode for rank in (0, 2)] == [2, 2]
    told = [(folder / f"err{rank}").read_text() for rank in (0, 2)]
    assert all("rank 1 (block2) has not answered" in text and "for 2 s" in text for text in told), told
    assert [path.name for path in checkpoint.complete(out / "checkpoints")] == ["step-000000002"]


@pytest.mark.parametrize(
    ("ranks", "words", "sentence"),
    [
        (5, [], "5 ranks cannot share 4 groups of blocks"),
        (2, ["--stages", "2,1"], "--stages 2,1 does not share 4 groups among 2 ranks"),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_refused_on_resume(ranks, words, sentence, three, tmp_path):
    copy = copied(three, tmp_path)
    before = contents(copy)
    codes, errors = run(ranks, tmp_path / "job", [*PIPELINE, *words, "--resume", str(copy)])
    assert codes == [2] * ranks
    (said,) = [error for error in errors if error]
    assert sentence in said and said.count("\n") == 1
    assert contents(copy) == before


def test_a_restart_does_not_take_up_the_run_of_somebody_else(three, tmp_path):
    before = contents(copied(three, tmp_path))
    (tmp_path / "copy" / "job").write_text("another\n")
    before["job"] = b"another\n"
    words = [*PIPELINE, *DROPPING, "--out", str(tmp_path / "copy")]
    codes, errors = run(2, tmp_path / "job", words, attempt=1)
    assert codes == [2, 2] and "is not empty" in "".join(errors)
    assert contents(tmp_path / "copy") == before


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run_to_the_same_bits(tmp_path):
    words = [*TINY, *split("--steps 60 --save-every 7 --log-every 1 --model.dropout 0.1")]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "layerwise", *PIPELINE, *words, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "told").open("w") as told:
        torchrun = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
    STARTED.append(torchrun)
    seed = random.randrange(1000)
    draw = random.Random(seed)
    wanted, victim = draw.randrange(1, 50), draw.randrange(2)
    limit = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < wanted:
        assert torchrun.poll() is None and time.monotonic() < limit, seed
        time.sleep(0.001)
    ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(ranks[victim]), signal.SIGKILL)
    assert torchrun.wait(100) == 0, (seed, (tmp_path / "told").read_text())
    assert main(["train", *words, "--out", str(tmp_path / "one")]) == 0
    assert same_bits(weights(out), weights(tmp_path / "one")), seed
    assert lines(out) == lines(tmp_path / "one"), seed
