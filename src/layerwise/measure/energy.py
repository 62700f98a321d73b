"""Energy of the processor, if the system reports it."""

import contextlib
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def domains(folder: Path = POWERCAP) -> list[Path]:
    """Counters of whole processors (RAPL packages) that this process may read; none on most virtual machines."""
    found = []
    for counter in sorted(folder.glob("intel-rapl:*/energy_uj")):
        if counter.parent.name.count(":") == 1:  # subdomains have a second number
            with contextlib.suppress(OSError, ValueError):
                int(counter.read_text())
                found.append(counter)
    return found


class EnergyMeter:
    """Adds up the energy of this machine's processors, including everything that runs on them.

    >>> EnergyMeter([]).joules() is None
    True
    """

    def __init__(self, counters: list[Path] | None = None):
        self.counters = domains() if counters is None else counters
        self._before = [int(counter.read_text()) for counter in self.counters]

    def joules(self) -> float | None:
        """Joules since the meter was made; None if the system reports nothing. A counter may have wrapped once."""
        if not self.counters:
            return None
        used = 0
        for counter, before in zip(self.counters, self._before, strict=True):
            now = int(counter.read_text())
            wraps = int((counter.parent / "max_energy_range_uj").read_text()) if now < before else 0
            used += now - before + wraps
        return used / 1e6
