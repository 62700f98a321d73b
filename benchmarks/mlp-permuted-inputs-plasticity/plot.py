"""Draw accuracy on each new task from `results.jsonl` beside this script: docs/images/plasticity.svg.

    python benchmarks/mlp-permuted-inputs-plasticity/plot.py [--out FILE]

A line per rule: the mean over the seeds, averaged over four neighbouring tasks. Text and axes follow the reader's light
or dark mode.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import evidence  # noqa: E402
from table import means  # noqa: E402

INK = "#010203"  # stands for the colour of text until the file is written
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
LINES = {
    "backprop": ("#e0702b", "-"),
    "continual_backprop": ("#b08a00", "--"),
    "hedge_backprop": ("#8f5bd6", "-."),
    "local_ce": ("#2f9e6e", ":"),
    "sll": ("#3b8ee0", "-"),
}


def draw(curves: dict[str, list[float]], out: Path) -> None:
    """Write the picture of the accuracies, in %, by rule."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "layerwise", "font.size": 12})
    plt.rcParams.update({"font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"]})
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color"), INK))
    plt.rcParams["ytick.color"] = INK
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    for rule, values in curves.items():
        fours = [values[i : i + 4] for i in range(0, len(values), 4)]
        colour, style = LINES[rule]
        places = [4 * i + (len(four) + 1) / 2 for i, four in enumerate(fours)]
        axis.plot(places, [sum(four) / len(four) for four in fours], style, lw=2, color=colour, label=rule)
    axis.set_xlabel("task")
    axis.set_ylabel("accuracy on the newest task, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25, color=INK, linewidth=0.6)
    figure.legend(loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(out, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.read_text().replace(INK, "currentColor")
    alt = "Accuracy on the newest of a stream of tasks with permuted inputs, by task, per learning rule."
    start = text.index(">", text.index("<svg")) + 1
    text = text[:start] + f"\n <title>{alt}</title>\n {STYLE}" + text[start:]
    out.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def main() -> None:
    """Draw what the folder of this script holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "images" / "plasticity.svg")
    out = parser.parse_args().out
    draw(means(evidence.load(HERE)), out)
    print(out)


if __name__ == "__main__":
    main()
