"""A rule with its options in one word, as on the command line: `solo:group=3:readout=random`."""

import contextlib
import dataclasses
import typing
from typing import Any

from layerwise import rules
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError, suggestion
from layerwise.parsing import read_number, read_whole


def split_word(word: str) -> tuple[str, list[tuple[str, str]]]:
    """The name of a rule, and its options with their values.

    Raises:
        LayerwiseError: an option without a value, or one that is given twice.

    >>> split_word("sll:overlap=1:weight=0/1")
    ('sll', [('overlap', '1'), ('weight', '0/1')])
    """
    name, *settings = word.split(":")
    if name.endswith(".py") and settings:  # FILE.py:Class
        name = f"{name}:{settings.pop(0)}"
    found = []
    for setting in settings:
        option, equals, text = setting.partition("=")
        if not equals:
            raise LayerwiseError(f"{word}: write {option}=VALUE after the colon.")
        found.append((option.replace("-", "_"), text))
        if [name for name, _ in found].count(found[-1][0]) > 1:
            raise LayerwiseError(f"{word} gives {option} twice; leave one out.")
    return name, found


def rule_of(word: str) -> Rule:
    """The rule that a word names, with its options.

    Raises:
        LayerwiseError: an unknown rule or option, or a value that the rule refuses.

    >>> rule_of("solo:group=3:scale=1").scale
    '1'
    """
    name, settings = split_word(word)
    hints = fields_of(rules.get(name)) if settings else {}
    for option, _ in settings:
        if option not in hints:
            raise LayerwiseError(f"{word}: no option {option!r}; {suggestion(option, list(hints))}.")
    return rules.create(name, **{option: value_of(text, hints[option]) for option, text in settings})


def fields_of(cls: type) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def value_of(text: str, hint: Any) -> Any:
    """Read a value from a word: a number if the option takes one.

    >>> value_of("0/1", float), value_of("none", int | None), value_of("1", typing.Literal["learned", "1"])
    ((0, 1), None, '1')
    """
    if hint is str or text in typing.get_args(hint):
        return text
    if "/" in text:
        return tuple(value_of(part, hint) for part in text.split("/"))
    if text in ("none", "None"):
        return None
    if text in ("true", "false"):
        return text == "true"
    for read in (read_whole, read_number):
        with contextlib.suppress(ValueError):
            return read(text)
    return text
