"""Commands that use a trained run: `layerwise eval`, `beliefs`, `predict` and `export`.

What imports torch is imported in the commands, so that help and refusals come at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerwise.errors import LayerwiseError, say
from layerwise.parsing import parse
from layerwise.runs.layout import check_run


@dataclass(frozen=True)
class EvalOptions:
    """Measure the task's metrics and the loss of a trained run, block by block."""

    split: Literal["test", "val", "train"] = "test"
    """Which part of the run's data set."""
    batch_size: int = 512
    """Samples per batch."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto."""
    json: str | None = None
    """Also write the results to this file."""


def eval_command(argv: list[str]) -> int:
    """`layerwise eval RUN`: print the scalars of every block, averaged over a split."""
    folder, rest = _run(argv, "eval", EvalOptions)
    options = parse(EvalOptions, rest, "eval")
    if options.batch_size < 1:
        raise LayerwiseError(f"batch size is {options.batch_size}; it must be 1 or more.")
    from layerwise.runs import building
    from layerwise.runs.evaluation import evaluate
    from layerwise.runs.output import check_output, data_paths, write_output

    run = building.load_run(folder, options.device)
    inputs = data_paths(run.options.data)
    if options.json:
        check_output(Path(options.json), inputs)  # before the work
    batches = building.split_in_order(run, options.split, options.batch_size, folder)
    figures = evaluate(run.learner, batches)
    _tell(run.notes)
    width = max(map(len, figures))
    print("\n".join(f"{name:<{width}}  {value:.4f}" for name, value in figures.items()))
    if options.json:
        text = json.dumps({"run": str(folder), "split": options.split, **figures}) + "\n"
        write_output(Path(options.json), text, inputs)
    return 0


@dataclass(frozen=True)
class BeliefsOptions:
    """The beliefs of a run of SID, module by module: descent, the bounds of its theory, early exit."""

    split: Literal["test", "val", "train"] = "test"
    """Which part of the run's data set."""
    thresholds: tuple[float, ...] = (0.5, 0.9, 0.99)
    """Probabilities at which to stop at a module."""
    batch_size: int = 512
    """Samples per batch."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto."""
    json: str | None = None
    """Also write all results to this file, with the history of the run."""
    plot: str | None = None
    """Draw entropy and divergence over depth to this file (.svg, .png, .pdf)."""


def beliefs_command(argv: list[str]) -> int:
    """`layerwise beliefs RUN`: print what SID's theory predicts beside what is measured."""
    folder, rest = _run(argv, "beliefs", BeliefsOptions)
    options = parse(BeliefsOptions, rest, "beliefs")
    from layerwise.measure.beliefs import beliefs_of_run, draw, print_beliefs
    from layerwise.runs.folders import read_options
    from layerwise.runs.output import check_output, data_paths, write_output

    inputs = data_paths(read_options(folder).data)
    for file in filter(None, (options.json, options.plot)):
        check_output(Path(file), inputs)  # before the work
    found, notes = beliefs_of_run(folder, options.split, options.thresholds, options.batch_size, options.device)
    if options.plot:
        draw(found["modules"], Path(options.plot))
    if options.json:
        write_output(Path(options.json), json.dumps(found, indent=2) + "\n", inputs)
    print_beliefs(found)
    _tell(notes)
    return 0


@dataclass(frozen=True)
class PredictOptions:
    """Predict the labels of images with a trained run: an image file, a folder, or a .npy array (N, C, H, W).

    The output is CSV: input, class, probability; or a column per target or label, as the run's task has them. A class
    per pixel goes into an array, --out FILE.npy. A run on text continues a --prompt in place of an INPUT.
    """

    out: str | None = None
    """Write the CSV, or the text, to this file instead of printing it."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto."""
    prompt: str | None = None
    """Text that a run on text continues."""
    tokens: int = 200
    """Number of tokens that it writes."""
    temperature: float = 1.0
    """Divides the logits before a token is drawn; 0 takes the most likely one."""
    top_k: int | None = None
    """Draw among so many of the most likely tokens; all of them if not given."""
    seed: int = 0
    """Of the draws."""
    block: int | None = None
    """Predict with the readout of this block, from 1, without the blocks after it; with the whole network if not
    given."""


