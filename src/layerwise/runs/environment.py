"""The machine and the versions behind a figure, for the record."""

import os
import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for row in cpuinfo.read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Machine, versions and all installed packages.

    >>> environment()["torch"] == torch.__version__
    True
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = {str(found.metadata["Name"]): found.version for found in distributions()}
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "devices": devices,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def in_words(found: dict[str, Any]) -> str:
    """The machine and the main versions in one line."""
    devices = "".join(f", {name}" for name in found["devices"])
    return (
        f"{found['cpu']}, {found['cores']} cores{devices}; {found['system']}; Python {found['python']}, "
        f"torch {found['torch']}"
    )
