"""Code blocks of Markdown pages, and how each kind is run."""

import contextlib
import doctest
import io
import re
import shlex
from pathlib import Path

from layerwise.cli import main as cli

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_UDIFF


def blocks(page):
    """(language, text, line number) of every fenced block."""
    text = page.read_text()
    return [(m[1], m[2], text[: m.start()].count("\n") + 2) for m in FENCE.finditer(text)]


def run_page(page):
    """Run a page's blocks in order, in one namespace: python is executed, pycon and console are compared."""
    names = {"__name__": "page"}
    for language, text, line in blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
        elif language == "pycon":
            example = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), line - 1)
            example.globs = names
            report = io.StringIO()
            result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.write, clear_globs=False)
            assert result.failed == 0, report.getvalue()
        elif language == "console":
            for command, expected in console(text):
                got = layerwise(command)[1]
                same = doctest.OutputChecker().check_output(expected, got, FLAGS)
                assert same, f"{page.name}: $ {command}\nexpected:\n{expected}\ngot:\n{got}"


def console(text):
    """(command, expected output) of a block of `$ command` lines, each followed by its output."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def layerwise(command):
    """Exit code and output (as a terminal would show it) of `layerwise ...`, run in this process."""
    program, *arguments = shlex.split(command, comments=True)
    assert program.removeprefix(".venv/bin/") == "layerwise", command
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        code = cli.main(arguments)
    return code, screen.buffer.getvalue().decode()
