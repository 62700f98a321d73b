"""Reads JSON records and checks every field with msgspec before use.

A record may come from an older version, from a crash, or from someone else. So nothing in it is trusted.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec

from layerwise.errors import LayerwiseError, why
from layerwise.files import UnreadableFile, read_text, shown
from layerwise.parsing import LARGEST

LIMIT = 2**28
"""Bytes of the largest record that is read."""
Count = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
"""A whole number, 0 or larger."""
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
"""A finite number, 0 or larger."""


class DamagedRecord(LayerwiseError):
    """A record exists and is not in the format of this program."""


def read_json(file: Path, kind: Any, advice: str, inside: Path | None = None) -> Any:
    """Read a JSON file as the type `kind`. Fields that `kind` does not name are left out.

    Args:
        file: a regular file.
        kind: the type for msgspec: a TypedDict, a dataclass, `dict[str, float]`; `Any` accepts everything.
        advice: what to do about a refused file; the end of the sentence.
        inside: folder in which the file itself must be (default: anywhere).

    Raises:
        MissingFile: there is no such file.
        DamagedRecord: the file is not UTF-8 or not JSON, gives a name twice, is nested too deeply, or a field has
            another type.
        LayerwiseError: the file cannot be read.
    """
    return convert(parse_json(_text(file, advice, inside), shown(file), advice), kind, shown(file), advice)


def read_lines(file: Path, kind: Any, advice: str, inside: Path | None = None, torn: bool = False) -> list[Any]:
    """Read a file with one JSON value per line, each as the type `kind`.

    Args:
        file: a regular file.
        kind: as for `read_json`.
        advice: as for `read_json`.
        inside: as for `read_json`.
        torn: skip damaged lines, because a crash may have left an incomplete one.

    Raises:
        MissingFile: there is no such file.
        DamagedRecord: a line is damaged, and `torn` is false.
        LayerwiseError: the file cannot be read.
    """
    found = []
    for number, line in enumerate(_text(file, advice, inside).splitlines(), 1):
        name = f"line {number} of {shown(file)}"
        try:
            found.append(convert(parse_json(line, name, advice), kind, name, advice))
        except DamagedRecord:
            if not torn:
                raise
    return found


def parse_json(text: str, name: str, advice: str) -> Any:
    """Parse a JSON text; `name` is that of the record, for an error.

    Raises:
        DamagedRecord: it is not JSON, gives a name twice, or is nested too deeply.

    >>> parse_json('{"a": 1}', "a.json", "write it again")
    {'a': 1}
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as reason:
        raise damaged(name, why(reason), advice) from reason


def convert(value: Any, kind: Any, name: str, advice: str) -> Any:
    """Convert a value from JSON to the type `kind`; `name` is that of the record, for an error.

    Raises:
        DamagedRecord: a field is missing, or of another type; the error gives its place.

    >>> convert([1, 2.5], tuple[float, ...], "a.json", "write it again")
    (1.0, 2.5)
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as reason:
        raise damaged(name, why(reason), advice) from reason


def damaged(name: str, reason: str, advice: str) -> DamagedRecord:
    """The error about a record that is not in the format of this program."""
    return DamagedRecord(f"{name} is damaged ({' '.join(reason.split())[:300]}); {advice}.")


def _text(file: Path, advice: str, inside: Path | None) -> str:
    try:
        return read_text(file, advice, inside, LIMIT)
    except UnreadableFile as reason:
        if isinstance(reason.__cause__, UnicodeDecodeError):
            raise damaged(shown(file), "it is not UTF-8 text", advice) from reason
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is given twice")
    return found
