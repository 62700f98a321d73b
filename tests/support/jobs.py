"""Ranks of a job, in processes that are forked from the test; shared by the tests."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from shlex import split

import torch.distributed as dist

from layerwise.cli.main import main
from layerwise.data import load

TINY = split("--model.width 8 --model.depth 4 --batch-size 128 --steps 6 --threads 1 --device cpu --augment crop")
PIPELINE = split("train --parallel pipeline --timeout 30")
DATA = split("train --parallel data --timeout 30")
LONG = [*TINY, *split("--steps 100000 --log-every 1 --save-every 1000000")]


def new_store():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@contextlib.contextmanager
def job(ranks, folder, words, of_rank=None, attempt=0, store=None, variables=None):
    """Ranks of a job, as torchrun starts them: their common store is kept by the process that started them.

    `words` are those of a command, or a function that each rank calls. `variables` gives environment variables to
    ranks.
    """
    store = store or new_store()
    folder.mkdir(exist_ok=True)
    load("digits")  # imported once, here
    context = multiprocessing.get_context("fork")
    begin = context.Event()  # the store's thread must be idle while this process is forked

    def child(rank):
        begin.wait()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
        } | (variables or {}).get(rank, {})
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        faulthandler.register(signal.SIGUSR1)
        code = words() if callable(words) else main([*words, *(of_rank or {}).get(rank, [])])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

    processes = [context.Process(target=child, args=(rank,)) for rank in range(ranks)]
    gc.freeze()  # a rank must not destroy objects that then wait for a thread of this process, such as a store
    for process in processes:
        process.start()
    gc.unfreeze()
    begin.set()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes, folder, seconds=120):
    """Exit codes, and the output of each rank."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(limit - time.monotonic(), 0.1))
    hanging = [process.pid for process in processes if process.exitcode is None]
    for pid in hanging:  # they say where
        os.kill(pid, signal.SIGUSR1)
    time.sleep(1 if hanging else 0)
    said = [(folder / f"err{i}").read_text() for i in range(len(processes))]
    assert not hanging, said
    return [p.exitcode for p in processes], said


def own_store(ranks):
    """Variables with which rank 0 keeps the store, as without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return {rank: own for rank in range(ranks)}


def run(ranks, folder, words, of_rank=None, attempt=0, store=None, variables=None):
    with job(ranks, folder, words, of_rank, attempt, store, variables) as processes:
        return ended(processes, folder)


def under_way(out, processes, count=3):
    """Wait until a few steps are logged."""
    limit = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < count:
        assert all(p.is_alive() for p in processes) and time.monotonic() < limit
        time.sleep(0.02)


def check_killed(ranks, victim, name, out, folder, words):
    """Every other rank of a job ends with a sentence about a rank that is killed, and nothing is half-written."""
    with job(ranks, folder, [*words, "--out", str(out)]) as processes:
        under_way(out, processes)
        os.kill(processes[victim].pid, signal.SIGKILL)
        codes, errors = ended(processes, folder)
    for rank in {*range(ranks)} - {victim}:
        assert codes[rank] == 2
        assert f"layerwise: {name} has ended" in errors[rank], errors
        assert "Traceback" not in errors[rank]
    assert not (out / "result.json").exists() and not list(out.rglob("*.partial"))


def check_refused(ranks, words, of_rank, sentence, folder):
    """A mistake gives one sentence of one rank and exit code 2, and nothing is written; FULL is a folder in use."""
    full = folder / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    words = [word.replace("FULL", str(full)) for word in words]
    codes, errors = run(ranks, folder / "job", [words[0], "--out", str(folder / "out"), *words[1:]], of_rank)
    assert codes == [2] * ranks
    told = {error for error in errors if error}
    (said,) = told
    assert said.startswith("layerwise: ") and said.count("\n") == 1 and sentence in said
    # Every rank reports a difference; one rank reports any other mistake.
    assert sum(map(bool, errors)) == (ranks if "the ranks differ" in said else 1)
    assert not (folder / "out").exists()
    assert [file.name for file in full.iterdir()] == ["file"] and (full / "file").read_text() == "mine"


def check_hangs(ranks, victim, name, out, folder, words, variables=None, limit=2):
    """One rank is stopped; the others end soon after the limit in seconds, with a sentence about it."""
    others = [rank for rank in range(ranks) if rank != victim]
    with job(ranks, folder, [*words, "--timeout", str(limit), "--out", str(out)], variables=variables) as processes:
        under_way(out, processes)
        os.kill(processes[victim].pid, signal.SIGSTOP)
        begun = time.monotonic()
        for rank in others:
            processes[rank].join(20)
        assert time.monotonic() - begun < 5 * limit
        assert all(processes[rank].exitcode == 2 for rank in others)
    told = [(folder / f"err{rank}").read_text() for rank in others]
    assert all(f"layerwise: {name} has" in text for text in told), told
    return told
