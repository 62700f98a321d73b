"""Records of a run (JSON, and JSON line by line), read back and checked before anyone uses them."""

import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import LayerwiseError
from layerwise.files import MissingFile, read_text, shown

LARGEST = 2**63 - 1  # torch and the file formats hold no larger whole number


class DamagedRecord(LayerwiseError):
    """A record is there and is not what this program writes."""


def read_json(file: Path, advice: str, fields: Mapping[str, Any] | None = None) -> Any:
    """Reads a JSON file.

    Args:
        file: a regular file.
        advice: what to do about a file that is refused; the end of the sentence.
        fields: types of the fields that the file's object must have, as annotations; further fields are not checked.

    Raises:
        MissingFile: there is no such file.
        DamagedRecord: the file is not JSON, gives a name twice, is nested too deeply, or a field has another type.
        LayerwiseError: the file cannot be read.
    """
    value = parse_json(read_text(file, advice), shown(file), advice)
    if fields is not None:
        check_fields(value, fields, shown(file), advice)
    return value


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads a log: one JSON object per line with `step` and `split`. A line that a crash left half-written is dropped.

    Raises:
        LayerwiseError: the file is there and cannot be read.
    """
    advice = "restore the file, or start the run again"
    try:
        text = read_text(file, advice)
    except MissingFile:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = parse_json(line, shown(file), advice)
            check_fields(value, {"step": int, "split": str}, shown(file), advice)
        except DamagedRecord:
            continue
        found.append(value)
    return found


def parse_json(text: str, name: str, advice: str) -> Any:
    """The value of a JSON text; `name` is that of the file, for the sentence.

    Raises:
        DamagedRecord: it is not JSON, gives a name twice, or is nested too deeply.

    >>> parse_json('{"a": 1}', "a.json", "write it again")
    {'a': 1}
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as reason:
        raise DamagedRecord(f"{name} is damaged ({why(reason)}); {advice}.") from reason


def check_fields(value: Any, fields: Mapping[str, Any], name: str, advice: str) -> None:
    """Raise DamagedRecord unless `value` is a mapping with these fields, each of its annotated type."""
    if not isinstance(value, Mapping):
        raise DamagedRecord(f"{name} is damaged (it holds no object); {advice}.")
    for field, hint in fields.items():
        if field not in value:
            if not fits(None, hint):
                raise DamagedRecord(f"{name} is damaged ({field!r} is missing); {advice}.")
        elif not fits(value[field], hint):
            raise DamagedRecord(
                f"{name} is damaged ({field} = {short(value[field])} is not {described(hint)}); {advice}."
            )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON or TOML is of an annotated type; whole numbers count as floats.

    >>> fits([1, 2.5], tuple[float, ...]), fits(True, int), fits(10**400, float)
    (True, False, False)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(fits(v, arguments[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _as_float(value) is not None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    return value is None if hint in (None, types.NoneType) else isinstance(value, hint)


def _as_float(value: float) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def described(hint: Any) -> str:
    """A type, for a sentence."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def is_amount(value: Any) -> bool:
    """Whether a value is a finite number from 0 up."""
    return fits(value, float) and math.isfinite(value) and value >= 0


def short(value: Any) -> str:
    """A value as a sentence shows it, cut where it is long.

    >>> short("x" * 99)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a tree of thousands of levels
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def why(reason: BaseException) -> str:
    """The first line of an error's words, or its name."""
    if isinstance(reason, RecursionError):
        return "it is nested too deeply"
    said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return said.splitlines()[0]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is given twice")
    return found
