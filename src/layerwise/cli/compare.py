"""`layerwise compare` and `layerwise report`: run a grid, and draw its report."""

import re
import shlex
from pathlib import Path

from layerwise.cli.early import check_names, check_options, values
from layerwise.cli.help import ModelByName, print_help
from layerwise.compare.settings import ComparisonSettings
from layerwise.errors import LayerwiseError, say
from layerwise.files import kind_of, shown
from layerwise.runs.settings import RunSettings

HIDDEN = ("seed", "overwrite", "save_every")
"""Options of a run that a comparison sets itself."""
ABOUT = """Compare learning rules: the same data order, initial weights and budget for each, over several seeds.

Repeat the command to continue after a crash: finished runs stay, and a half-written run is run again.
`layerwise compare --model vgg --help` lists the options of this model, too; `layerwise describe RULE` those of a rule.
"""


def compare_command(argv: list[str]) -> int:
    """`layerwise compare`: train a grid of runs and print its table; exit code 1 when a run failed."""
    for word in argv:
        if re.match(r"--rule($|[=.])", word):
            raise LayerwiseError(
                f"compare has no {word.partition('=')[0]}; rules and their options come after --rules, such as "
                "--rules sll:overlap=1 backprop."
            )
    check_options(argv, "recipe", "model", "data")
    labels = [part for word in values(argv, "rules") for part in word.split(",")]
    asked = [name for label in labels if (name := label.partition(":")[0]) not in ("", "all")]
    check_names("rule", (name if name.endswith(".py") else name.partition("+")[0] for name in asked))
    print_help(argv, "compare", ABOUT, ComparisonSettings, RunSettings, ModelByName, hidden=HIDDEN)
    from layerwise.compare.grid import CompareOptions, Grid
    from layerwise.core.tasks import metric_of
    from layerwise.report.page import write_report
    from layerwise.report.summary import notes_of_fits, resolution_in_words, summary_table
    from layerwise.report.verdict import depth_table, verdict
    from layerwise.runs.arguments import train_options

    options = train_options(argv, "compare", base=CompareOptions, hidden=("rule", *HIDDEN))
    grid = Grid(options, shlex.join(["layerwise", "compare", *argv]))
    summary = grid.run()
    print(summary_table(summary["rules"], metric_of(options.task)))
    if (note := resolution_in_words(summary["rules"])) is not None:
        print(note)
    for note in notes_of_fits(summary["rules"]):
        print(f"note: {note}")
    if table := depth_table(summary["rules"]):
        print(f"\n{table}\n")
    for sentence in verdict(summary["rules"], metric_of(options.task), options.tune, summary["chance"]):
        print(sentence)
    print(f"files: {grid.folder}")
    if options.report:
        try:
            print(f"report: {write_report(grid.folder)}")
        except LayerwiseError as reason:  # runs and tables are complete without it
            say(f"note: {reason}")
    return int(any(found["failed"] for found in summary["rules"].values()))


def report_command(argv: list[str]) -> int:
    """`layerwise report DIR`: draw the report again, and print its path."""
    if any(word in ("-h", "--help") for word in argv):
        print(
            "usage: layerwise report DIR\n\nDraw report.html and figures/ from what compare or bench --out left in DIR."
        )
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise LayerwiseError("report takes one folder: layerwise report DIR.")
    if kind_of(argv[0]) != "folder":
        raise LayerwiseError(f"there is no folder {shown(argv[0])}; give the folder of a comparison or a benchmark.")
    from layerwise.report.page import write_report

    print(write_report(Path(argv[0])))
    return 0
