"""Write the figures of the benchmark folders into README.md, docs/, the recipes and benchmarks/README.md.

    python benchmarks/collect.py

None of our figures is typed by hand: all of them come from the `results.jsonl` of the folders. Those of the papers are
in `papers.toml`.
"""

import re
import tomllib
from pathlib import Path

import evidence
from evidence import Claim, Row, table, wrapped

from layerwise import rules

HERE = evidence.HERE
ROOT = HERE.parent
CLAIMS = {claim.name: claim for claim in evidence.claims()}
ANSWERS = [claim for claim in CLAIMS.values() if claim.toml.get("reproducible", True)]
"""Those whose commands give their figures again. The others are history, which only `docs/log.md` shows."""
FIRST = {  # grids of the README's table of rules, and their data; a rule is shown with the first that has it
    ("mlp-every-rule-by-default", "digits"): "digits",
    ("sid-cascade-vs-baselines", "mnist"): "MNIST",
    ("conv-noprop-vs-backprop", "mnist"): "MNIST",
    ("gnn-forward-vs-backprop", "cora"): "Cora",
}
WAYS = "which-way-to-fit"
PROOF = ("memory-flat-in-depth", "mlp-local-losses-vs-backprop", "conv-sll-overlap")
SCALING = ("pipeline-throughput", "pipeline-slow-wire", "sharded-memory-per-rank")
RECIPES = {  # recipe: folder and row that measured it
    "digits": ("mlp-every-rule-by-default", "digits/sll"),
    "mnist": ("mlp-local-losses-vs-backprop", "mnist/sll"),
    "fashion_mnist": ("mlp-local-losses-vs-backprop", "fashion/sll"),
    "cifar10": ("conv-sll-overlap", "cifar10/sll_4_overlap"),
    "cifar10_two_blocks": ("conv-sll-overlap", "cifar10/sll_2_overlap"),
    "cora": ("gnn-forward-vs-backprop", "cora/graph_forward_gcn"),
}


def rows_of(rule: str) -> list[tuple[Claim, Row]]:
    """The rows of a rule that its page shows."""
    return [
        (claim, row)
        for claim in CLAIMS.values()
        for grid in claim.grids.values()
        if grid.options.get("rule_pages", True)
        for row in grid.rows.values()
        if row.rule == rule
    ]


def rules_table() -> str:
    """One row per rule: what it declares, and an accuracy."""
    body = []
    for name in rules.names():
        rule = rules.get(name)
        found = [
            f"{data} {row.accuracy}{', edge' if evidence.EDGE in row.lr_text else ''}"
            for (folder, grid), data in FIRST.items()
            for row in CLAIMS[folder].grids[grid].rows.values()
            if row.rule == name
        ]
        memory = "constant in depth" if rule.flat_memory else "grows"
        body.append([f"[`{name}`](docs/rules/{name}.md)", rule.locality, rule.boundary, memory, *(found or [""])[:1]])
    head = ["rule", "locality", "what crosses a block boundary", "activations + gradients", "test accuracy, %"]
    folders = ", ".join(f"[{folder}](benchmarks/{folder}/README.md)" for folder, _ in FIRST)
    note = (
        f"Accuracies are mean ± standard deviation over three seeds or more, from {folders}. On the digits the rules "
        "have their default options and one learning rate for all; elsewhere the folder names the options. *Edge* "
        "marks a learning rate at the end of its grid."
    )
    return "\n".join([*table(head, body), "", *wrapped(note)])


def proof() -> str:
    """Three rows that the README rests on."""
    body = [
        [claim.toml["question"], claim.answer, link(claim, "benchmarks/")] for claim in map(CLAIMS.get, PROOF) if claim
    ]
    note = (
        f"Each folder has its table, its machine and its command. [All {len(ANSWERS)} questions](docs/results.md) have "
        f"an answer, including those that went against us. {evidence.MARKED}"
    )
    return "\n".join([*table(["question", "answer", "evidence"], body), "", *wrapped(note)])


def link(claim: Claim, path: str) -> str:
    """A link to the folder's README."""
    return f"[{claim.name}]({path}{claim.name}/README.md)"


