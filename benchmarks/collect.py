"""Write the figures of the benchmark folders into README.md, docs/ and the recipes.

    python benchmarks/collect.py

No figure of ours is typed: accuracies come from `results.csv` of every folder with a `grid.toml`, bytes from
`memory/*.json`, ratios from `speed/*.json`. Those of the papers are in `papers.toml`.
"""

import csv
import json
import re
import tomllib
from pathlib import Path

from layerwise import rules

HERE = Path(__file__).parent
ROOT = HERE.parent
FIRST = {"digits_mlp": "digits", "sid_mnist": "MNIST", "mnist_noprop": "MNIST", "cora": "Cora"}
"""Folders of the README's first table, and their data; a rule is shown with the first that has it."""
ACCURACY = {  # column of the README's second table: folder
    "MNIST, MLP": "mnist_mlp",
    "MNIST, MLP, 15 epochs": "mnist_local_rules",
    "MNIST, MLP, shifted images, 15 epochs": "mnist_local_rules_crop",
    "MNIST, MLP, 25 epochs": "mnist_forward_forward",
    "Fashion-MNIST, MLP": "fashion_mlp",
    "CIFAR-10, conv": "cifar10_conv",
}
MORE = [  # folders with further rows of the rules' pages, under the title of their grid
    "digits_mlp",
    "mnist_conv",
    "fashion_conv",
    "cifar10_conv_short",
    "mnist_noprop",
    "cora",
    "tabular",
    "sid_mnist",
    "sid_fashion",
    "sid_fashion_sgd",
    "sid_cifar10",
    "sid_cifar10_sgd",
]
LABELS = {  # rows of the conv net, the cascade and the graph: rule and what is special about it
    "graph_forward_gcn": ("graph_forward", "GCN"),
    "graph_forward_gat": ("graph_forward", "GAT"),
    "backprop_gcn": ("backprop", "GCN"),
    "backprop_gat": ("backprop", "GAT"),
    "sll_4_overlap": ("sll", "4 blocks, overlap 1"),
    "sll_2_overlap": ("sll", "2 blocks, overlap 1"),
    "sll_2": ("sll", "2 blocks"),
    "predsim_norm": ("predsim", "batch norm, dropout"),
    "backprop_norm": ("backprop", "batch norm, dropout"),
    "forward_forward_softmax": ("forward_forward", "hard negatives, softmax predictor"),
    "boosted_half": ("boosted", "shrinkage 0.5"),
    "local_ce_4": ("local_ce", "4 blocks"),
    "sid_2": ("sid_cascade", "2 modules"),
    "sid_5": ("sid_cascade", "5 modules"),
    "sid_10": ("sid_cascade", "10 modules"),
    "sid_10_clipped": ("sid_cascade", "10 modules, clipped gradients"),
    "sid_local_5": ("sid_cascade", '5 modules, extractor="local"'),
    "alpha1_2": ("sid_cascade", "2 modules, alpha 1"),
    "alpha1_5": ("sid_cascade", "5 modules, alpha 1"),
    "alpha1_10": ("sid_cascade", "10 modules, alpha 1"),
    "alpha1_10_clipped": ("sid_cascade", "10 modules, alpha 1, clipped gradients"),
    "cascade_backprop_2": ("backprop", "2 modules"),
    "cascade_backprop_5": ("backprop", "5 modules"),
    "cascade_backprop_10": ("backprop", "10 modules"),
    "cascade_backprop_10_clipped": ("backprop", "10 modules, clipped gradients"),
    "linear_head": ("backprop", "linear head"),
    "backprop_1": ("backprop", "one block"),
    "backprop_conv": ("backprop", "conv net"),
    "noprop_dt_learned": ("noprop_dt", "learned embeddings"),
    "noprop_dt_prototype": ("noprop_dt", "prototypes"),
}


RECIPES = {  # recipe: folder and row that measured it
    "digits": ("digits_mlp", "sll"),
    "mnist": ("mnist_mlp", "sll"),
    "fashion_mnist": ("fashion_mlp", "sll"),
    "cifar10": ("cifar10_conv", "sll_4_overlap"),
    "cifar10_two_blocks": ("cifar10_conv", "sll_2_overlap"),
    "cora": ("cora", "graph_forward_gcn"),
}


