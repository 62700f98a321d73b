"""`layerwise compare` and `layerwise report`: run a grid, and draw its report."""

import shlex
from pathlib import Path

from layerwise.cli.commands import COMMANDS
from layerwise.cli.early import check_names, check_options, values
from layerwise.cli.flags import check_flags
from layerwise.errors import LayerwiseError, note
from layerwise.files import kind_of, shown
from layerwise.parsing import take_option
from layerwise.terminal import terminal_width, wrapped


def compare_command(argv: list[str]) -> int:
    """`layerwise compare`: train a grid of runs and print its table; exit code 1 when a run failed."""
    command = shlex.join(["layerwise", "compare", *argv])
    argv = list(argv)
    json = take_option(argv, "json", "compare")
    for word in argv:
        if word.startswith("--rule."):
            raise LayerwiseError(
                f"compare has no {word.partition('=')[0]}, because it compares several rules; options of a rule follow "
                "its name and a colon: --rule sll:overlap=1 backprop."
            )
    check_options(argv, "recipe", "model", "data")
    labels = [part for word in values(argv, "rule") for part in word.split(",")]
    asked = [name for label in labels if (name := label.partition(":")[0]) not in ("", "all")]
    check_names("rule", (name if name.endswith(".py") else name.partition("+")[0] for name in asked))
    check_flags("compare", argv)
    from layerwise.compare.grid import CompareOptions, Grid
    from layerwise.core.tasks import metric_of
    from layerwise.report.page import write_report
    from layerwise.report.summary import notes_of_fits, resolution_in_words, summary_table
    from layerwise.report.verdict import depth_table, verdict
    from layerwise.runs.arguments import train_options
    from layerwise.runs.output import check_json, write_json
    from layerwise.runs.progress import working

    hidden = COMMANDS["compare"].hidden
    options = train_options(argv, "compare", base=CompareOptions, hidden=("rule", *hidden))
    as_json, metric = check_json(json), metric_of(options.task)
    grid = Grid(options, command)
    summary = grid.run()
    found, width = summary["rules"], terminal_width()
    lines = [summary_table(found, metric, width)]
    remarks = [resolution_in_words(found), *(f"note: {sentence}" for sentence in notes_of_fits(found))]
    lines += [wrapped(remark, width) for remark in remarks if remark is not None]
    if held := depth_table(found, width):
        lines += ["", held, ""]
    said = verdict(found, metric, options.tune, summary["chance"], options.accumulate)
    lines += [wrapped(sentence, width) for sentence in said]
    lines.append(f"files: {grid.folder}")
    if not as_json:
        print("\n".join(lines), flush=True)
    if options.report:
        try:
            with working("drawing the report"):
                page = write_report(grid.folder)
            if not as_json:
                print(f"report: {page}")
        except LayerwiseError as reason:  # runs and tables are complete without it
            note(str(reason))
    write_json(json, summary | {"folder": str(grid.folder)})
    return int(any(found["failed"] for found in summary["rules"].values()))


def report_command(argv: list[str]) -> int:
    """`layerwise report DIR`: draw the report again, and print its path."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise LayerwiseError("report takes one folder: layerwise report DIR.")
    if kind_of(argv[0]) != "folder":
        raise LayerwiseError(f"there is no folder {shown(argv[0])}; give the folder of a comparison or a benchmark.")
    from layerwise.report.page import write_report
    from layerwise.runs.progress import working

    with working("drawing the report"):
        page = write_report(Path(argv[0]))
    print(page)
    return 0