def answers() -> str:
    """The list of answers; then, claim by claim, the question, the answer, a few rows and the folder."""
    lines = table(
        ["question", "answer"],
        [[f"[{claim.toml['question']}](#{anchor(claim.toml['question'])})", claim.answer] for claim in ANSWERS],
    )
    for claim in ANSWERS:
        lines += ["", f"## {claim.toml['question']}", "", *wrapped(claim.answer), "", *claim.small(), ""]
        lines += wrapped(f"All rows, environment and command: {link(claim, '../benchmarks/')}.")
    return "\n".join(lines)


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs create it."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def index() -> str:
    """The contents of benchmarks/README.md."""
    body = [[claim.toml["question"], claim.answer, f"[{claim.name}]({claim.name}/README.md)"] for claim in ANSWERS]
    lines = [*table(["question", "answer", "folder"], body), "", *wrapped(evidence.MARKED)]
    if waiting := [f"{claim.toml['question']} ({link(claim, '')})" for claim in evidence.planned()]:
        lines += ["", *wrapped(f"Not run yet, so without an answer: {' '.join(waiting)}.")]
    history = [claim for claim in CLAIMS.values() if claim not in ANSWERS]
    if older := [f"{claim.toml['question']} ({link(claim, '')})" for claim in history]:
        lines += ["", *wrapped(f"Kept as history, by code that has changed since: {' '.join(older)}")]
    return "\n".join(lines)


def options_of(row: Row) -> str:
    """Rule and options of a row."""
    return f"`{row.rule}`" + (f" `{row.text}`" if row.text else "")


def papers() -> str:
    """Our figures beside those of the papers."""
    body = []
    for figure in tomllib.loads((HERE / "papers.toml").read_text())["figure"]:
        claim = CLAIMS[figure["folder"]]
        row, rival = claim.row(figure["row"]), claim.row(figure["rival"])
        cells = [options_of(row), row.grid.options.get("task", row.grid.options["title"]), row.accuracy, row.lr_text]
        cells += [f"{rival.accuracy}, {options_of(rival)}", rival.lr_text]
        cells += [figure["paper"], figure.get("papers_rival", ""), figure["source"], link(claim, "../benchmarks/")]
        body.append(cells)
    head = [
        *("rule and options", "task here", "here, %", "learning rate", "backprop here, %", "its learning rate"),
        *("paper, %", "its backprop, %", "source and setting of the paper", "evidence"),
    ]
    return "\n".join(table(head, body))


def rule_page(rule: str) -> str:
    """The figures of a rule's page."""
    body = []
    for claim, row in rows_of(rule):
        task = row.grid.options.get("task", row.grid.options["title"])
        text = f"`{row.text}`" if row.text else ""
        body.append([task, text, row.figure, str(len(row.finals)), row.lr_text, link(claim, "../../benchmarks/")])
    title = evidence.title_of(row for _, row in rows_of(rule))
    head = ["task", "options", title, "n", "learning rate", "evidence"]
    more = "[Results](../results.md) compares it with the other rules and says what the tables leave open."
    if any(evidence.EDGE in row.lr_text for _, row in rows_of(rule)):
        more = f"{evidence.EDGE} marks a learning rate at the end of its grid, where a wider grid may give more. {more}"
    return "\n".join([*(table(head, body) if body else ()), *([""] if body else ()), *wrapped(more)])