def title(folder: str) -> str:
    """Title of a folder's grid."""
    return tomllib.loads((HERE / folder / "grid.toml").read_text())["title"]


def accuracies(folders: dict[str, str]) -> dict[str, dict[str, list[str]]]:
    """Rule to column to "mean ± std" texts."""
    found: dict[str, dict[str, list[str]]] = {}
    for column, folder in folders.items():
        file = HERE / folder / "results.csv"
        if file.exists():
            for row in csv.DictReader(file.open()):
                rule, detail = LABELS.get(row["rule"], (row["rule"], ""))
                spread = f" ± {row['test_std']}" if row["test_std"] else ""
                text = f"{row['test_mean']}{spread} ({detail + ', ' if detail else ''}n = {row['n']})"
                found.setdefault(rule, {}).setdefault(column, []).append(text)
    return found


def memory() -> dict[str, str]:
    """Rule to activations + gradients of the ViT with the fewest and the most blocks."""
    file = HERE / "memory" / "vit.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    found = {}
    for rule in dict.fromkeys(row["rule"] for row in rows):
        held = {r["depth"]: (r["activations"] + r["gradients"]) / 2**20 for r in rows if r["rule"] == rule}
        found[rule] = " → ".join(f"{held[depth]:.1f}" for depth in (min(held), max(held)))
    return found


def speed() -> dict[str, str]:
    """Rule to its time per step on the 12-block ViT, as a ratio to backprop with its spread."""
    file = HERE / "speed" / "vit12.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return {r["rule"]: f"{r['ratio']:.2f} ({r['ratio_10']:.2f} .. {r['ratio_90']:.2f})" for r in rows}


