"""Faults between ranks: one dies, stops, differs, or does not belong; all others end in time with a sentence."""

import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from shlex import split

from campaigns.kills import SMALL, WAYS, ended, ranks
from campaigns.sandbox import Tally, fork, kill
from layerwise.cli.main import main

PROMISE = (
    "Where a rank dies, stops, is started with other options or data, or meets a stranger on its port, every other "
    "rank ends within its limit, with a sentence and exit code 2."
)
LIMIT = 4.0
"""Seconds of `--timeout`; a rank has ended a few limits later, as several waits may follow one another."""
DIFFERENT = [
    "--seed 1",
    "--lr 0.5",
    "--rule sid",
    "--model.width 16",
    "--model.depth 5",
    "--batch-size 64",
    "--data-fraction 0.5",
    "--val-fraction 0.3",
    "--accumulate 2",
    "--steps 41",
    "--label-noise 0.2",
    "--parallel data",
    "--precision bf16",
]


def long(way: str) -> list[str]:
    """Words of a job that does not end by itself."""
    return [*WAYS[way], *SMALL, *split(f"--steps 100000 --log-every 1 --save-every 1000000 --timeout {LIMIT}")]


def run(count: int, seed: int, folder: Path, deadline: float) -> Tally:
    """`count` faults, of each kind in turn."""
    tally, draw = Tally("faults", PROMISE), random.Random(seed)
    for number in range(count):
        if time.monotonic() > deadline:
            break
        way = draw.choice(["pipeline", "data", "sharded"])
        out, job = folder / f"out{number}", folder / f"job{number}"
        kind = ("dies", "stops", "differs", "stranger", "alone")[number % 5]
        words = [*long(way), "--out", str(out)]
        faults: list[str] = []
        excused: set[int] = set()
        what = f"{kind}, {way}"
        if kind in ("dies", "stops"):
            pids = ranks(words, job)
            time.sleep(draw.uniform(0.0, 4.0))
            victim = draw.randrange(2)
            kill(pids[victim], signal.SIGKILL if kind == "dies" else signal.SIGSTOP)
            excused = {victim}
            what += f", rank {victim}"
            other = ended([pids[1 - victim]], 6 * LIMIT + 20)[0]
            kill(pids[victim])
            ended([pids[victim]], 5)
            codes = [other if rank != victim else 2 for rank in range(2)]
        elif kind == "differs":
            change = draw.choice(DIFFERENT)
            what += f", {change}"
            codes = differing(words, [*words, *split(change)], job)
        elif kind == "stranger":
            codes = stranger(words, job, draw)
        else:
            codes = alone(words, job)
            excused = {1}
        for rank, code in enumerate(codes):
            if rank in excused:
                continue
            text = (job / f"err{rank}").read_text(errors="replace")
            if code is None:
                faults.append(f"rank {rank} did not end")
            elif code != 2:
                faults.append(f"rank {rank} ended with {code} {text[-300:]!r}")
            if "Traceback (most recent call last)" in text:
                faults.append(f"a traceback of rank {rank} {text[-300:]!r}")
        if not re.search(
            r"^layerwise: ",
            "\n".join((job / f"err{r}").read_text(errors="replace") for r in range(2) if (job / f"err{r}").exists()),
            re.M,
        ):
            faults.append("nobody said a sentence")
        if list(out.rglob("*.partial")) if out.exists() else []:
            faults.append("something half-written")
        tally.add(f"faults {number}, seed {seed}: {what}", faults)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(job, ignore_errors=True)
    return tally


def environment(rank: int, port: int, agent: bool) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(agent),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def differing(first: list[str], second: list[str], job: Path) -> list[int | None]:
    """Two ranks with different words."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks.stores.append(store)
    pids = [
        fork(lambda words=words: main(list(words)), job, str(rank), environment(rank, store.port, True))
        for rank, words in enumerate((first, second))
    ]
    return ended(pids, 6 * LIMIT + 20)


def stranger(words: list[str], job: Path, draw: random.Random) -> list[int | None]:
    """Something listens on the port of the store and says nothing, or nonsense."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen(8)
        port = listener.getsockname()[1]
        pids = [fork(lambda: main(list(words)), job, str(rank), environment(rank, port, True)) for rank in range(2)]
        if draw.random() < 0.5:
            listener.settimeout(15)
            try:
                other, _ = listener.accept()
                other.sendall(bytes(draw.randrange(256) for _ in range(64)))
            except OSError:
                pass
        return ended(pids, 6 * LIMIT + 20)


def alone(words: list[str], job: Path) -> list[int | None]:
    """The other rank never comes."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks.stores.append(store)
    (job).mkdir(parents=True, exist_ok=True)
    pid = fork(lambda: main(list(words)), job, "0", environment(0, store.port, True))
    return [ended([pid], 6 * LIMIT + 20)[0], 2]
