"""The exception for user errors, and one-sentence explanations of all failures."""

import contextlib
import contextvars
import difflib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
traceback_wanted = contextvars.ContextVar("traceback_wanted", default=False)
"""Whether `--debug` was given."""
quiet = contextvars.ContextVar("quiet", default=False)
"""Whether `--quiet` was given: no progress and no notes."""
noted: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("noted", default=None)
"""The notes that the running command has printed, each of which it prints once."""


class LayerwiseError(Exception):
    """A user error, explained in one sentence: what is wrong and how to fix it.

    The command line prints the sentence and exits with code 2; no traceback.
    """


MANY = 30
"""Largest number of names that an error lists."""


def suggestion(given: str, legal: Sequence[str]) -> str:
    """The end of an error sentence: the nearest legal name, if one is near, and all of them.

    >>> suggestion("sl", ["sll", "backprop"])
    "did you mean 'sll'? legal names: sll, backprop"
    """
    near = difflib.get_close_matches(str(given), legal, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "legal names: " + ", ".join(legal)


def unknown(what: str, given: str, legal: Sequence[str]) -> LayerwiseError:
    """The error about an unknown name; a long list of legal names is given only if none is similar.

    >>> str(unknown("rule", "spl", ["sll", "backprop"]))
    "unknown rule 'spl'; did you mean 'sll'? legal names: sll, backprop."
    """
    near = difflib.get_close_matches(str(given), legal, n=1) if len(legal) > MANY else []
    if near:
        return LayerwiseError(
            f"unknown {what} {short(given)}; did you mean {near[0]!r}? `layerwise ls {what}s` lists them all."
        )
    return LayerwiseError(f"unknown {what} {short(given)}; {suggestion(given, legal)}.")


def short(value: Any) -> str:
    """Show a value in a sentence, truncated if it is long.

    >>> short("x" * 99)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with thousands of digits, or a tree with thousands of levels
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def why(reason: BaseException) -> str:
    """The first line of an error's message, or its name."""
    if isinstance(reason, RecursionError):
        return "it is nested too deeply"
    said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return said.splitlines()[0]


def tell_torchrun(sentence: str) -> None:
    """If torchrun has started this process, add the sentence to the report that torchrun prints at its end.

    torchrun prints its own traceback, and then what each failed process has written to a file.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": f"layerwise: {sentence}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "w") as report:  # the sentence is printed in any case
            json.dump({"message": message}, report)


def report_error(error: BaseException, silent: bool = False) -> int:
    """Say in one sentence what went wrong, here and in torchrun's report; with `--debug` the traceback before it.

    Args:
        error: what was raised.
        silent: leave the sentence to another rank of the same job.

    Returns:
        The exit code of a failure, 2.
    """
    sentence = on_one_line(explained(error))
    if traceback_wanted.get():
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    tell_torchrun(sentence)
    if not silent:
        say(sentence)
    return 2


def say(sentence: str) -> None:
    """Print a sentence to standard error."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"layerwise: {on_one_line(sentence)}", file=sys.stderr, flush=True)


def note(sentence: str) -> None:
    """Print a note to standard error that needs no action, once per command, unless `--quiet` was given."""
    known = noted.get()
    if quiet.get() or (known is not None and sentence in known):
        return
    if known is not None:
        known.add(sentence)
    say(f"note: {sentence}")


def on_one_line(text: str) -> str:
    """Escape control characters in a text, because names of files may contain anything.

    >>> print(on_one_line("a" + chr(10) + "b" + chr(27) + "[2J"))
    a\\nb\\x1b[2J
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def explained(error: BaseException) -> str:
    """Explain an exception in one sentence: what happened, and what to do; for an unforeseen one also where.

    >>> explained(FileNotFoundError(2, "No such file or directory", "notes.txt"))
    'cannot use notes.txt (No such file or directory); correct the path or its permissions.'
    """
    if isinstance(error, LayerwiseError):
        return str(error)
    first = " ".join(str(error).split())[:300].rstrip(".")
    if isinstance(error, OSError) and error.errno in FULL:
        file = f" {error.filename}" if error.filename is not None else ""
        return f"could not write{file or ' a file'} ({error.strerror}); free some space and start the command again."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {error.filename} ({error.strerror}); correct the path or its permissions."
    if is_out_of_memory(error):
        return f"out of memory{f' ({first})' if first else ''}; use smaller batches or a smaller model."
    kind = type(error).__name__
    return (
        f"unexpected {kind}{f': {first}' if first else ''} ({_place(error)}); please report it, with the command and "
        "what it prints when --debug is added."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or an accelerator has run out; on the host only torch's message says so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _place(error: BaseException) -> str:
    """The last line of layerwise that ran."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).parent)
    own = [frame for frame in frames if frame.filename.startswith(root + os.sep)] or frames
    if not own:
        return "place unknown"
    return f"{os.path.relpath(own[-1].filename, os.path.dirname(root))}, line {own[-1].lineno}"
