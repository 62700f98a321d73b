"""What options may be: each range of numbers is declared once, checked in one place, and refused with one sentence.

A field says its range in its type (`weight: NonNegativeFloat = 0.1`), and `check_fields` reads it there. What the
command line and `Learner` both take is in the table `TRAINING`, which `check_ranges` reads.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from layerwise.errors import LayerwiseError, short
from layerwise.parsing import LARGEST, check_largest


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds: none, a lower one, or both. NaN, infinity and integers beyond 64 bits are in none.

    >>> Range(least=1, whole=True).words, Range(above=0).words, Range(least=0, below=1).words
    ('a whole number, 1 or more', 'a finite number larger than 0', 'a finite number in [0, 1)')
    >>> 1 in Range(least=1), True in Range(least=1), float("nan") in Range()
    (True, False, False)
    """

    least: float | None = None
    """Smallest number that is allowed."""
    above: float | None = None
    """All numbers are larger than this."""
    most: float | None = None
    """Largest number that is allowed."""
    below: float | None = None
    """All numbers are smaller than this."""
    whole: bool = False
    """Whether only whole numbers are allowed."""

    @property
    def words(self) -> str:
        """The range in words, for an error sentence."""
        kind = "a whole number" if self.whole else "a finite number"
        if self.most is not None or self.below is not None:
            low = f"({self.above}" if self.least is None else f"[{self.least}"
            high = f"{self.below})" if self.most is None else f"{self.most}]"
            return f"{kind} in {low}, {high}"
        if self.above is not None:
            return f"{kind} larger than {self.above}"
        return kind if self.least is None else f"{kind}, {self.least} or {'more' if self.whole else 'larger'}"

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value
        return (
            abs(number) <= (LARGEST if self.whole else sys.float_info.max)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )


PositiveInt = Annotated[int, Range(least=1, whole=True)]
NonNegativeInt = Annotated[int, Range(least=0, whole=True)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
"""A share, 0 and 1 included."""
ProperFraction = Annotated[float, Range(least=0, below=1)]
"""A share that is never the whole."""
PositiveFraction = Annotated[float, Range(above=0, most=1)]
"""A share that is never nothing."""


DataTask = Literal["classification", "regression", "multilabel", "segmentation", "language_model"]
"""What the labels of a data set are: a class, numbers, zeros and ones, a class per pixel, or the next token."""
TokenizerKind = Literal["characters", "bytes", "bpe"]
"""How text is taken apart."""
Where = Literal["none", "host", "disk"]
"""Where blocks wait until they run: on the device itself, in host memory, or in a file."""


class Training(TypedDict, total=False):
    """The numeric options of training, by their names on the command line, in `TrainOptions` and in `Learner`."""

    epochs: PositiveInt
    steps: PositiveInt | None
    batch_size: PositiveInt
    blocks: PositiveInt | None
    image_size: PositiveInt | None
    train_samples: PositiveInt | None
    val_fraction: ProperFraction
    label_noise: ProperFraction
    mixup: Annotated[float, Range(least=0, most=100)]
    cutmix: Annotated[float, Range(least=0, most=100)]
    lr: PositiveFloat
    lr_multipliers: dict[str, NonNegativeFloat]
    weight_decay: NonNegativeFloat
    clip: PositiveFloat | None
    accumulate: PositiveInt
    micro: PositiveInt
    label_smoothing: ProperFraction
    warmup: ProperFraction
    total: NonNegativeInt
    final: NonNegativeFloat
    seed: NonNegativeInt
    threads: PositiveInt | None
    save_every: PositiveInt | None
    log_every: PositiveInt
    eval_every: PositiveInt | None
    vocabulary: PositiveInt
    window: PositiveInt
    timeout: Annotated[float, Range(above=0, most=10**7)]


TRAINING: Mapping[str, Any] = get_type_hints(Training, include_extras=True)
"""Type, with its range, of every option of `Training`."""


def check_ranges(**values: Any) -> None:
    """Raise LayerwiseError if an option of training is out of its range in `TRAINING`.

    >>> check_ranges(lr=0.1, clip=None, seed=3)
    >>> check_ranges(accumulate=0)
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: accumulate is 0; it must be a whole number, 1 or more.
    """
    for name, value in values.items():
        check(name, value, TRAINING[name])


def check_fields(options: Any) -> None:
    """Raise LayerwiseError if a field of a dataclass is out of the range that its type declares."""
    found = fields(options)
    kinds: Mapping[str, Any] = {field.name: field.type for field in found}
    if any(isinstance(kind, str) for kind in kinds.values()):  # from __future__ import annotations
        kinds = get_type_hints(type(options), include_extras=True)
    for field in found:
        check(field.name, getattr(options, field.name), kinds[field.name])


def check(name: str, value: Any, kind: Any) -> None:
    """Raise LayerwiseError unless a value is in the range of its type; types without a range allow everything.

    Args:
        name: of the option, for the sentence.
        value: what was given.
        kind: `Annotated[..., Range(...)]`, or None, tuples, dictionaries and unions of such; `bool`.
    """
    if kind is bool:
        if not isinstance(value, bool):
            raise LayerwiseError(f"{name} is {short(value)}; it must be True or False.")
    elif get_origin(kind) is Annotated:
        for allowed in kind.__metadata__:
            if isinstance(allowed, Range) and allowed.whole:
                check_largest(name, value)
            if isinstance(allowed, Range) and value not in allowed:
                raise LayerwiseError(f"{name} is {short(value)}; it must be {allowed.words}.")
    elif get_origin(kind) is dict:
        for key, item in value.items():
            check(f"{name}[{key}]", item, get_args(kind)[1])
    elif get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise LayerwiseError(f"{name} is {short(value)}; give a tuple of values.")
        if not value and get_origin(get_args(kind)[0]) is Annotated:
            raise LayerwiseError(f"{name} is (); give one number or several.")
        for item in value:
            check(name, item, get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType) and not (value is None and NoneType in get_args(kind)):
        members = [member for member in get_args(kind) if member is not NoneType]
        several = [member for member in members if get_origin(member) is tuple]
        single = [member for member in members if member not in several]
        for member in several if several and isinstance(value, tuple) else single:
            check(name, value, member)
