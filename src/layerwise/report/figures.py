"""Draws the figures of a report once, as SVG that follows the reader's light or dark mode, and as PNG for papers."""

import hashlib
import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.runs.writing import write_atomically

INK = "#010203"  # a placeholder for the colour of text until the SVG is written
COLOURS = ("#3b8ee0", "#2da44e", "#e0702b", "#b08a00", "#a371f7", "#d6569f", "#1a9a9a", "#8c7361")
MARKS = "osD^vP*X"
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
WIDTH = 4.3  # inches; about a phone's width at the size of running text
Curves = Mapping[str, Sequence[tuple[float, float, float | None]]]
"""Rule to (x, mean, standard deviation or None) in order of x."""


@dataclass(frozen=True)
class Figure:
    """A drawn figure."""

    name: str
    """Stem of its files."""
    title: str
    alt: str
    """What it shows, for readers who cannot see it."""
    svg: str
    """For the page: text and lines have the colour of the text around it."""
    png: bytes
    pointer: dict[str, Any] | None = None
    """What the page says of the place under the pointer. Curves: names of `x` and `y`; per `series` its name and
    points; `cut`, where the legend begins. Heat maps: `rows`, `columns` and the words of their `cells`; `box`, the
    place of the cells (left, top, width, height)."""


def render(
    name: str, title: str, alt: str, draw: Callable[[Any], dict[str, Any] | None], height: float = 3.0
) -> Figure:
    """Make a figure with one pair of axes.

    Args:
        name: stem of its files, and prefix of the identifiers in the SVG, so that several fit on one page.
        title: heading.
        alt: what it shows, in words.
        draw: draws on matplotlib axes; it may return what `Figure.pointer` holds, without `cut` and `box`.
        height: in inches.

    The bytes depend only on what is drawn: they contain no date, and the identifiers come from a fixed salt.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    name = file_name(name)
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "layerwise", "font.size": 9.0, "text.parse_math": False}
    style |= {"font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"]}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has a font that holds it
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot(facecolor="none")
        pointer = draw(axes)
        text, png = io.StringIO(), io.BytesIO()
        # Not `savefig`, which draws everything twice.
        FigureCanvasSVG(canvas).print_svg(text, metadata={"Date": None, "Creator": None})
        canvas.set_layout_engine("none")  # keep the layout instead of computing it again
        canvas.set(dpi=200, facecolor="white")
        FigureCanvasAgg(canvas).print_png(png, metadata={"Software": None})
        place = (canvas.legends[0] if canvas.legends else axes).get_window_extent()
        left, top, right, bottom = (
            round(72 * inches, 1)
            for inches in (
                place.x0 / canvas.dpi,
                height - place.y1 / canvas.dpi,  # matplotlib measures from below
                place.x1 / canvas.dpi,
                height - place.y0 / canvas.dpi,
            )
        )
        if pointer is not None:
            where = {"cut": top} if "series" in pointer else {"box": [left, top, right - left, bottom - top]}
            pointer = pointer | where
    return Figure(name, title, alt, _inline(text.getvalue(), name), png.getvalue(), pointer)


def file_name(name: str) -> str:
    """A name of letters, digits, `_`, `-` and `.` that stays in its folder, of at most 100 characters.

    Names that had to be changed end in a digest, so that two of them stay different.

    >>> file_name("layers_cka"), file_name("../x")
    ('layers_cka', 'x-d6b96a97')
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).lstrip(".-")[:100]
    return safe if safe == name else f"{safe or 'figure'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _inline(svg: str, name: str) -> str:
    """Only the SVG element, as wide as its place, in the colour of the text around it."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return "\n".join(line.rstrip() for line in svg.splitlines())


def save(figure: Figure, folder: Path) -> None:
    """Write the figure as files of its own: SVG in light and dark mode, PNG on white."""
    start = figure.svg.index(">") + 1
    head = figure.svg[:start].replace("<svg", '<svg width="620"', 1)
    text = f"{head}\n<title>{html.escape(figure.alt)}</title>{STYLE}{figure.svg[start:]}\n"
    write_atomically(folder / f"{figure.name}.svg", text)  # it replaces a link and does not follow it
    write_atomically(folder / f"{figure.name}.png", figure.png)


def look(rules: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker per rule, the same in every figure of a report; 64 different pairs."""
    return {rule: {"color": COLOURS[i % 8], "marker": MARKS[(i + i // 8) % 8]} for i, rule in enumerate(rules)}


def height(rules: int) -> float:
    """Height in inches of a figure whose legend has this many rules."""
    return 2.75 + 0.19 * -(-rules // 2)


def curves(
    axes: Any, found: Curves, x: str, y: str, looks: Mapping[str, dict[str, str]], log: bool = False
) -> dict[str, Any]:
    """Draw curves with bands of one standard deviation."""
    for i, (rule, points) in enumerate(found.items()):
        places, means, deviations = zip(*points, strict=True)
        axes.plot(places, means, label=rule, ms=3.5, lw=1.3, gid=f"series-{i}", **looks[rule])
        if any(deviations):
            low, high = ([m + sign * (d or 0) for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=looks[rule]["color"], alpha=0.18, lw=0, gid=f"spread-{i}-0")
    if all(float(point[0]).is_integer() for points in found.values() for point in points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if log:
        from matplotlib.ticker import LogLocator

        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        places = sorted({point[0] for points in found.values() for point in points})
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _finish(axes, x, y)
    return _series(found, x, y)


def trade(
    axes: Any,
    found: Mapping[str, tuple[float, float, float | None]],
    x: str,
    y: str,
    looks: Any,
    larger: bool = True,
) -> dict[str, Any]:
    """Draw one point per rule, and a line through those that no other beats in both; `larger`: more y is better."""
    for i, (rule, (place, mean, deviation)) in enumerate(found.items()):
        point, caps, bars = axes.errorbar(
            place, mean, yerr=deviation, label=rule, ms=7, capsize=3, ls="none", **looks[rule]
        )
        point.set_gid(f"series-{i}")
        for j, part in enumerate((*caps, *bars)):
            part.set_gid(f"spread-{i}-{j}")
    sign = 1 if larger else -1
    best = pareto({rule: (point[0], sign * point[1]) for rule, point in found.items()})
    front = [(place, sign * value) for place, value in best]
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color=INK, lw=0.8, ls=":", zorder=0)
    axes.margins(0.12, 0.18)
    _finish(axes, x, y)
    return _series({rule: [point] for rule, point in found.items()}, x, y)


def _series(found: Curves, x: str, y: str) -> dict[str, Any]:
    """What the page's script needs to name the point under the pointer, and to hide a series."""
    return {"x": x, "y": y, "series": [{"name": rule, "points": points} for rule, points in found.items()]}


def pareto(points: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats: none has less x and at least as much y. In order of x.

    >>> pareto({"a": (1, 5), "b": (2, 4), "c": (3, 9)})
    [(1, 5), (3, 9)]
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points.values(), key=lambda p: (p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def heat(
    axes: Any, rows: Mapping[str, Mapping[str, float | None]], limits: tuple[float, float] | None, form: str
) -> dict[str, Any]:
    """Draw rules against layers, with a colour bar, and the numbers (in the format `form`) where there is room.

    The colours span `limits`, which are the same in every report. If the quantity has no bounds, they begin at 0.
    """
    layers = list(dict.fromkeys(name for row in rows.values() for name in row))
    values = [[row.get(layer) for layer in layers] for row in rows.values()]
    known = [value for row in values for value in row if value is not None]
    low, high = limits or (min(0.0, *known), max(0.0, *known))
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.pcolormesh(numbers, cmap="viridis", vmin=low, vmax=high if high > low else low + 1, linewidth=0)
    axes.invert_yaxis()
    step = -(-len(layers) // 12)
    places = [i + 0.5 for i in range(0, len(layers), step)]
    axes.set_xticks(places, layers[::step], rotation=0 if len(layers) <= 6 else 60)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(layers) <= 9:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value is not None:
                    colour = readable_on(image.cmap(image.norm(value)))
                    axes.text(j + 0.5, i + 0.5, format(value, form), ha="center", va="center", color=colour)
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    return _cells(list(rows), layers, values, form)


def side_by_side(
    axes: Any, parts: Mapping[str, Sequence[Sequence[float | None]]], limits: tuple[float, float], form: str
) -> dict[str, Any]:
    """Draw square tables side by side on one scale of colours; None stays empty."""
    values: list[list[float | None]] = [[] for _ in next(iter(parts.values()))]
    columns: list[str] = []
    places = []
    for part, table in parts.items():
        columns += [""] * bool(columns) + [f"{part}, taken for {i}" for i in range(len(table))]
        for line, row in zip(values, table, strict=True):
            line += [None] * bool(line) + list(row)
        places.append(len(columns) - len(table) / 2 - 0.5)
    numbers = [[float("nan") if value is None else value for value in line] for line in values]
    image = axes.imshow(numbers, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    axes.set_xticks(places, list(parts))
    step = -(-len(numbers) // 10)
    axes.set_yticks(range(0, len(numbers), step))
    axes.set_ylabel("true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.02, extend="max")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)
    return _cells([f"class {i}" for i in range(len(values))], columns, values, form)


def _cells(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], form: str
) -> dict[str, Any]:
    """What the page's script needs to name the cell under the pointer."""
    words = [["" if value is None else format(value, form) for value in row] for row in values]
    return {"rows": rows, "columns": columns, "cells": words}


def mosaic(axes: Any, pictures: Any, columns: int) -> None:
    """Draw small pictures, bytes (N, C, h, w), in a grid: of three channels in colour, of one from blue to red."""
    import numpy as np

    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, 4))  # transparent between the pictures
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        place = grid[top : top + height, left : left + width]
        place[..., 3] = 1
        if channels == 3:
            place[..., :3] = picture.transpose(1, 2, 0) / 255
        else:
            from matplotlib import colormaps

            place[...] = colormaps["RdBu_r"](picture[0] / 255)
    axes.imshow(grid, interpolation="nearest")
    axes.set_axis_off()


def readable_on(colour: Sequence[float]) -> str:
    """Black or white, whichever contrasts more with a colour (sRGB, 0 to 1): 4.5 to 1 at least (WCAG 2.2).

    >>> readable_on((1, 1, 0)), readable_on((0, 0, 0.6))
    ('#000000', '#ffffff')
    """
    return "#000000" if luminance(colour) > 0.05 * (21**0.5 - 1) else "#ffffff"


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of a colour (sRGB, 0 to 1), as WCAG 2.2 defines it: 0 is black, 1 is white.

    >>> luminance((0, 0, 0)), round(luminance((1, 1, 1)), 6)
    (0.0, 1.0)
    """
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def shares(axes: Any, rows: Mapping[str, Mapping[str, float]], x: str) -> None:
    """Draw stacked bars: the parts of a whole per rule."""
    parts = list(next(iter(rows.values())))
    for i, part in enumerate(parts):
        left = [sum(list(row.values())[:i]) for row in rows.values()]
        axes.barh(list(rows), [row[part] for row in rows.values()], left=left, color=COLOURS[i], label=part, height=0.6)
    axes.invert_yaxis()
    _finish(axes, x, "", grid="x")


def three_digits(value: float) -> str:
    """Three digits, without an exponent if none is needed.

    >>> three_digits(0.98765), three_digits(97.54), three_digits(0.0)
    ('0.988', '97.5', '0')
    """
    return f"{value:.3g}"


def _finish(axes: Any, x: str, y: str, grid: str = "y") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25, color=INK, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False).set_gid("legend")
