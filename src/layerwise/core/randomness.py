"""Random numbers that depend on what they are for, never on where or when they are drawn."""

import functools
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
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
    """Start torch's global generators of the host and of `device` at `seed`, and Python's and NumPy's if borrowed."""
    torch.default_generator.manual_seed(seed)
    seed_device(seed, device)
    if _BORROWERS:
        _BORROWERS[-1].seed(seed)


class OtherGenerators:
    """Python's and NumPy's global generators, from which few networks and rules draw.

    To save and restore their states takes longer than a small step. So they are watched in a first context, and later
    ones borrow them only if it drew from them.

    Attributes:
        drawn: whether the first context drew from them; None if there was none yet.
    """

    def __init__(self, drawn: bool | None = None):
        self.drawn = drawn
        self._moved = False
        self._last: Any = None

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """A context that leaves their states as they were."""
        if self.drawn is False:
            yield
            return
        states = _states()
        self._last, self._moved = states, False
        try:
            yield
            self._look()
            self.drawn = self.drawn or self._moved
        finally:
            _set(states)

    def seed(self, seed: int) -> None:
        """Start them at `seed`, if they are borrowed."""
        if self.drawn is False:
            return
        self._look()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if self.drawn is None:
            self._last = _states()

    def _look(self) -> None:
        if self.drawn is None and not self._moved:
            python, numpy = _states()
            self._moved = python != self._last[0] or any(
                not np.array_equal(now, then) for now, then in zip(numpy, self._last[1], strict=True)
            )


def _states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])


_IN_USE = threading.RLock()
"""Held while the global generators are borrowed: they are one per process, and so is whoever uses them."""
os.register_at_fork(after_in_child=lambda: globals().update(_IN_USE=threading.RLock()))
_BORROWERS: list[OtherGenerators] = []
"""Of the contexts that are open, the innermost last."""
Class = TypeVar("Class", bound=type)


def takes_turns(methods: str) -> Callable[[Class], Class]:
    """A decorator of a class whose methods wait while another thread is in `preserved_generators`, such as in a step.

    They need no draws, but read or write what a step changes: a gradient that one thread reads while another frees it
    ends the process.

    Args:
        methods: their names, separated by spaces.
    """

    def in_turn(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def waiting(*args: Any, **options: Any) -> Any:
            with _IN_USE:
                return method(*args, **options)

        return waiting

    def decorated(cls: Class) -> Class:
        for name in methods.split():
            setattr(cls, name, in_turn(getattr(cls, name)))
        return cls

    return decorated


@contextmanager
def preserved_generators(device: torch.device, others: OtherGenerators | None = None) -> Iterator[None]:
    """Give the global generators of torch, Python and NumPy back as they were, so that a step leaves no trace in them.

    Other threads that ask for the same wait: two learners in two threads take turns, and each has its own draws.

    Args:
        device: whose generator is given back, besides that of the host.
        others: decides whether Python's and NumPy's are borrowed (default: they are, or as in the context around).
    """
    with _IN_USE, torch.random.fork_rng([]), preserved_generator(device):
        around = _BORROWERS[-1] if _BORROWERS else None
        own = others or OtherGenerators(drawn=True if around is None else around.drawn)
        _BORROWERS.append(own)
        try:
            with own.borrowed():
                yield
        finally:
            _BORROWERS.pop()
            if around is not None and own.drawn:
                around._moved = True


def states_of_others() -> Any:
    """The states of Python's and NumPy's generators, for `others_at`; None if they are not borrowed."""
    return _states() if _BORROWERS and _BORROWERS[-1].drawn is not False else None


@contextmanager
def others_at(states: Any) -> Iterator[None]:
    """A context in which these generators begin at `states`; afterwards they are where they were."""
    if states is None:
        yield
        return
    now = _states()
    _set(states)
    try:
        yield
    finally:
        _set(now)