def predict_command(argv: list[str]) -> int:
    """`layerwise predict RUN INPUT`: print or write what is predicted for every input."""
    folder, rest = _run(argv, "predict", PredictOptions)
    if any(word.partition("=")[0] == "--prompt" for word in rest):
        return _continue(folder, parse(PredictOptions, rest, "predict"))
    given, rest = _positional(rest, "predict", PredictOptions, "INPUT, or --prompt TEXT,")
    options = parse(PredictOptions, rest, "predict")
    for name in ("tokens", "temperature", "top_k", "seed", "block"):
        if getattr(options, name) != getattr(PredictOptions, name):
            raise LayerwiseError(f"--{name.replace('_', '-')} is about text, so give --prompt too, or leave it out.")
    from layerwise.runs.folders import read_options
    from layerwise.runs.output import check_output, data_paths, write_output
    from layerwise.runs.predicting import predictions

    inputs = [Path(given), *data_paths(read_options(folder).data)]
    if options.out:
        check_output(Path(options.out), inputs)  # before the work
    if not options.out and read_options(folder).task == "segmentation":
        raise LayerwiseError("a class per pixel does not go into CSV; write an array with --out FILE.npy.")
    text, notes = predictions(folder, Path(given), options.device)
    _tell(notes)
    if options.out:
        write_output(Path(options.out), text, inputs)
    else:
        print(str(text), end="")
    return 0


def _continue(folder: Path, options: PredictOptions) -> int:
    """Print or write the text that a run on text writes after a prompt."""
    from layerwise.runs.folders import read_options
    from layerwise.runs.generating import Sampling, written
    from layerwise.runs.output import check_output, data_paths, write_output

    inputs = data_paths(read_options(folder).data)
    if options.out:
        check_output(Path(options.out), inputs)  # before the work
    sampling = Sampling(options.temperature, options.top_k, options.seed)
    text, notes = written(folder, options.prompt or "", options.tokens, sampling, options.block, options.device)
    _tell(notes)
    if options.out:
        write_output(Path(options.out), text + "\n", inputs)
    else:
        print(text)
    return 0


@dataclass(frozen=True)
class ExportOptions:
    """Write the trained weights of a run as one safetensors file, under the model's own parameter names.

    This works for a run that several ranks have trained, and for one that is not finished.
    """


def export_command(argv: list[str]) -> int:
    """`layerwise export RUN FILE`: write the weights, and print the file's path."""
    folder, rest = _run(argv, "export", ExportOptions)
    file, rest = _positional(rest, "export", ExportOptions, "FILE")
    parse(ExportOptions, rest, "export")
    from layerwise.runs.exporting import export

    written, notes = export(folder, Path(file))
    _tell(notes)
    print(written)
    return 0


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        say(f"note: {note}")


def _run(argv: Sequence[str], command: str, options: type) -> tuple[Path, list[str]]:
    """The folder of a run that a command is given first, and the words after it."""
    folder, rest = _positional(argv, command, options, "RUN")
    check_run(Path(folder))
    return Path(folder), rest


def _positional(argv: Sequence[str], command: str, options: type, name: str) -> tuple[str, list[str]]:
    """The leading argument, which every call of the command must give, and the words after it."""
    if any(word in ("-h", "--help") for word in argv):
        given = {"predict": "RUN INPUT|--prompt TEXT", "export": "RUN FILE"}.get(command, "RUN")
        print(f"usage: layerwise {command} {given} [OPTIONS]\n")
        parse(options, ["--help"], command)
    if not argv or argv[0].startswith("-"):
        raise LayerwiseError(f"{command} needs {name} as its argument; see layerwise {command} --help.")
    return argv[0], list(argv[1:])
