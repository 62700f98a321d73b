"""Reads the words of the command line into a dataclass; errors become one sentence."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Sequence
from typing import Any

from layerwise.errors import LayerwiseError, short

LARGEST = 2**63 - 1
"""The largest whole number that torch and the file formats hold."""
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(?i:inf|infinity|nan)")
WHOLE = re.compile(r"[+-]?[0-9]+")


def read_whole(word: str) -> int:
    """Read a whole number of ASCII digits; Python's `int` also accepts `1_0` and the digits of other scripts.

    Raises:
        ValueError: the word is not such a number.

    >>> read_whole("-12")
    -12
    >>> read_whole("1_0")
    Traceback (most recent call last):
    ValueError: invalid literal for int() with base 10: '1_0'
    """
    if not WHOLE.fullmatch(word.strip(" ")):
        raise ValueError(f"invalid literal for int() with base 10: {word!r}")
    return int(word)


def check_largest(name: str, value: Any) -> None:
    """Raise LayerwiseError for a whole number of more than 64 bits, also inside tuples and mappings.

    >>> check_largest("seed", 2**63 - 1)
    >>> check_largest("top_k", 2**63)
    Traceback (most recent call last):
    layerwise.errors.LayerwiseError: top_k is 9223372036854775808; it must be 2^63 - 1 at most.
    """
    if isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            check_largest(name, item)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise LayerwiseError(f"{name} is {short(value)}; it must be 2^63 - 1 at most.")


def read_number(word: str) -> float:
    """Read a number, as `read_whole`; `inf` and `nan` are accepted here, and refused by ranges.

    Raises:
        ValueError: the word is not a number.

    >>> read_number("1e-3"), read_number(".5")
    (0.001, 0.5)
    """
    if not NUMBER.fullmatch(word.strip(" ")):
        raise ValueError(f"could not convert string to float: {word!r}")
    return float(word)


def environment_number(name: str, default: int = 0) -> int:
    """Read a whole number, 0 or larger, from an environment variable that launchers such as torchrun set.

    Raises:
        LayerwiseError: it holds something else.
    """
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if (number := read_whole(text)) >= 0:
            return number
    raise LayerwiseError(f"{name} is {short(text)}; give a whole number, or start the processes with torchrun.")


def parse(cls: type, argv: Sequence[str], command: str, default: Any = None) -> Any:
    """Parse options into a dataclass with tyro; its errors become one LayerwiseError."""
    import tyro
    from tyro.constructors import ConstructorRegistry

    numbers = ConstructorRegistry()
    numbers.primitive_rule(_number_rule)

    printed = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"  # so that tyro does not break its message into lines
    try:
        wants_help = any(word in ("-h", "--help") for word in argv)
        with contextlib.redirect_stderr(printed) if not wants_help else contextlib.nullcontext(), numbers:
            if wants_help:
                _restore("COLUMNS", width)
            kwargs = {} if default is None else {"default": default}
            found = tyro.cli(cls, args=argv, prog=f"layerwise {command}", **kwargs)
        for field in dataclasses.fields(found):
            check_largest(field.name, getattr(found, field.name))
            if field.name in PLACES and getattr(found, field.name) == "":
                flag = f"--{field.name.replace('_', '-')}"
                raise LayerwiseError(f"{flag} is empty; give a path, or leave the option out.")
        return found
    except SystemExit as stop:
        if not stop.code:
            raise
        if not all(word.isprintable() for word in argv):  # tyro's message is read line by line
            printable = ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in w) for w in argv]
            parse(cls, printable, command, default)
        raise LayerwiseError(_one_sentence(printed.getvalue(), command)) from None
    finally:
        _restore("COLUMNS", width)


def _number_rule(info: Any) -> Any:
    """How tyro reads an option that is a number; None for others."""
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type not in (int, float):
        return None
    kind, read = (int, read_whole) if info.type is int else ((int, float), read_number)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=info.type.__name__.upper(),
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


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
    for word in re.findall(r"--[\w-]+", message) if message.startswith("unknown options") else ():
        if word in ELSEWHERE:
            hint = f", here it is {ELSEWHERE[word]}"
    if not hint and "Perhaps you meant:" in lines:
        hint = f", did you mean {lines[lines.index('Perhaps you meant:') + 1].split()[0]}"
    return f"{message.rstrip('.')}{hint}; see layerwise {command} --help."


def unknown_options(flags: Sequence[str], legal: Sequence[str], command: str) -> LayerwiseError:
    """The error about options that a command does not have, with the one that was meant.

    >>> str(unknown_options(["--lrr"], ["--lr", "--epochs"], "train"))
    'unknown options: --lrr, did you mean --lr; see layerwise train --help.'
    """
    hint = ""
    for flag in flags[::-1]:
        near = difflib.get_close_matches(flag.replace("_", "-"), legal, n=1)
        if flag in ELSEWHERE:
            hint = f", here it is {ELSEWHERE[flag]}"
        elif near:
            hint = f", did you mean {near[0]}"
    shown = ", ".join(word if len(word) < 60 else f"{word[:57]}..." for word in flags)
    return LayerwiseError(f"unknown options: {shown}{hint}; see layerwise {command} --help.")


ELSEWHERE = {
    **dict.fromkeys(("--learning-rate", "--learning_rate", "--base-lr", "--eta"), "--lr"),
    **dict.fromkeys(("--bs", "--batch", "--batch_size", "--train-batch-size"), "--batch-size"),
    **dict.fromkeys(("--wd", "--weight_decay"), "--weight-decay"),
    **dict.fromkeys(("--num-epochs", "--n-epochs", "--max-epochs", "--num-train-epochs"), "--epochs"),
    **dict.fromkeys(("--max-steps", "--iterations", "--iters", "--num-steps"), "--steps"),
    **dict.fromkeys(("--dataset", "--data-path", "--data-dir", "--dataset-name"), "--data"),
    **dict.fromkeys(("--output-dir", "--output_dir", "--outdir", "--log-dir", "--save-dir"), "--out"),
    **dict.fromkeys(("--gpu", "--cuda", "--gpus", "--use-cuda"), "--device cuda"),
    **dict.fromkeys(("--fp16", "--half"), "--precision fp16"),
    **dict.fromkeys(("--bf16", "--amp", "--mixed-precision"), "--precision bf16"),
    **dict.fromkeys(("--rules", "--method", "--algorithm", "--algo"), "--rule"),
    **dict.fromkeys(("--arch", "--network", "--model-name"), "--model"),
    **dict.fromkeys(("--depth", "--layers", "--n-layers", "--num-layers"), "--model.depth"),
    **dict.fromkeys(("--width", "--hidden-size", "--hidden"), "--model.width"),
    **dict.fromkeys(("--grad-clip", "--max-grad-norm", "--clip-norm", "--gradient-clip-val"), "--clip"),
    **dict.fromkeys(("--gradient-accumulation-steps", "--grad-accum", "--accumulate-grad-batches"), "--accumulate"),
    **dict.fromkeys(("--optim", "--opt"), "--optimizer"),
    **dict.fromkeys(("--lr-scheduler", "--scheduler", "--lr-schedule"), "--schedule"),
    **dict.fromkeys(("--targets", "--target", "--label-column", "--label"), "--data.label-column"),
    "--random-seed": "--seed",
    "--workers": "--jobs",
}
"""Maps names of options in other programs to the names here."""


PLACES = ("out", "plot", "offload_folder")
"""Options that name a file or folder of results; an empty one is a variable of a script that was not set."""


PLAIN = (
    (r"^Error parsing (--\S+): invalid literal for int\(\) .*: (.*)", r"\1 is \2, which is not a whole number"),
    (r"^Error parsing (--\S+): could not convert string to float: (.*)", r"\1 is \2, which is not a number"),
    (r"^Error parsing (--\S+): Failed to parse key-value pairs!", r"\1 takes pairs of a name and a number"),
    (r"^Error parsing (--\S+): no type matching (.*) could be instantiated from \[(.*)\]", r"\1 is \3; it takes \2"),
    (
        r"^Error parsing (--\S+): Could not parse arguments \[(.*)\] into tuple type (?:typing\.)?(.*)",
        r"\1 is \2; it takes \3",
    ),
    (
        r"^Missing value for argument '(.*)'\. Expected 1 values",
        r"\1 needs a value; one that begins with - is given as \1=VALUE",
    ),
    (r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)", r"\2 is \1; choose one of \3"),
    (r"^Unrecognized options: ", "unknown options: "),
)


def take_option(argv: list[str], name: str, command: str = "train") -> str | None:
    """Take `--name VALUE` or `--name=VALUE` out of the arguments; the last one counts."""
    value, kept, words = None, [], iter(argv)
    for word in words:
        if word == f"--{name}":
            value = next(words, None)
            if value is None:
                raise LayerwiseError(f"--{name} needs a value; see layerwise {command} --help.")
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        else:
            kept.append(word)
    argv[:] = kept
    return value