def price() -> str:
    """What local learning gives and costs, in four rows."""
    memory, ways = (CLAIMS[name].script.figures(CLAIMS[name].lines) for name in ("memory-flat-in-depth", WAYS))

    def way(name: str) -> str:
        return f"{ways[f'vit_{name}_mib']} MiB at {ways[f'vit_{name}_time']}"

    def accuracy(folder: str, row: str) -> str:
        found = CLAIMS[folder].row(row)
        return f"{found.accuracy}{evidence.MARK if evidence.EDGE in found.lr_text else ''} %"

    mlp, conv = PROOF[1:]
    body = [
        [
            "ViT, 256 blocks: activations + gradients",
            *(f"{memory[f'{rule}_256']} MiB" for rule in ("backprop", "backprop_checkpoint")),
            f"{memory['sll_256']} MiB ([memory](benchmarks/memory-flat-in-depth/README.md))",
        ],
        [
            "ViT, 12 blocks: activations + gradients, at time per sample relative to backprop",
            way("backprop"),
            f"{way('checkpoint')}; {way('checkpoint_accumulate_4')} with accumulation",
            f"{way('sll')}; {way('sll_blocks_in_2_parts')} and {way('sll_blocks_in_4_parts')} with its blocks in parts "
            f"([ways](benchmarks/{WAYS}/README.md))",
        ],
        [
            "MNIST, MLP of three hidden layers: test accuracy",
            accuracy(mlp, "mnist/backprop"),
            "the same",
            f"{accuracy(mlp, 'mnist/sll')} ([MLP](benchmarks/{mlp}/README.md))",
        ],
        [
            "CIFAR-10, conv net in two blocks: test accuracy",
            accuracy(conv, "cifar10/backprop"),
            "the same",
            f"{accuracy(conv, 'cifar10/sll_2')}, {accuracy(conv, 'cifar10/sll_2_overlap')} with an overlap "
            f"([conv net](benchmarks/{conv}/README.md))",
        ],
    ]
    lines = table(["", "backprop", "backprop, checkpointed", "`sll`"], body)
    return "\n".join([*lines, "", *wrapped(evidence.MARKED)])


def shown(*folders: str, path: str = "../benchmarks/") -> str:
    """The answers of folders, each with its few rows and a link."""
    lines = []
    for claim in map(CLAIMS.__getitem__, folders):
        lines += [
            *wrapped(f"**{claim.toml['question']}** {claim.answer} ({link(claim, path)})"),
            "",
            *claim.small(),
            "",
        ]
    return "\n".join(lines[:-1])


def fit() -> str:
    """The ways to fit a network into less memory, side by side."""
    return "\n".join(CLAIMS[WAYS].small())


def screening() -> str:
    """The single runs that led to the options of `sll`."""
    claim = CLAIMS["conv-sll-screening"]
    return "\n".join(table(claim.script.HEAD, claim.script.rows(claim.lines)))


def blocks_of(rule: str) -> dict[str, str]:
    """Further blocks of a rule's page."""
    return {"theory": shown("sid-theory-beliefs", path="../../benchmarks/")} if rule == "sid_cascade" else {}


def recipe(name: str, folder: str, row: str) -> tuple[Path, str]:
    """A recipe whose last section, `[expected]`, holds what was measured."""
    file = ROOT / "src" / "layerwise" / "runs" / "recipes" / f"{name}.toml"
    found = CLAIMS[folder].row(row)
    kept = file.read_text().partition("\n[expected]")[0].rstrip()
    figure = f"{found.accuracy} (n = {len(found.finals)})"
    command = f"python benchmarks/run.py benchmarks/{folder}"
    return file, f'{kept}\n\n[expected]\ntest_accuracy = "{figure}"\ncommand = "{command}"\n'


def filled(file: Path, **blocks: str) -> tuple[Path, str]:
    """The file, with the text between `<!-- name:begin ... -->` and `<!-- name:end ... -->` replaced."""
    text = file.read_text()
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end[^>]*-->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"{file} has no markers {name}:begin and {name}:end")
        text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
    return file, text


def pages() -> dict[Path, str]:
    """Every file that holds figures, and what it should hold."""
    docs = ROOT / "docs"
    rule_pages = [page for page in sorted((docs / "rules").glob("*.md")) if page.stem != "index"]
    return dict(
        [
            filled(ROOT / "README.md", price=price(), rules=rules_table(), figures=proof()),
            filled(docs / "results.md", answers=answers(), papers=papers()),
            filled(docs / "log.md", screening=screening()),
            filled(docs / "which-way-to-fit.md", fit=fit()),
            filled(docs / "scaling.md", speed=shown(*SCALING)),
            filled(docs / "federated.md", federated=shown("federated-local-losses")),
            filled(HERE / "README.md", claims=index()),
            *(filled(page, figures=rule_page(page.stem), **blocks_of(page.stem)) for page in rule_pages),
            *(recipe(name, folder, row) for name, (folder, row) in RECIPES.items()),
            *((claim.folder / "README.md", claim.readme()) for claim in (*CLAIMS.values(), *evidence.planned())),
        ]
    )


def main() -> None:
    """Write them."""
    for file, text in pages().items():
        file.write_text(text)


if __name__ == "__main__":
    main()
