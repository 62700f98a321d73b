"""The machines that made the results of a folder, and who recorded them."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from writing import table


def machine_of(line: dict[str, Any]) -> str:
    """The machines and versions that made a line, as far as they were recorded."""
    from layerwise.runs.environment import machine_in_words

    def words(found: dict[str, Any]) -> str:
        return ", ".join(
            [machine_in_words(found), *(f"{name} {number}" for name, number in found.get("packages", {}).items())]
        )

    if line.get("machines"):
        return "; resumed on ".join(map(words, line["machines"]))
    said = (line.get("stored") or {}).get("environment")
    return re.sub(r"^cpu: |\n$", "", said).replace("\n", "; ") if said else "not recorded"


def recorded_by(line: dict[str, Any]) -> str:
    """Who recorded the machine, and the commit."""
    if line.get("machines"):
        commits = {(found["commit"] or "of no checkout") if "commit" in found else None for found in line["machines"]}
        known = sorted(commit[:12] if " " not in commit else commit for commit in commits if commit)
        return f"the run itself{', commit ' if known else ''}{', '.join(known)}"
    stored = line.get("stored") or {}
    if stored.get("source"):
        return f"{stored['source']}, not by the run"
    return "no file"


def environments(lines: Sequence[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table of machines, and which runs each one made."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((machine_of(line), recorded_by(line)), []).append(line)
    body = []
    for (machine, source), members in groups.items():
        what = shortened([name(line) for line in members], [name(line) for line in lines])
        body.append([what if len(groups) > 1 else "all", str(len(members)), machine, source])
    return table(["what", "runs", "machine and versions", "recorded by"], body)


def shortened(names: Sequence[str], known: Sequence[str]) -> str:
    """Names of runs in words; for a grid of which all runs are present, only the name of the grid.

    >>> shortened(["a/x", "a/x", "a/y", "b/x"], ["a/x", "a/x", "a/y", "b/x", "b/x"])
    '`a`; `b`: x'
    """
    words = []
    for grid in dict.fromkeys(name.partition("/")[0] for name in known):
        here, there = ([name for name in given if name.partition("/")[0] == grid] for given in (names, known))
        rows = sorted({name.partition("/")[2] for name in here} - {""})
        if here:
            words.append(f"`{grid}`" + ("" if len(here) == len(there) or not rows else f": {', '.join(rows)}"))
    return "; ".join(words)
