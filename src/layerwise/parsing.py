"""Reads the words of the command line into a dataclass; what cannot be read becomes one sentence."""

import contextlib
import io
import os
import re
from collections.abc import Sequence
from typing import Any

from layerwise.errors import LayerwiseError


def parse(cls: type, argv: Sequence[str], command: str, default: Any = None) -> Any:
    """Parse options into a dataclass with tyro; what tyro refuses becomes one LayerwiseError."""
    import tyro

    printed = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # so that tyro does not break its message into lines
    try:
        wants_help = any(word in ("-h", "--help") for word in argv)
        with contextlib.redirect_stderr(printed) if not wants_help else contextlib.nullcontext():
            if wants_help:
                _restore("COLUMNS", width)
            kwargs = {} if default is None else {"default": default}
            return tyro.cli(cls, args=argv, prog=f"layerwise {command}", **kwargs)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise LayerwiseError(_one_sentence(printed.getvalue(), command)) from None
    finally:
        _restore("COLUMNS", width)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _one_sentence(box: str, command: str) -> str:
    """The message inside the frame that tyro draws, reworded."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│┃| ") for line in text.splitlines()]
    lines = [line for line in lines if line.strip("─-+╭╮╰╯ ")]  # the frame is drawn in ASCII on some terminals
    message = lines[1] if len(lines) > 1 else "the options cannot be read"
    for pattern, words in PLAIN:
        message = re.sub(pattern, words, message)
    hint = ""
    if "Perhaps you meant:" in lines:
        hint = f", did you mean {lines[lines.index('Perhaps you meant:') + 1].split()[0]}"
    return f"{message.rstrip('.')}{hint}; see layerwise {command} --help."


PLAIN = (
    (r"^Error parsing (--\S+): invalid literal for int\(\) .*: (.*)", r"\1 is \2, which is not a whole number"),
    (r"^Error parsing (--\S+): could not convert string to float: (.*)", r"\1 is \2, which is not a number"),
    (r"^Error parsing (--\S+): Failed to parse key-value pairs!", r"\1 takes pairs of a name and a number"),
    (r"^Missing value for argument '(.*)'\. Expected 1 values", r"\1 needs a value"),
    (r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)", r"\2 is \1; choose one of \3"),
    (r"^Unrecognized options: ", "unknown options: "),
)


def take_option(argv: list[str], name: str) -> str | None:
    """Take `--name VALUE` or `--name=VALUE` out of the arguments; the last one counts."""
    value, kept, words = None, [], iter(argv)
    for word in words:
        if word == f"--{name}":
            value = next(words, None)
            if value is None:
                raise LayerwiseError(f"--{name} needs a value; see layerwise train --help.")
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        else:
            kept.append(word)
    argv[:] = kept
    return value
