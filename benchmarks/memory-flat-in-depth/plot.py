"""Draw activations + gradients against depth from `results.jsonl` beside this script: docs/images/memory.svg.

    python benchmarks/memory-flat-in-depth/plot.py [--out FILE]

One panel per model. Text and axes follow the reader's light or dark mode; curves are labelled at their ends.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
INK = "#010203"  # stands for the colour of text until the file is written
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
COLOURS = ("#3b8ee0", "#2da44e", "#e0702b", "#b08a00", "#a371f7", "#d6569f", "#1fa3a3", "#8c7361")
MARKS = "osD^vP*X"


def read(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Per model and rule: (depth, MiB) in order of depth."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        for row in json.loads(line)["rows"]:
            held = (row["activations"] + row["gradients"]) / 2**20
            curves.setdefault(row["model"], {}).setdefault(row["rule"], []).append((row["depth"], held))
    return {model: {rule: sorted(points) for rule, points in rules.items()} for model, rules in curves.items()}


def together(rules: dict[str, list[tuple[int, float]]]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Rules whose curves cannot be told apart (within 3 %) share one curve and one label."""
    groups: list[tuple[list[str], list[tuple[int, float]]]] = []
    for rule, points in rules.items():
        for names, known in groups:
            same = [d for d, _ in known] == [d for d, _ in points]
            if same and all(abs(a - b) <= 0.03 * b for (_, a), (_, b) in zip(points, known, strict=True)):
                names.append(rule)
                break
        else:
            groups.append(([rule], points))
    return [("\n".join(names), points) for names, points in groups]


def spread(heights: list[float], sizes: list[float]) -> list[float]:
    """Centres of labels of these sizes, near `heights` (ascending, in axis units), that do not overlap."""
    placed: list[float] = []
    for i, height in enumerate(heights):
        floor = placed[-1] + (sizes[i - 1] + sizes[i]) / 2 if placed else height
        placed.append(max(height, floor))
    return placed


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], out: Path) -> None:
    """Write the picture."""
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "layerwise",
            "font.family": "sans-serif",
            "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    rules = list(dict.fromkeys(rule for found in curves.values() for rule in found))
    figure, axes = plt.subplots(1, len(curves), figsize=(6.4 * len(curves), 3.4), squeeze=False)
    for axis, (model, found) in zip(axes[0], curves.items(), strict=True):
        ends = []
        for label, points in together(found):
            number = rules.index(label.partition("\n")[0])
            depths, sizes = zip(*points, strict=True)
            axis.plot(depths, sizes, marker=MARKS[number % 8], ms=5, color=COLOURS[number % 8])
            ends.append((sizes[-1], depths[-1], label, COLOURS[number % 8]))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        depths = sorted({depth for points in found.values() for depth, _ in points})
        axis.set_xticks(depths, [str(depth) for depth in depths])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("number of blocks")
        axis.set_title(model, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25, color=INK, linewidth=0.6)
        _label(axis, sorted(ends))
    axes[0][0].set_ylabel("activations + gradients, MiB")
    figure.tight_layout()
    figure.savefig(out, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.read_text().replace(INK, "currentColor")
    alt = "Activations and gradients of one training step, in MiB, against the number of blocks, per learning rule."
    start = text.index(">", text.index("<svg")) + 1
    text = text[:start] + f"\n <title>{alt}</title>\n {STYLE}" + text[start:]
    out.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def _label(axis, ends: list[tuple[float, int, str, str]]) -> None:
    """Write each curve's name at its right end, apart from the others."""
    to_axis = axis.transData + axis.transAxes.inverted()
    heights = [float(to_axis.transform((depth, size))[1]) for size, depth, _, _ in ends]
    sizes = [0.07 * (label.count("\n") + 1) for _, _, label, _ in ends]
    for place, (_, _, label, colour) in zip(spread(heights, sizes), ends, strict=True):
        axis.text(1.02, place, label, transform=axis.transAxes, va="center", color=colour, fontsize=9, linespacing=1.3)


def main() -> None:
    """Draw what the folder of this script holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "images" / "memory.svg")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(read(HERE), out)
    print(out)


if __name__ == "__main__":
    main()
