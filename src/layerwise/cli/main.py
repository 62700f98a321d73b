"""The command line: `layerwise COMMAND`; a mistake of the user's is one sentence and exit code 2."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import LayerwiseError, suggestion, tell_torchrun
from layerwise.memory.malloc import keep_freed_memory
from layerwise.parsing import parse, take_option

USAGE = """\
layerwise: train deep networks without global backpropagation

usage: layerwise COMMAND [OPTIONS]

  train                 train a network (SLL on digits, if nothing else is said)
  compare               rules side by side over several seeds, with one report
  report DIR            the report of a comparison or benchmark, drawn again
  eval RUN              accuracy of a trained run on the test split, block by block
  beliefs RUN           what SID's theory says, measured module by module; early exit
  predict RUN INPUT     classes of images, or of the rows of a table, as CSV
  export RUN FILE       the trained weights as one safetensors file, for your own model class
  ls WHAT               list rules | models | data | recipes
  describe RULE         equations, locality, what crosses a boundary, source, restrictions
  bench KIND            memory (exact bytes by depth) | speed (rules, interleaved) | scaling (processes)
  validate              check a rule's invariants on this machine, or the files of a run

`layerwise COMMAND --help` lists the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process if not given.

    Returns:
        The exit code: 0, 1 when a run of a comparison failed, 2 for a mistake of the user's, 128 + signal number when
        stopped.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if argv[0] == "--version":
            from layerwise import __version__

            print(__version__)
            return 0
        command, *rest = argv
        if command not in COMMANDS:
            raise LayerwiseError(f"unknown command {command!r}; {suggestion(command, list(COMMANDS))}.")
        keep_freed_memory()
        code = COMMANDS[command](rest)
        sys.stdout.flush()  # here, where a failure can still be told
        return code
    except LayerwiseError as error:
        tell_torchrun(str(error))
        print(f"layerwise: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro has printed the help text
        return int(stop.code or 0)
    except OSError as error:
        if error.filename is not None:
            raise
        # Of stdout, then: what fails on a file is a LayerwiseError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # its reader has gone, for example `| head`
            return 0
        print(f"layerwise: cannot print ({error.strerror}).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("layerwise: stopped.", file=sys.stderr)
        return 130


def train(argv: list[str]) -> int:
    """`layerwise train`: train a network, or go on with a run."""
    from layerwise.runs import distributed, pipelined, replicated
    from layerwise.runs.arguments import train_options
    from layerwise.runs.folders import read_options
    from layerwise.runs.options import TrainOptions
    from layerwise.runs.training import Interrupted, Run

    command = shlex.join(["layerwise", "train", *argv])
    words = list(argv)
    resume = take_option(words, "resume")
    if resume is not None:
        given = {f.name: take_option(words, f.name) for f in fields(distributed.ParallelOptions)}
        if words:
            raise LayerwiseError(
                f"--resume goes on with the options of the run, so {' '.join(words)!r} cannot be given; leave it out."
            )
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
        how = parse(distributed.ParallelOptions, words, "train")
        folder, options = Path(resume), read_options(Path(resume))
    else:
        how = train_options(argv, "train", distributed.TrainCommand)
        folder, options = None, TrainOptions(**{f.name: getattr(how, f.name) for f in fields(TrainOptions)})
    if how.parallel != "none":
        if how.parallel == "sharded":
            from layerwise.runs.sharded import ShardedRun as kind  # here, as fully_shard takes seconds to import
        else:
            kind = {"pipeline": pipelined.PipelineRun, "data": replicated.DataRun}[how.parallel]
        return distributed.train_rank(kind, how, options, command, folder, lambda *found: print(result_table(*found)))
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LayerwiseError(
            "torchrun has started several processes of the same run; add --parallel pipeline, data or sharded."
        )
    run = Run(options, command, folder)
    try:
        result = run.train()
    except Interrupted as stop:
        print(f"layerwise: {stop}", file=sys.stderr)
        return 128 + stop.signum
    print(result_table(result, run.folder))
    return 0


def result_table(result: dict[str, Any], folder: Any) -> str:
    """The end of a run, for a person to read."""
    memory = result["memory_mib"]
    held = ", ".join(f"{name} {memory[name]:.1f}" for name in ("parameters", "optimizer", "gradients", "activations"))
    rows = {
        "rule": f"{result['rule']} on {result['model']}, {result['data']}, seed {result['seed']}",
        "test accuracy": f"{100 * result['test_accuracy']:.2f} %",
        "val accuracy": "none" if result["val_accuracy"] is None else f"{100 * result['val_accuracy']:.2f} %",
        "by block": " ".join(f"{name} {100 * value:.1f}" for name, value in result["blocks"].items()),
        "training time": f"{result['train_seconds']:.1f} s, {result['samples_per_second']:,.0f} samples/s",
        "peak memory": f"{memory['peak']:.1f} MiB ({held})",
        "files": str(folder),
    }
    if result["skipped_steps"]:
        rows["skipped steps"] = str(result["skipped_steps"])
    rows |= {f"note {i}": note for i, note in enumerate(result["notes"], 1)}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


@dataclass(frozen=True)
class EvalOptions:
    """Accuracy and loss of a trained run, block by block."""

    split: Literal["test", "val", "train"] = "test"
    """Which part of the run's data set."""
    batch_size: int = 512
    """Samples per batch."""
    device: str = "auto"
    """cpu | cuda | cuda:N | auto."""
    json: str | None = None
    """Write the figures to this file too."""


def evaluate(argv: list[str]) -> int:
    """`layerwise eval RUN`."""
    folder, rest = _positional(argv, "eval", EvalOptions, "RUN")
    options = parse(EvalOptions, rest, "eval")
    from layerwise import data
    from layerwise.runs import building, training
    from layerwise.runs.checkpoint import write_atomically

    run, facts, learner, notes = building.load_run(Path(folder), options.device)
    if options.split == "val" and run.val_fraction == 0:
        raise LayerwiseError(f"the run in {folder} has no validation split (--val-fraction 0); use --split test.")
    dataset = building.load_data(run)
    facts.check(dataset)
    source = getattr(dataset, options.split)
    batches = data.Batches(
        source,
        options.batch_size,
        seed=0,
        mean=dataset.mean,
        std=dataset.std,
        device=learner.device,
        shuffle=False,
        drop_last=False,
        channels_last=run.channels_last,
    )
    figures = training.evaluate(learner, batches)
    _tell(notes)
    width = max(map(len, figures))
    print("\n".join(f"{name:<{width}}  {value:.4f}" for name, value in figures.items()))
    if options.json:
        write_atomically(Path(options.json), json.dumps({"run": folder, "split": options.split, **figures}) + "\n")
    return 0


def beliefs(argv: list[str]) -> int:
    """`layerwise beliefs RUN`."""
    from layerwise.measure.beliefs import BeliefsOptions, command

    folder, rest = _positional(argv, "beliefs", BeliefsOptions, "RUN")
    _tell(command(Path(folder), parse(BeliefsOptions, rest, "beliefs")))
    return 0


@dataclass(frozen=True)
class PredictOptions:
    """Classes of images with a trained run: an image file, a folder of images, or a .npy array (N, C, H, W).

    Prints CSV: input, class, probability.
    """

    out: str | None = None
    """File for the CSV; printed if not given."""
    device: str = "auto"
    """cpu | cuda | cuda:N | auto."""


def predict(argv: list[str]) -> int:
    """`layerwise predict RUN INPUT`."""
    folder, rest = _positional(argv, "predict", PredictOptions, "RUN")
    given, rest = _positional(rest, "predict", PredictOptions, "INPUT")
    options = parse(PredictOptions, rest, "predict")
    from layerwise.runs.checkpoint import write_atomically
    from layerwise.runs.predicting import predictions

    text, notes = predictions(Path(folder), Path(given), options.device)
    _tell(notes)
    if options.out:
        write_atomically(Path(options.out), text)
    else:
        print(text, end="")
    return 0


@dataclass(frozen=True)
class ExportOptions:
    """The trained weights of a run as one safetensors file, under the model's own parameter names.

    Also of a run that several ranks have trained, or that is not finished.
    """


def export(argv: list[str]) -> int:
    """`layerwise export RUN FILE`."""
    folder, rest = _positional(argv, "export", ExportOptions, "RUN")
    file, rest = _positional(rest, "export", ExportOptions, "FILE")
    parse(ExportOptions, rest, "export")
    from layerwise.runs.exporting import export as write

    written, notes = write(Path(folder), Path(file))
    _tell(notes)
    print(written)
    return 0


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"layerwise: note: {note}", file=sys.stderr)


def _positional(argv: Sequence[str], command: str, options: type, name: str) -> tuple[str, list[str]]:
    """The leading argument, which every call of the command must give."""
    if any(word in ("-h", "--help") for word in argv):
        given = {"predict": "RUN INPUT", "export": "RUN FILE"}.get(command, "RUN")
        print(f"usage: layerwise {command} {given} [OPTIONS]\n")
        parse(options, ["--help"], command)
    if not argv or argv[0].startswith("-"):
        raise LayerwiseError(f"{command} needs {name} as its argument; see layerwise {command} --help.")
    return argv[0], list(argv[1:])


def ls(argv: list[str]) -> int:
    """`layerwise ls rules|models|data|recipes`."""
    from layerwise import data, models, rules
    from layerwise.runs.options import Recipe, load_recipe, recipe_names

    def first_line(text: str | None) -> str:
        return (text or "").strip().splitlines()[0]

    def recipe_line(recipe: Recipe) -> str:
        accuracy = recipe.expected.get("test_accuracy")
        return recipe.about + (f" Measured: {accuracy} % on the test split." if accuracy else "")

    lists: dict[str, Callable[[], dict[str, str]]] = {
        "rules": lambda: {
            name: f"{rules.get(name).locality:<13} {first_line(rules.get(name).__doc__)}" for name in rules.names()
        },
        "models": lambda: {name: first_line(models.describe(name)) for name in models.names()},
        "data": lambda: {name: data.describe(name) for name in data.names()},
        "recipes": lambda: {name: recipe_line(load_recipe(name)) for name in recipe_names()},
    }
    if len(argv) != 1 or argv[0] not in lists:
        raise LayerwiseError(f"say what to list: layerwise ls {'|'.join(lists)}.")
    rows = lists[argv[0]]()
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {about}" for name, about in rows.items()))
    return 0


def describe(argv: list[str]) -> int:
    """`layerwise describe RULE`."""
    from layerwise import rules
    from layerwise.cli.describing import describe_rule

    if len(argv) != 1:
        raise LayerwiseError(f"name one rule: layerwise describe {'|'.join(rules.names())}.")
    print(describe_rule(argv[0]))
    return 0


def compare(argv: list[str]) -> int:
    """`layerwise compare`."""
    from layerwise.compare import grid as comparing

    return comparing.command(argv)


def report(argv: list[str]) -> int:
    """`layerwise report DIR`."""
    from layerwise.report import page as reporting

    return reporting.command(argv)


def bench(argv: list[str]) -> int:
    """`layerwise bench memory|speed|scaling`."""
    from layerwise.measure import bench as benchmarks
    from layerwise.scaling import bench as scaling

    kinds = {"memory": benchmarks.memory_command, "speed": benchmarks.speed_command, "scaling": scaling.command}
    if not argv or argv[0] not in kinds:
        raise LayerwiseError(f"say what to measure: layerwise bench {'|'.join(kinds)}; --help lists the options.")
    return kinds[argv[0]](argv[1:])


def validate(argv: list[str]) -> int:
    """`layerwise validate [RUN]`."""
    from layerwise.measure import validate as validation

    return validation.command(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "compare": compare,
    "report": report,
    "eval": evaluate,
    "beliefs": beliefs,
    "predict": predict,
    "export": export,
    "ls": ls,
    "describe": describe,
    "bench": bench,
    "validate": validate,
}
