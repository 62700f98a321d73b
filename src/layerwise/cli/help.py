"""The help of `train` and `compare` where neither rule nor model is named: without torch, which takes seconds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Annotated, Any

from layerwise.parsing import parse, take_option
from layerwise.runs.settings import RunSettings, build_options, load_recipe

BRINGING = ("recipe", "rule", "model", "data")
"""Options whose values bring options or defaults of their own."""


@dataclass(frozen=True)
class ModelByName:
    """The options that come first."""

    recipe: str = "digits"
    """Recipe whose options are the defaults below, see layerwise ls recipes; or a TOML file."""
    model: str = "mlp"
    """Model, see layerwise ls models; with --help its own options are listed, too."""


@dataclass(frozen=True)
class RuleByName(ModelByName):
    """The options that come first, where there is one rule."""

    rule: str = "sll"
    """Rule, see layerwise ls rules; with --help its own options are listed, too."""


def print_help(argv: Sequence[str], command: str, about: str, *parts: type, hidden: Sequence[str] = ()) -> None:
    """Print the help, if the words ask for it and name nothing that has options of its own.

    Args:
        argv: words after the command.
        command: its name.
        about: what it does, for the help.
        parts: dataclasses with its options; those of the last one come first.
        hidden: options of theirs that it does not have.

    Raises:
        SystemExit: the help was printed.
    """
    if not {"-h", "--help"} & {*argv} or any(take_option([*argv], name) is not None for name in BRINGING):
        return
    from tyro.conf import Fixed, Suppress

    values = {name: value for name, value in load_recipe("digits").values.items() if name not in ("rule", "model")}
    settings = build_options(RunSettings, values, "recipe digits")
    kept = [(name, Annotated[Any, Suppress, Fixed], field(default=getattr(settings, name))) for name in hidden]
    cls = make_dataclass("Options", kept, bases=parts, frozen=True)
    cls.__doc__ = about
    parse(cls, argv, command, cls(**asdict(settings)))
