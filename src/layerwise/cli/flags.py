"""Refuses misspelt options of the commands that train or measure, before they import torch."""

import re
from collections.abc import Iterable, Sequence

from layerwise.cli import catalogue
from layerwise.cli.commands import BENCHES, COMMANDS, Command
from layerwise.cli.help import groups_of
from layerwise.cli.source import PACKAGE, place_of
from layerwise.parsing import take_option, unknown_options


def check_flags(name: str, words: Sequence[str]) -> None:
    """Raise LayerwiseError for an option that the help of a command does not list.

    The options of a rule, a model or a recipe from elsewhere are known only after its code has run; a command that
    names one is checked later.

    >>> check_flags("train", ["--rule.weight=0.5", "--batch_size", "64", "--no-channels-last"])
    """
    command = {**COMMANDS, **BENCHES}[name]
    given = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    if _all_declared(given, command):
        return
    chosen = {part: take_option([*words], part) for part in ("recipe", "model", "rule")}
    if name != "train":  # several rules, whose options are no flags
        del chosen["rule"]
    if any(found is not None and not _is_own(part, found) for part, found in chosen.items()):
        return
    options = [option for _, found in groups_of(name, command, words) for option in found]
    legal = [option.flag for option in options]
    for option in options:
        if not option.value:  # a switch
            front, dot, last = option.flag.removeprefix("--").rpartition(".")
            legal.append(f"--{front}{dot}no-{last}")
    if wrong := [flag for flag in given if flag.replace("_", "-") not in legal]:
        raise unknown_options(wrong, legal, name)


def _all_declared(flags: Iterable[str], command: Command) -> bool:
    """Whether every flag is clearly a field of the command's own classes, so that their source need not be parsed.

    Parsing takes a tenth of a second or two, and nearly every command has only such options.
    """
    places = {place_of(where.partition(":")[0]) for where in command.groups.values()}
    sources = "\n".join(place.read_text(encoding="utf-8") for place in places)
    fields = re.findall(r"^    (\w+):", sources, re.MULTILINE)
    names = (flag.removeprefix("--").replace("-", "_") for flag in flags)
    return all(name in fields and name not in command.hidden for name in names)


def _is_own(part: str, name: str) -> bool:
    """Whether a recipe, a model or a rule is one of this package."""
    if part == "recipe":
        return name in catalogue.recipes()
    place = (catalogue.class_of_rule if part == "rule" else catalogue.class_of_model)(name)
    return ":" not in name and place is not None and place[0].is_relative_to(PACKAGE)
