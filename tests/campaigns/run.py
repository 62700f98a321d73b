"""Run the campaigns, and write their figures into `docs/reliability.md`.

    python tests/campaigns/run.py            # in full: 200 kills, 1,000 words, 500 files, 100 faults
    python tests/campaigns/run.py --sample   # a sample of at most five minutes, as in CI; writes nothing

Every campaign is seeded: the same seed makes the same attempts, in the same order. The exit code is 1 if a promise was
broken.
"""

import argparse
import contextlib
import gc
import importlib
import json
import pkgutil
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import layerwise  # noqa: E402
from campaigns import faults, files, kills, words  # noqa: E402
from layerwise.data import load  # noqa: E402
from layerwise.extras import MissingPackage  # noqa: E402
from layerwise.runs.environment import commit, environment, machine_in_words  # noqa: E402

CAMPAIGNS = {
    "kills": (kills.run, 200, 14),
    "words": (words.run, 1000, 60),
    "files": (files.run, 500, 50),
    "faults": (faults.run, 100, 5),
}
"""What runs, how often in full, how often in the sample."""
BEGIN, END = "<!-- figures:begin (written by tests/campaigns/run.py; do not edit) -->", "<!-- figures:end -->"


def main() -> int:
    """Run what is asked for; print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", choices=[[], *CAMPAIGNS], help="which; all of them if not given")
    parser.add_argument("--sample", action="store_true", help="at most five minutes in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="at most so many for each campaign")
    asked = parser.parse_args()
    warm_up()
    found = []
    for name in asked.campaigns or CAMPAIGNS:
        work, full, sample = CAMPAIGNS[name]
        count, limit = (sample, 75.0) if asked.sample else (full, 60 * asked.minutes)
        begun = time.monotonic()
        place = Path(tempfile.mkdtemp(prefix=f"layerwise-{name}-"))
        try:
            tally = work(count, asked.seed, place / "campaign", begun + limit)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        tally.seconds = time.monotonic() - begun
        found.append(tally)
        print(f"{name}: {tally.attempts} attempts, {len(tally.broken)} broken, {tally.seconds:.0f} s", flush=True)
    if not asked.sample:
        write(found, asked.seed)
    broken = sum(len(tally.broken) for tally in found)
    print(f"{sum(tally.attempts for tally in found) - broken} passed, {broken} failed")
    return int(broken > 0)


def warm_up() -> None:
    """Import once, for all forks, what the commands import when they need it."""
    import torch._dynamo  # noqa: F401  the first optimizer would import it

    for module in pkgutil.walk_packages(layerwise.__path__, "layerwise."):
        if not module.name.endswith(("__main__", "rank", "worker")):
            with contextlib.suppress(MissingPackage):
                importlib.import_module(module.name)
    load("digits")
    gc.collect()
    gc.freeze()  # a fork whose collector looks at all of this would copy its pages


def write(found: list, seed: int) -> None:
    """The figures into the page; those of campaigns that did not run now stay."""
    file = ROOT / "tests" / "campaigns" / "figures.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    machine = machine_in_words(environment())
    for tally in found:
        kept[tally.name] = {
            "attempts": tally.attempts,
            "broken": tally.broken,
            "seconds": round(tally.seconds),
            "seed": seed,
            "machine": machine,
            "commit": commit(),
        }
    file.write_text(json.dumps(kept, indent=2) + "\n")
    columns = ("campaign", "attempts", "promises broken", "seconds", "seed", "commit", "machine")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in (name for name in CAMPAIGNS if name in kept):
        f = kept[name]
        version = f"`{f['commit'][:10]}`" if f.get("commit") else "not recorded"
        cells = (name, f"{f['attempts']:,}", len(f["broken"]), f"{f['seconds']:,}", f["seed"], version, f["machine"])
        rows.append(f"| {' | '.join(map(str, cells))} |")
    page = ROOT / "docs" / "reliability.md"
    text = page.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:start] + "\n" + "\n".join(rows) + "\n" + text[end:])


if __name__ == "__main__":
    sys.exit(main())
