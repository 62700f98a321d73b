"""Commands that use a trained run: `layerwise eval`, `beliefs`, `predict` and `export`.

Modules that import torch are imported in the commands, so that help and errors appear at once.
"""

from collections.abc import Sequence
from pathlib import Path

from layerwise.cli.words import BeliefsOptions, EvalOptions, ExportOptions, PredictOptions
from layerwise.errors import LayerwiseError, note
from layerwise.parsing import parse
from layerwise.runs.layout import check_run


def eval_command(argv: list[str]) -> int:
    """`layerwise eval RUN`: print the scalars of every block, averaged over a split."""
    folder, rest = _run(argv, "eval")
    options = parse(EvalOptions, rest, "eval")
    if options.batch_size < 1:
        raise LayerwiseError(f"batch size is {options.batch_size}; it must be 1 or more.")
    from layerwise.runs import building
    from layerwise.runs.evaluation import evaluate
    from layerwise.runs.output import check_json, data_paths, write_json

    run = building.load_run(folder, options.device)
    inputs = data_paths(run.options.data)
    as_json = check_json(options.json, inputs)  # before the work
    batches = building.split_in_order(run, options.split, options.batch_size, folder)
    figures = evaluate(run.learner, batches)
    _tell(run.notes)
    width = max(map(len, figures))
    if not as_json:
        print("\n".join(f"{name:<{width}}  {value:.4f}" for name, value in figures.items()))
    write_json(options.json, {"run": str(folder), "split": options.split, **figures}, inputs)
    return 0


def beliefs_command(argv: list[str]) -> int:
    """`layerwise beliefs RUN`: print the predictions of SID's theory beside the measurements."""
    folder, rest = _run(argv, "beliefs")
    options = parse(BeliefsOptions, rest, "beliefs")
    from layerwise.measure.beliefs import beliefs_of_run, draw, print_beliefs
    from layerwise.runs.folders import read_options
    from layerwise.runs.output import check_json, check_output, data_paths, write_json

    inputs = data_paths(read_options(folder).data)
    as_json = check_json(options.json, inputs)  # before the work
    if options.plot:
        check_output(Path(options.plot), inputs)
    found, notes = beliefs_of_run(folder, options.split, options.thresholds, options.batch_size, options.device)
    if options.plot:
        draw(found["modules"], Path(options.plot))
    write_json(options.json, found, inputs)
    if not as_json:
        print_beliefs(found)
    _tell(notes)
    return 0


def predict_command(argv: list[str]) -> int:
    """`layerwise predict RUN INPUT`: print or write the prediction for every input."""
    folder, rest = _run(argv, "predict")
    if any(word.partition("=")[0] == "--prompt" for word in rest):
        return _continue(folder, parse(PredictOptions, rest, "predict"))
    given, rest = _positional(rest, "predict", "INPUT, or --prompt TEXT,")
    options = parse(PredictOptions, rest, "predict")
    for name in ("tokens", "temperature", "top_k", "seed", "block"):
        if getattr(options, name) != getattr(PredictOptions, name):
            raise LayerwiseError(f"--{name.replace('_', '-')} applies to text, so give --prompt too, or leave it out.")
    from layerwise.runs.folders import read_options
    from layerwise.runs.output import check_output, data_paths, write_output
    from layerwise.runs.predicting import predictions

    inputs = [Path(given), *data_paths(read_options(folder).data)]
    if options.out:
        check_output(Path(options.out), inputs)  # before the work
    if not options.out and read_options(folder).task == "segmentation":
        raise LayerwiseError("a class per pixel cannot be written as CSV; write an array with --out FILE.npy.")
    text, notes = predictions(folder, Path(given), options.device)
    _tell(notes)
    if options.out:
        write_output(Path(options.out), text, inputs)
    else:
        print(str(text), end="")
    return 0


def _continue(folder: Path, options: PredictOptions) -> int:
    """Print or write the text that a run on text generates after a prompt."""
    from layerwise.runs.folders import read_options
    from layerwise.runs.generating import Sampling, written
    from layerwise.runs.output import check_output, data_paths, write_output

    inputs = data_paths(read_options(folder).data)
    if options.out:
        check_output(Path(options.out), inputs)  # before the work
    sampling = Sampling(options.temperature, options.top_k, options.seed)
    text, notes = written(folder, options.prompt, options.tokens, sampling, options.block, options.device)
    _tell(notes)
    if options.out:
        write_output(Path(options.out), text + "\n", inputs)
    else:
        print(text)
    return 0


def export_command(argv: list[str]) -> int:
    """`layerwise export RUN FILE`: write the weights, and print the file's path."""
    folder, rest = _run(argv, "export")
    file, rest = _positional(rest, "export", "FILE")
    parse(ExportOptions, rest, "export")
    from layerwise.runs.exporting import export
    from layerwise.runs.output import is_printed

    written, notes = export(folder, Path(file))
    _tell(notes)
    if not is_printed(file):  # it would become a part of the file
        print(written)
    return 0


def _tell(notes: Sequence[str]) -> None:
    for sentence in notes:
        note(sentence)


def _run(argv: Sequence[str], command: str) -> tuple[Path, list[str]]:
    """Return the folder of a run, the first argument of a command, and the words after it."""
    folder, rest = _positional(argv, command, "RUN")
    check_run(Path(folder))
    return Path(folder), rest


def _positional(argv: Sequence[str], command: str, name: str) -> tuple[str, list[str]]:
    """Return the required first argument of a command, and the words after it."""
    if not argv or argv[0].startswith("-"):
        raise LayerwiseError(f"{command} needs {name} as its argument; see layerwise {command} --help.")
    return argv[0], list(argv[1:])
