"""Finds the smallest number of parts of a batch whose step stays within a peak of memory."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from layerwise.errors import LayerwiseError, short
from layerwise.memory.meter import MemoryUse

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Fit:
    """How a step is brought within a peak, or how close it came."""

    micro: int
    """Number of parts of every group's batch: the smallest within the peak, or that of the smallest step."""
    held: int
    """Activations + gradients at the step's peak with this number of parts, in bytes."""
    reached: bool
    """Whether this is within the peak."""
    why: str = ""
    """Why more parts were not tried, if an error refused them."""
    tried: tuple[tuple[int, int], ...] = ()
    """Parts and bytes of every step that was measured, in the order of the search."""


def read_size(text: str) -> int:
    """Read a number of bytes from text such as `200MiB`; units are B, kB, MB, GB, KiB, MiB and GiB.

    Raises:
        LayerwiseError: the text is not a number with a unit, or the number is not larger than 0.

    >>> read_size("1.5 KiB"), read_size("2MB")
    (1536, 2000000)
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmg]?i?b)\s*", text, re.IGNORECASE | re.ASCII)
    size = int(float(found[1]) * UNITS[found[2].lower()]) if found and found[2].lower() in UNITS else 0
    if size < 1:
        raise LayerwiseError(
            f"peak is {short(text)}; give a size larger than 0 with its unit, such as 200MiB or 1.5GB."
        )
    return size


def size_in_words(size: int) -> str:
    """Bytes in MiB, with as many digits as matter.

    >>> size_in_words(200 * 2**20), size_in_words(12345)
    ('200 MiB', '0.0118 MiB')
    """
    mib = size / 2**20
    return f"{mib:.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"


def held_by(use: MemoryUse) -> int:
    """Bytes of activations and gradients, which, unlike parameters and optimizer state, depend on how one trains.

    >>> held_by(MemoryUse(parameters=5, optimizer=10, gradients=1, activations=2, peak=18))
    3
    """
    return use.activations + use.gradients


def fewest_parts(measure: Callable[[int], MemoryUse], batch: int, peak: int, least: int = 1) -> Fit:
    """Find the smallest divisor n of the batch for which a step in n parts stays within a peak.

    More parts take less memory for activations. So the number is doubled until a step fits, and then bisected.
    Gradients do not shrink with the parts, so the search ends if they alone exceed the peak.

    Args:
        measure: the memory use of a step in a number of parts; raises LayerwiseError if it cannot be run in parts.
        batch: samples of a batch.
        peak: bytes that activations and gradients may take together.
        least: parts to begin with.

    Returns:
        The fewest parts; if no number is enough, the one whose step was smallest.

    >>> used = lambda parts: MemoryUse(0, 0, gradients=10, activations=100 // parts, peak=0)
    >>> fewest_parts(used, batch=60, peak=30).micro, fewest_parts(used, batch=60, peak=9).reached
    (5, False)
    """
    counts = [least, *(n for n in range(least + 1, batch + 1) if batch % n == 0)]
    found: dict[int, int] = {}
    gradients, why = 0, ""

    def fits(place: int) -> bool:
        nonlocal gradients
        use = measure(counts[place])
        found[counts[place]] = held_by(use)
        gradients = max(gradients, use.gradients)
        return held_by(use) <= peak

    low, high = -1, 0  # positions: the last known not to fit, the first known to fit
    try:
        while not fits(high):
            low = high
            wanted = 2 * counts[high]
            high = next((i for i, n in enumerate(counts) if n >= wanted), len(counts) - 1)
            if high == low or gradients > peak:
                high = len(counts)
                break
    except LayerwiseError as reason:
        if not found:
            raise
        high, why = len(counts), str(reason)
    while high < len(counts) and high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    micro = counts[high] if high < len(counts) else min(found, key=lambda n: (found[n], n))
    return Fit(micro, found[micro], found[micro] <= peak, why, tuple(found.items()))
