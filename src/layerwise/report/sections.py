"""Sections of the report page: figures, and where each comes from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layerwise.report import figures


@dataclass
class Origin:
    """The command and machine that a figure comes from."""

    command: str
    machine: str
    options: str = ""
    runs: str = ""
    packages: str = ""


@dataclass
class Section:
    """Figures under one heading: dictionaries of `figure`, `caption`, `command`, `machine`."""

    title: str
    about: str
    folded: bool = False
    """Whether it is shown on demand only."""
    shown: list[dict[str, Any]] = field(default_factory=list)

    def draw(
        self, name: str, title: str, alt: str, paint: Callable[[Any], Any], height: float, caption: str, origin: Origin
    ) -> None:
        """Draw a figure, and add it with its caption and where it comes from.

        Args:
            name: stem of its files.
            title: heading.
            alt: what it shows, for readers who cannot see it.
            paint: draws on matplotlib axes.
            height: in inches.
            caption: the text below it.
            origin: the command and machine.
        """
        figure = figures.render(name, title, alt, paint, height)
        self.shown.append({"figure": figure, "caption": caption, "command": origin.command, "machine": origin.machine})
