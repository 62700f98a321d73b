"""Formats tables and lists for the width of the terminal."""

import shutil
import textwrap
from collections.abc import Sequence


def terminal_width() -> int:
    """Columns of the terminal, or of the variable COLUMNS; no limit if output is piped.

    >>> terminal_width() >= 40
    True
    """
    found = shutil.get_terminal_size((0, 0)).columns
    return max(40, found) if found else 10**6


def indented(name: str, text: str, margin: int, width: int) -> str:
    """Format a name and a text beside it, or below it on a narrow terminal, wrapped at the width of the terminal.

    >>> print(indented("sll", "local: a block learns from its own loss", 6, 32))
    sll   local: a block learns from
          its own loss
    >>> print(indented("sll", "local: a block learns from its own loss", 16, 32))
    sll
        local: a block learns from
        its own loss
    """
    room = max(20, width - margin)
    if len(text) > room and margin > 0.4 * width:
        lines = textwrap.wrap(" ".join(text.split()), width - 4, break_on_hyphens=False)
        return "\n    ".join([name.rstrip(), *lines])
    lines = [text] if len(text) <= room else textwrap.wrap(text, room, break_on_hyphens=False)
    return f"\n{'':<{margin}}".join([f"{name:<{margin}}{lines[0]}".rstrip(), *lines[1:]])


def wrapped(sentence: str, width: int) -> str:
    """Wrap a sentence at the width of the terminal."""
    return sentence if len(sentence) <= width else "\n".join(textwrap.wrap(sentence, width, break_on_hyphens=False))


def table(rows: Sequence[Sequence[str]], width: int = 10**6, gap: str = "  ", right: int | None = None) -> str:
    """Format rows, the first with the names of the columns, in aligned columns; one block per row if they do not fit.

    Args:
        rows: with a cell per column. A cell after which the row is empty, such as a reason, may be long.
        width: columns of the terminal.
        gap: between two columns.
        right: the first column that is aligned to the right (default: none).

    >>> print(table([("rule", "seconds"), ("sll", "2.8")]))
    rule  seconds
    sll   2.8
    >>> print(table([("rule", "seconds"), ("sll", "2.8")], 8))
    sll
      seconds  2.8
    """
    last = len(rows[0]) - 1

    def counts(row: Sequence[str], place: int) -> bool:
        return place < 2 or place == last or any(row[place + 1 :])

    widths = [max(len(row[i]) for row in rows if counts(row, i)) for i in range(last + 1)]
    first = last + 1 if right is None else right
    aligned = [[*zip(row, widths, strict=True)] for row in rows]
    lines = [
        gap.join(f"{cell:>{w}}" if i >= first else f"{cell:<{w}}" for i, (cell, w) in enumerate(row)) for row in aligned
    ]
    if max(len(line.rstrip()) for line in lines) <= width:
        return "\n".join(line.rstrip() for line in lines)
    names, margin = rows[0], max(map(len, rows[0][1:])) + 4
    blocks = []
    for row in rows[1:]:
        blocks.append(row[0])
        blocks += [
            indented(f"  {name}", cell, margin, width) for name, cell in zip(names[1:], row[1:], strict=True) if cell
        ]
    return "\n".join(blocks)