def rules_table() -> str:
    """One row per rule: what it declares, and an accuracy."""
    scores = accuracies({folder: folder for folder in FIRST})
    head = ["rule", "locality", "what crosses a block boundary", "activations + gradients", "test accuracy, %"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in rules.names():
        rule = rules.get(name)
        memory = "constant in depth" if rule.flat_memory else "grows"
        accuracy = ""
        for folder, texts in list(scores.get(name, {}).items())[:1]:
            accuracy = f"{FIRST[folder]} {texts[0].partition(' (')[0]}"
        cells = [f"[`{name}`](docs/rules/{name}.md)", rule.locality, rule.boundary, memory, accuracy]
        lines.append("| " + " | ".join(cells) + " |")
    folders = ", ".join(f"[{folder}](benchmarks/{folder})" for folder in FIRST)
    return "\n".join([*lines, "", f"Accuracies: mean ± standard deviation over three seeds or more, from {folders}."])


def readme_table() -> str:
    """One row per rule that has a figure."""
    scores, bytes_held, ratios = accuracies(ACCURACY), memory(), speed()
    columns = [column for column in ACCURACY if any(column in row for row in scores.values())]
    head = ["rule", *columns, "act. + grad., ViT of 4 → 256 blocks, MiB", "time per step, ViT of 12 blocks, ÷ backprop"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for rule in dict.fromkeys([*scores, *bytes_held]):
        cells = ["; ".join(scores.get(rule, {}).get(column, [])) for column in columns]
        cells += [bytes_held.get(rule, ""), ratios.get(rule, "")]
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    folders = ", ".join(
        f"[{name}](benchmarks/{name})" for name in [*ACCURACY.values(), "memory", "speed"] if (HERE / name).exists()
    )
    note = (
        "Test accuracy in %, mean ± standard deviation over n seeds; each folder says how the learning rates\n"
        "were chosen. Memory is exact; times are medians of interleaved steps on a shared machine (10 % .. 90 %).\n"
        f"Commands, machine and raw results: {folders}."
    )
    return "\n".join([*lines, "", note])


def tables() -> str:
    """Every table and text of the benchmark folders."""
    parts = []
    for file in sorted(HERE.glob("*/table.md")):
        parts.append(re.sub(r"^# ", "## ", file.read_text().strip()))
    for folder, title in (("memory", "Memory"), ("speed", "Speed")):
        machine = (HERE / folder / "environment.txt").read_text().strip()
        parts.append(f"## {title}\n\nCommand: `bash benchmarks/{folder}/run.sh`. Machine: {machine}.")
        for file in sorted((HERE / folder).glob("*.txt")):
            parts.append(f"`{file.stem}`:\n\n```\n{file.read_text().rstrip()}\n```")
    return "\n\n".join(parts)


def papers() -> str:
    """Our figures beside those of the papers."""
    head = ["rule", "task here", "here", "backprop here", "paper", "its backprop", "source and setting of the paper"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for figure in tomllib.loads((HERE / "papers.toml").read_text())["figure"]:
        folder = figure["folder"]
        file = HERE / folder / "results.csv"
        if not file.exists():  # not run yet
            continue
        rows = {row["rule"]: row for row in csv.DictReader(file.open())}
        both = [rows[name] if (name := figure.get(part)) else None for part in ("row", "rival")]
        found = [f"{row['test_mean']} ± {row['test_std']}" if row else "" for row in both]
        rule, detail = LABELS.get(figure["row"], (figure["row"], ""))
        cells = [f"`{rule}`" + (f", {detail}" if detail else ""), title(folder), *found]
        cells += [figure["paper"], figure.get("papers_rival", ""), figure["source"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def screening() -> str:
    """The single runs that led to the options of `sll`."""
    lines = ["| run | options | epochs | val, % | by block, head last |", "|---|---|---|---|---|"]
    for file in sorted((HERE / "cifar10_screening" / "raw").glob("*.json")):
        run = json.loads(file.read_text())
        words = " ".join(run["command"].split()[2:]).split("--")
        options = ", ".join(word.strip() for word in words if word.startswith(("rule.", "rule ", "lr ", "batch-size ")))
        blocks = " ".join(f"{100 * value:.1f}" for value in run["blocks"].values())
        value = f"{100 * run['val_accuracy']:.1f}"
        lines.append(f"| {file.stem} | {options} | {run['epochs']:g} | {value} | {blocks} |")
    return "\n".join(lines)


def fill_recipe(name: str, folder: str, rule: str) -> None:
    """Replace the last section of a recipe, `[expected]`, by what was measured."""
    file = ROOT / "src" / "layerwise" / "runs" / "recipes" / f"{name}.toml"
    row = next(row for row in csv.DictReader((HERE / folder / "results.csv").open()) if row["rule"] == rule)
    kept = file.read_text().partition("\n[expected]")[0].rstrip()
    figure = f"{row['test_mean']} ± {row['test_std']} (n = {row['n']})"
    command = f"python benchmarks/grid.py benchmarks/{folder}"
    file.write_text(f'{kept}\n\n[expected]\ntest_accuracy = "{figure}"\ncommand = "{command}"\n')


def fill(file: Path, marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker:begin ... -->` and `<!-- marker:end ... -->`."""
    pattern = re.compile(rf"(<!-- {marker}:begin[^>]*-->\n).*?(<!-- {marker}:end[^>]*-->)", re.S)
    old = file.read_text()
    if not pattern.search(old):
        raise SystemExit(f"{file} has no markers {marker}:begin and {marker}:end")
    file.write_text(pattern.sub(lambda m: f"{m[1]}{text}\n{m[2]}", old))


def main() -> None:
    """Fill README.md, docs/results.md, the page of every rule and the recipes."""
    fill(ROOT / "README.md", "rules", rules_table())
    fill(ROOT / "README.md", "figures", readme_table())
    fill(ROOT / "docs" / "results.md", "papers", papers())
    fill(ROOT / "docs" / "results.md", "results", tables())
    fill(ROOT / "docs" / "log.md", "screening", screening())
    for name, (folder, rule) in RECIPES.items():
        fill_recipe(name, folder, rule)
    scores = accuracies(ACCURACY | {title(folder): folder for folder in MORE})
    for page in sorted((ROOT / "docs" / "rules").glob("*.md")):
        if page.stem != "index":
            rows = [f"| {column} | {text} |" for column, texts in scores.get(page.stem, {}).items() for text in texts]
            lines = ["| task | test accuracy, % |", "|---|---|", *rows, ""] if rows else []
            more = "Commands and the other rules beside it: [results](../results.md)."
            fill(page, "figures", "\n".join([*lines, more]))


if __name__ == "__main__":
    main()
