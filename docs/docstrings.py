"""Griffe extension, for the reference pages.

`>>>` examples anywhere in a docstring become code blocks (griffe knows them in sections only). Of a rule, only the
first line is shown above its options: the rule's page has the equations.
"""

from typing import Any

import griffe


def fenced(text: str) -> str:
    """`text` with a fence around every run of lines from `>>>` to the next empty line."""
    lines: list[str] = []
    indent: str | None = None
    for line in [*text.split("\n"), ""]:
        if indent is None and line.lstrip().startswith(">>> "):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"\n{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line)
    return "\n".join(lines[:-1])


class Docstrings(griffe.Extension):
    """Rewrites every docstring when it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object of the package."""
        if (
            obj.docstring is not None
            and obj.is_class
            and obj.path.startswith("layerwise.rules.")
            and "name" in obj.members
        ):
            obj.docstring.value = obj.docstring.value.partition("\n")[0] + "\n"
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
