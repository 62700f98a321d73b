"""Processes that are killed at any moment: a restarted run ends with the bits of one that was never killed."""

import random
import shutil
import time
from pathlib import Path
from shlex import split

from safetensors.torch import load_file

from campaigns.sandbox import Tally, command, fork, kill, wait
from layerwise.cli.main import main

PROMISE = (
    "A run, a comparison or a job of several ranks that is killed at any moment and started again ends in the same "
    "bits."
)
SMALL = split("--model.width 8 --model.depth 4 --batch-size 128 --threads 1 --device cpu")
WAYS = {
    "train": split("train --rule sll --rule.dropout 0.2 --augment crop --steps 60 --save-every 5 --log-every 2"),
    "accumulated": split("train --rule local_ce --accumulate 3 --steps 61 --save-every 4 --log-every 2"),
    "offloaded": split("train --rule sid --offload disk --steps 40 --save-every 5 --log-every 2"),
    "compare": split("compare --rule sll local_ce --seeds 2 --steps 15 --no-report --jobs 1"),
    "pipeline": split("train --parallel pipeline --timeout 20 --rule sll --steps 40 --save-every 5 --log-every 2"),
    "data": split("train --parallel data --timeout 20 --rule sll --steps 40 --save-every 5 --log-every 2"),
    "sharded": split("train --parallel sharded --timeout 20 --rule local_ce --steps 40 --save-every 5 --log-every 2"),
}
SAVING = {"train": 1}
"""Ways that are killed while they write checkpoints too: `--save-every` in that case."""
RANKED = ("pipeline", "data", "sharded")


def ranks(words: list[str], folder: Path, count: int = 2) -> list[int]:
    """Start the ranks of a job, as torchrun does."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks.stores.append(store)  # it lives as long as this process; the ranks of a job that has ended ask nothing more
    pids = []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        pids.append(fork(lambda: main(list(words)), folder, str(rank), environment))
    return pids


ranks.stores = []


def ended(pids: list[int], limit: float) -> list[int | None]:
    """Exit codes of ranks."""
    until = time.monotonic() + limit
    return [wait(pid, max(until - time.monotonic(), 0.05)) for pid in pids]


def again(way: str, words: list[str], out: Path) -> list[str]:
    """The command that continues."""
    if way == "compare":
        return [*words, "--out", str(out)]
    if not (out / "config.json").exists():
        return [*words, *SMALL, "--out", str(out)]
    parallel = ["--parallel", way, "--timeout", "20"] if way in RANKED else []
    return ["train", "--resume", str(out), *parallel]


def bits(out: Path) -> dict[str, dict[str, bytes]]:
    """The weights of every run below a folder."""
    return {
        str(file.relative_to(out)): {name: t.numpy().tobytes() for name, t in load_file(file).items()}
        for file in sorted(out.rglob("model.safetensors"))
    }


def run(count: int, seed: int, folder: Path, deadline: float) -> Tally:
    """`count` kills in all, over the ways in turn."""
    tally, draw = Tally("kills", PROMISE), random.Random(seed)
    expected, lasts = {}, {}
    for way, words in WAYS.items():
        begun = time.monotonic()
        words = [*words, *SMALL] if way == "compare" else words
        if way in RANKED:
            codes = ended(ranks([*words, *SMALL, "--out", str(folder / f"whole-{way}")], folder / "whole"), 120)
            assert codes == [0, 0], (way, [(folder / "whole" / f"err{r}").read_text() for r in range(2)])
        else:
            done = command(again(way, words, folder / f"whole-{way}"), folder / "whole", 120)
            assert done.code == 0, (way, done.err)
        expected[way], lasts[way] = bits(folder / f"whole-{way}"), time.monotonic() - begun
    kills = number = 0
    while kills < count and time.monotonic() < deadline:
        way = list(WAYS)[number % len(WAYS)]
        number += 1
        out, job = folder / f"run{number}", folder / f"job{number}"
        words = [*WAYS[way], *SMALL] if way == "compare" else [*WAYS[way]]
        if draw.random() < 0.3 and way != "compare":  # most of the time in checkpoints
            words += ["--save-every", "1"]
        wanted = draw.randint(1, 3)
        faults: list[str] = []
        for _ in range(wanted):
            after = draw.uniform(0.0, 1.1 * lasts[way])
            if way in RANKED:
                pids = ranks(again(way, words, out), job)
                time.sleep(after)
                victim = draw.choice([[pids[0]], [pids[1]], pids])
                for pid in victim:
                    kill(pid)
                codes = ended(pids, 40)
                if None in codes:
                    faults.append(f"a rank did not end after the kill of {len(victim)}")
            else:
                command(again(way, words, out), job, 120, kill_after=after)
            kills += 1
            if (out / "result.json").exists():
                break
        if way != "compare" and (out / "result.json").exists():
            pass
        elif way in RANKED:
            codes = ended(ranks(again(way, words, out), job), 120)
            if codes != [0, 0]:
                faults.append(f"exit codes {codes}: {[(job / f'err{r}').read_text()[-300:] for r in range(2)]}")
        else:
            done = command(again(way, words, out), job, 120)
            if done.code != 0:
                faults.append(f"exit code {done.code}: {done.err[-300:]}")
        if not faults and bits(out) != expected[way]:
            faults.append("other bits")
        left = [path for path in out.rglob("*") if ".partial" in path.name] if out.exists() else []
        if left:
            faults.append(f"left behind: {left[0].name}")
        tally.add(f"{way}, run {number}, seed {seed}", faults)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(job, ignore_errors=True)
    tally.attempts = kills
    return tally
