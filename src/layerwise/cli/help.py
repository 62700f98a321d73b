"""The help of every command: options in groups, as wide as the terminal, read from the source without torch."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence

from layerwise.cli import catalogue
from layerwise.cli.commands import ANYWHERE, BENCHES, COMMANDS, Command
from layerwise.cli.early import check_options
from layerwise.cli.options import Option, group, in_words, options_of
from layerwise.parsing import take_option

WIDE = 100
"""Largest number of columns used."""
MARGIN = 26
"""Columns of flags; on a terminal of 72 columns or more the description is beside them."""
LONG = 30
"""Choices up to this many characters are written beside a flag instead of a name for the value."""


def usage() -> str:
    """Text of `layerwise --help`."""
    width = columns()
    lines = textwrap.wrap("layerwise: train deep networks without global backpropagation", width)
    lines += ["", "usage: layerwise COMMAND [OPTIONS]", ""]
    for name, command in COMMANDS.items():
        lines += entry(f"{name} {command.arguments.partition(' | ')[0]}".strip(), command.about, width)
    after = "layerwise COMMAND --help lists the options of a command. Anywhere on the line:"
    lines += ["", *textwrap.wrap(after, width)]
    for flag, about in ANYWHERE.items():
        lines += entry(flag, about, width)
    return "\n".join([*lines, *entry("--version", "print the version", width)]) + "\n"


def help_of(name: str, words: Sequence[str] = ()) -> str:
    """Help of a command, for the rule, the model and the recipe in its words.

    >>> print(help_of("export").splitlines()[0])
    usage: layerwise export RUN FILE [OPTIONS]
    """
    command, width = {**COMMANDS, **BENCHES}[name], columns()
    if name in ("train", "compare"):
        check_options(words, "recipe", "model", "data", *(["rule"] if name == "train" else []))
    given = f" {command.arguments}" if command.arguments else ""
    lines = textwrap.wrap(f"usage: layerwise {name}{given} [OPTIONS]", width, subsequent_indent="    ")
    lines.append("")
    lines += textwrap.wrap(command.about[0].upper() + command.about[1:] + ".", width)
    if command.text:
        lines += textwrap.wrap(command.text, width)
    for title, options in groups_of(name, command, words):
        lines += ["", title]
        for option in options:
            lines += entry(written(option), described(option), width)
    lines += ["", "anywhere"]
    for flag, about in ANYWHERE.items():
        lines += entry(flag, about, width)
    return "\n".join(lines) + "\n"


def groups_of(name: str, command: Command, words: Sequence[str]) -> list[tuple[str, list[Option]]]:
    """The options of a command under the titles of their groups, with those of its rule and its model.

    Args:
        name: of the command.
        command: its entry.
        words: the rest of the line.
    """
    found = [(title, group(where, command.hidden)) for title, where in command.groups.items()]
    if name not in ("train", "compare"):
        return found
    recipe = _recipe(words)
    chosen = {}
    for part in ("rule", "model") if name == "train" else ("model",):
        table = dict(recipe.pop(part, {}))
        own = str(table.pop("name", {"rule": "sll", "model": "mlp"}[part]))
        chosen[part] = take_option([*words], part) or own
        place = (catalogue.class_of_rule if part == "rule" else catalogue.class_of_model)(chosen[part])
        if place is None:
            continue
        options = options_of(*place, prefix=f"{part}.")
        found.append((f"{part} {chosen[part]}", _defaults(options, table if chosen[part] == own else {}, f"{part}.")))
    recipe |= chosen | {"recipe": take_option([*words], "recipe") or "digits"}
    found = [(title, _defaults(options, recipe)) for title, options in found]
    # The options of rule and model go with those of the network.
    last = [pair for pair in found if pair[0].startswith(("rule ", "model "))]
    rest = [pair for pair in found if pair not in last]
    return [*rest[:1], *last, *rest[1:]]


def _recipe(words: Sequence[str]) -> dict:
    """The values of the recipe that a command starts from."""
    from layerwise.runs.settings import load_recipe

    data = take_option([*words], "data")
    default = "shakespeare" if data is not None and catalogue.is_text(data) else "digits"
    return dict(load_recipe(take_option([*words], "recipe") or default).values)


def _defaults(options: Iterable[Option], values: dict, prefix: str = "") -> list[Option]:
    """Set the defaults of options to those of a recipe."""
    from layerwise.runs.settings import FLAGS

    fields = {f"--{flag}": name for name, flag in FLAGS.items()}
    names = {o: fields.get(o.flag, o.flag.removeprefix(f"--{prefix}").replace("-", "_")) for o in options}
    return [
        option._replace(default=in_words(values[name])) if name in values else option for option, name in names.items()
    ]


def written(option: Option) -> str:
    """Format an option as it is typed, with a placeholder for its value.

    >>> written(Option("--lr", "X", (), False, None, "")), written(Option("--data.documents", "", (), False, None, ""))
    ('--lr X', '--data.[no-]documents')
    """
    if not option.value:
        front, dot, last = option.flag.removeprefix("--").rpartition(".")
        return f"--{front}{dot}[no-]{last}"
    listed = "|".join(option.choices)
    value = listed if option.choices and len(listed) <= LONG else option.value
    return f"{option.flag} {value}" + (" ..." if option.several else "")


def described(option: Option) -> str:
    """Describe an option: its effect, its choices if nothing else lists them, and its default."""
    text = option.about
    if len("|".join(option.choices)) > LONG and not all(choice in text for choice in option.choices):
        text += f" One of {', '.join(option.choices)}."
    return f"{text} (default: {option.default})" if option.default is not None else text


def entry(flag: str, about: str, width: int) -> list[str]:
    """Format a flag and its description: side by side, or one below the other on a narrow terminal.

    >>> entry("--lr X", "Learning rate.", 80)
    ['  --lr X                  Learning rate.']
    >>> entry("--lr X", "Learning rate.", 60)
    ['  --lr X', '      Learning rate.']
    """
    narrow = width < 72
    margin = 6 if narrow else MARGIN
    text = textwrap.wrap(about, max(20, width - margin), break_on_hyphens=False) or [""]
    left = textwrap.wrap(f"  {flag}", width, subsequent_indent="      ", break_on_hyphens=False)
    if not narrow and len(left) == 1 and len(left[0]) < margin:
        return [f"{left[0]:<{margin}}{text[0]}".rstrip(), *(" " * margin + line for line in text[1:])]
    return [*left, *(" " * margin + line for line in text)]


def columns() -> int:
    """Number of columns of the terminal that are used."""
    return max(40, min(WIDE, shutil.get_terminal_size().columns))
