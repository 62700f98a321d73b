"""Random numbers that depend on what they are for, never on where or when they are drawn."""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerwise.core.devices import preserved_generator, seed_device


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`, the same on every machine.

    Args:
        parts: what the random numbers are for, such as `(seed, "block", step, index)`.

    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3)
    True
    >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 4)
    False
    """
    text = "\x1f".join([f"{type(part).__name__}:{part}" for part in parts])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Start torch's global generators of the host and of `device` at `seed`."""
    torch.default_generator.manual_seed(seed)
    seed_device(seed, device)


_IN_USE = threading.RLock()
"""Held while torch's global generators are borrowed: they are one per process, and so is whoever uses them."""
os.register_at_fork(after_in_child=lambda: globals().update(_IN_USE=threading.RLock()))


@contextmanager
def preserved_generators(device: torch.device) -> Iterator[None]:
    """Give torch's global generators back as they were, so that a step leaves no trace in them.

    Other threads that ask for the same wait: two learners in two threads take turns, and each has its own draws.
    """
    with _IN_USE, torch.random.fork_rng([]), preserved_generator(device):
        yield
