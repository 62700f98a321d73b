"""Records the machine and the versions behind a result."""

import functools
import os
import platform
import subprocess
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from layerwise.core import devices


def processor() -> str:
    """The processor's name, as far as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for row in cpuinfo.read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """A device, and the accelerator's name."""
    return str(device) if device.type == "cpu" else f"{device} ({devices.device_name(device)})"


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed copy.

    Source files that were changed after the commit add "-dirty".
    """
    package = Path(str(files("layerwise")))
    root = package.parents[1]
    if package.parent.name != "src" or not (root / ".git").exists():
        return None  # a repository in a parent folder belongs to the user

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "src")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Machine, main versions, and the commit of this package.

    >>> machine()["torch"] == torch.__version__
    True
    """
    from layerwise import __version__

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "devices": devices.device_names(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "layerwise": __version__,
        "commit": commit(),
    }


def environment() -> dict[str, Any]:
    """Machine, versions and all installed packages.

    >>> environment()["torch"] == torch.__version__
    True
    """
    packages = {str(found.metadata["Name"]): found.version for found in distributions()}
    return machine() | {"packages": dict(sorted(packages.items(), key=lambda item: item[0].lower()))}


def machine_in_words(found: dict[str, Any]) -> str:
    """The machine and the main versions in one line.

    It includes the vector instructions if they were recorded: they may affect the last bits, and the name of a
    processor does not show them.
    """
    cores = f"{found['cores']} cores" + (f" with {found['instructions']}" if "instructions" in found else "")
    devices = "".join(f", {name}" for name in found["devices"])
    return f"{found['cpu']}, {cores}{devices}; {found['system']}; Python {found['python']}, torch {found['torch']}"
