"""Draw activations + gradients against depth from `results.jsonl` beside this script: docs/images/memory.svg.

    python benchmarks/memory-flat-in-depth/plot.py [--out FILE]

One panel per model. Text and axes follow the reader's light or dark mode. `local_ce` lies on `sll`, and
`backprop_offload` on `backprop`, as a CPU has no other memory to move to: they are not drawn.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

HERE = Path(__file__).parent
INK = "#010203"  # stands for the colour of text until the file is written
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
COLOURS = ("#3b8ee0", "#e0702b", "#b08a00")
MARKS = "oD^"
SHOWN = {
    "sll": ("sll, local_ce", "-"),
    "backprop": ("backprop", "-"),
    "backprop_checkpoint": ("backprop with checkpoints", "--"),
}
"""Rules that are drawn, with their label and line."""
NAMES = {"vgg": "conv net", "mlp": "MLP", "vit": "ViT"}


def read(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Per model and rule: (depth, MiB) in order of depth."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        for row in json.loads(line)["rows"]:
            held = (row["activations"] + row["gradients"]) / 2**20
            curves.setdefault(row["model"], {}).setdefault(row["rule"], []).append((row["depth"], held))
    return {model: {rule: sorted(points) for rule, points in rules.items()} for model, rules in curves.items()}


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], out: Path) -> None:
    """Write the picture."""
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "layerwise",
            "font.family": "sans-serif",
            "font.size": 13,
            "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    figure, axes = plt.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.7), squeeze=False)
    for axis, (model, found) in zip(axes[0], curves.items(), strict=True):
        for number, (rule, (label, style)) in enumerate(SHOWN.items()):
            if rule in found:
                depths, sizes = zip(*found[rule], strict=True)
                axis.plot(depths, sizes, style, marker=MARKS[number], ms=6, lw=2, color=COLOURS[number], label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        depths = sorted({depth for points in found.values() for depth, _ in points})
        axis.set_xticks(depths, [str(depth) for depth in depths])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("number of blocks")
        axis.set_title(NAMES.get(model, model), loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25, color=INK, linewidth=0.6)
    axes[0][0].set_ylabel("activations + gradients, MiB")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(SHOWN), frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(out, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.read_text().replace(INK, "currentColor")
    alt = "Activations and gradients of one training step, in MiB, against the number of blocks, per learning rule."
    start = text.index(">", text.index("<svg")) + 1
    text = text[:start] + f"\n <title>{alt}</title>\n {STYLE}" + text[start:]
    out.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


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
