"""`layerwise doctor`: describes this installation and this machine, and finds what prevents training."""

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from layerwise.cli.words import put_json
from layerwise.errors import LayerwiseError
from layerwise.parsing import take_option
from layerwise.terminal import indented, terminal_width

LEAST_TORCH = (2, 6)


def doctor_command(argv: list[str]) -> int:
    """`layerwise doctor`: print the findings; exit code 1 if something prevents training."""
    argv = list(argv)
    where = take_option(argv, "json", "doctor")
    if argv:
        raise LayerwiseError(f"doctor takes no {argv[0]!r}; its only option is --json.")
    facts = examine()
    if where is not None:
        put_json(where, facts)
    else:
        rows = {name: value for name, value in facts.items() if name not in ("parts", "problems")}
        rows = {name: ", ".join(value) if isinstance(value, list) else value for name, value in rows.items()}
        rows |= {f"part {name}": found for name, found in facts["parts"].items()}
        width, wide = max(map(len, rows)) + 2, terminal_width()
        for name, value in rows.items():
            print(indented(name, value, width, wide))
        for problem in facts["problems"] or ["nothing stands in the way of training."]:
            print(problem)
    return int(bool(facts["problems"]))


def examine() -> dict[str, Any]:
    """Collect facts by name, as texts or lists; `parts` by name, and `problems` as sentences."""
    import torch

    from layerwise.compare.pool import free_memory
    from layerwise.core.devices import device_names
    from layerwise.runs.environment import machine

    found, problems = machine(), []
    names, free = device_names(), free_memory()
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU" if not names else names[0]
    # A plain `pip install torch` is built for CUDA, also where there is no GPU; the driver brings nvidia-smi.
    if torch.version.cuda and not names and shutil.which("nvidia-smi"):
        problems.append("torch is built for CUDA and finds no GPU: check whether nvidia-smi lists one, and the driver.")
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < LEAST_TORCH:
        problems.append(f"torch {torch.__version__} is too old: pip install 'torch>=2.6'.")
    if threads > cores:
        problems.append(f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}.")
    folder = os.environ.get("LAYERWISE_DATA")
    if folder and not Path(folder).is_dir():
        problems.append(f"LAYERWISE_DATA names {folder}, which is not a folder: set it to a folder of data sets.")
    if not os.access(".", os.W_OK):
        problems.append("this folder cannot be written to: give --out, or change to another one.")
    return {
        "layerwise": found["layerwise"] + (f", commit {found['commit'][:12]}" if found["commit"] else ""),
        "python": found["python"],
        "system": found["system"],
        "torch": f"{found['torch']}, built for {built}",
        "processor": f"{found['cpu']}, {cores} cores, {found['instructions']}",
        "threads": str(threads),
        "devices": names or ["the CPU alone"],
        "memory": "unknown on this system" if free is None else f"{free / 2**30:.1f} GiB free",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
        "data folder": data_in(folder),
        "parts": parts(),
        "problems": problems,
    }


def data_in(folder: str | None) -> str:
    """Describe the content of the folder of data sets."""
    if not folder:
        return "not set (LAYERWISE_DATA); data sets by name come from the Hugging Face hub"
    if not Path(folder).is_dir():
        return f"{folder} (no folder)"
    held = sorted(place.name for place in Path(folder).iterdir() if place.is_dir())
    return f"{folder}: {', '.join(held) or 'empty'}"


def parts() -> dict[str, str]:
    """Extras of this package: `installed`, or what is missing and the command that installs it."""
    found: dict[str, list[str]] = {}
    try:
        lines = requires("layerwise") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    for line in lines:
        package, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        name = re.match(r"[\w.-]+", package)
        if extra and name and name[0] != "layerwise" and extra[1] not in ("test", "docs", "all"):
            missing = found.setdefault(extra[1], [])
            try:
                version(name[0])
            except PackageNotFoundError:
                missing.append(name[0])
    return {
        extra: f"without {', '.join(missing)}: pip install 'layerwise[{extra}]'" if missing else "installed"
        for extra, missing in found.items()
    }
