"""The command line: `layerwise COMMAND`. It finds the command, and turns every failure into one sentence."""

import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from layerwise.cli.commands import BENCHES, COMMANDS
from layerwise.cli.signals import SignalsRaise, Terminated
from layerwise.errors import LayerwiseError, noted, quiet, report_error, say, short, traceback_wanted, unknown


class CannotPrint(Exception):
    """Writing to standard output has failed."""


UNSAFE = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except colours, line ends and tabs."""


class Output:
    """Standard output whose failures can be distinguished from those of files.

    On a terminal, control characters are escaped, because names and texts may come from a stranger.

    Args:
        stream: the output.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._terminal = stream.isatty()
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="surrogateescape")  # names of files are bytes, and need not be UTF-8

    def write(self, text: str) -> int:
        """Write text to the stream."""
        if self._terminal:
            text = UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)
        try:
            return self._stream.write(text)
        except (OSError, UnicodeEncodeError) as reason:
            raise CannotPrint from reason

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as reason:
            raise CannotPrint from reason

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name (default: those of the process).

    Returns:
        The exit code: 0; 1 if a run of a comparison failed; 2 for an error, explained in one sentence; 128 + the
        number of the signal if stopped.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = argv[:2] == ["completion", "--words"]  # its words belong to another command
    traceback_wanted.set("--debug" in argv and not asked)
    quiet.set("--quiet" in argv and not asked)
    noted.set(set())
    words = argv if asked else [word for word in argv if word not in ("--debug", "--quiet")]
    stdout = sys.stdout
    try:
        with SignalsRaise(), contextlib.redirect_stdout(Output(stdout) if stdout is not None else stdout):
            code = _run(words if asked else with_json_last(words))
            if stdout is not None:
                sys.stdout.flush()  # here, where a failure can still be reported
            return code
    except SystemExit as stop:
        if {"-h", "--help"} & {*words} and not stop.code:  # tyro has printed the help text
            return 0
        return report_error(
            LayerwiseError(
                f"code of the network, the rule or a package has ended the command with sys.exit({stop.code}) before "
                "its work was done; take that call out."
            )
        )
    except CannotPrint as error:
        reason = error.__cause__
        if isinstance(reason, UnicodeEncodeError):
            character = ascii(reason.object[reason.start])
            return report_error(
                LayerwiseError(
                    f"cannot print the character {character} in {reason.encoding}, the encoding of standard output; "
                    "set PYTHONIOENCODING=utf-8."
                )
            )
        # The rest of the stream's buffer would fail again when the interpreter exits.
        with contextlib.suppress(OSError, ValueError):
            assert stdout is not None
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        if isinstance(reason, BrokenPipeError):  # the reader has gone, for example `| head`
            return 0
        return report_error(LayerwiseError(f"cannot print ({getattr(reason, 'strerror', reason)})."))
    except KeyboardInterrupt:
        say("stopped.")
        return 128 + signal.SIGINT
    except Terminated:
        say("stopped.")
        return 128 + signal.SIGTERM
    except Exception as error:
        return report_error(error)


def with_json_last(words: Sequence[str]) -> list[str]:
    """The words with `--json` at their end, as `--json=FILE`, or `--json=-` where no file follows it.

    A word that follows it is its file if it is `-` or ends in .json; otherwise it is the argument of a command that has
    been given none. Any other file is written as `--json=FILE`.

    Raises:
        LayerwiseError: a word after it is neither, or there is no name after `--json=`.

    >>> with_json_last(["eval", "--json", "run", "--split", "val"])
    ['eval', 'run', '--split', 'val', '--json=-']
    >>> with_json_last(["eval", "run", "--json", "figures.json"])
    ['eval', 'run', '--json=figures.json']
    """
    others: list[str] = []
    given: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--json=":
            raise LayerwiseError("--json= names no file; write --json=FILE, or --json alone to print the results.")
        if word != "--json":
            (given if word.startswith("--json=") else others).append(word)
            continue
        after = rest[0] if rest else "--"
        if after == "-" or after.endswith(".json"):
            given.append(f"--json={rest.pop(0)}")
            continue
        given.append("--json=-")
        waits = len(others) == 1 and others[0] in COMMANDS and COMMANDS[others[0]].arguments
        if not after.startswith("-") and not waits:
            raise LayerwiseError(
                f"--json is followed by {short(after)}, which does not end in .json; write --json={after} if that is "
                "the file, or put --json at the end to print the results."
            )
    return others + given


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        from layerwise.cli.help import usage

        print(usage(), end="")
        return 0
    if words[0] == "--version":
        from layerwise import __version__

        print(__version__)
        return 0
    command, *rest = words
    if command not in COMMANDS:
        raise unknown("command", command, list(COMMANDS))
    if {"-h", "--help"} & {*rest} and rest[:1] != ["--words"]:
        from layerwise.cli.help import help_of

        kind = f"{command} {rest[0]}"
        print(help_of(kind if kind in BENCHES else command, rest), end="")
        return 0
    from layerwise.memory.malloc import keep_freed_memory

    keep_freed_memory()
    module, _, function = COMMANDS[command].target.partition(":")
    return getattr(importlib.import_module(module), function)(rest)
