"""A table of all commands, what they do, and their options. Help, completion and `main` read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

NAMES = {
    "rule": ("train", "compare", "bench memory", "bench speed", "bench scaling", "validate"),
    "model": ("train", "compare", "bench memory", "bench speed", "bench scaling", "validate"),
    "data": ("train", "compare"),
    "recipe": ("train", "compare"),
}
"""Options whose values are names that `layerwise ls` knows, and the commands that have them."""
LISTS = {"rule": "rules", "model": "models", "data": "data", "recipe": "recipes"}
"""Maps such an option to the list of its names."""


@dataclass(frozen=True)
class Command:
    """A command of the command line."""

    target: str
    """`module:function`; imported when it is called, because most of them import torch."""
    about: str
    """What it does, in one line."""
    arguments: str = ""
    """Its arguments before the options."""
    text: str = ""
    """Further help."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Maps the title of a group of options to the class that declares them, `module:Class`."""
    hidden: tuple[str, ...] = ()
    """Fields of these classes that the command sets itself."""
    choices: tuple[str, ...] = ()
    """Legal values of its first argument."""


CHOSEN = "layerwise.cli.words"
RUN = {
    "data": "layerwise.runs.settings:DataSettings",
    "model": "layerwise.runs.settings:ModelSettings",
    "optimiser": "layerwise.runs.settings:OptimizerSettings",
    "run": "layerwise.runs.settings:MachineSettings",
}
OUTPUT = {"output": "layerwise.runs.settings:OutputSettings", "results": f"{CHOSEN}:Results"}
BENCH = "layerwise.measure.bench_options"

COMMANDS: dict[str, Command] = {
    "train": Command(
        "layerwise.cli.train:train_command",
        "train a network (default: SLL on digits), or continue a run",
        text="The options of the rule and the model follow. Those of others are listed by "
        "layerwise train --rule NAME --model NAME --help.",
        groups={
            "what is trained": f"{CHOSEN}:WhatToTrain",
            **RUN,
            "several processes": "layerwise.runs.launch:ParallelOptions",
            **OUTPUT,
        },
    ),
    "compare": Command(
        "layerwise.cli.compare:compare_command",
        "train several rules over several seeds, and write one report",
        text="Every rule has the same data order, initial weights and budget. Repeat the command to continue after a "
        "crash: finished runs are kept, and an unfinished run is run again.",
        groups={
            "what is compared": f"{CHOSEN}:Compared",
            "comparison": "layerwise.compare.settings:ComparisonSettings",
            **RUN,
            **OUTPUT,
        },
        hidden=("seed", "overwrite", "save_every"),
    ),
    "report": Command(
        "layerwise.cli.compare:report_command",
        "draw the report of a comparison or a benchmark again",
        "DIR",
        "It draws report.html and figures/ from the files of compare or bench --out in DIR, and prints the path.",
    ),
    "eval": Command(
        "layerwise.cli.trained:eval_command",
        "measure a trained run on the test split, block by block",
        "RUN",
        groups={"options": "layerwise.cli.words:EvalOptions"},
    ),
    "beliefs": Command(
        "layerwise.cli.trained:beliefs_command",
        "compare beliefs with SID's theory, module by module; early exit",
        "RUN",
        groups={"options": "layerwise.cli.words:BeliefsOptions"},
    ),
    "predict": Command(
        "layerwise.cli.trained:predict_command",
        "predict the classes of images or of the rows of a table, as CSV; --prompt continues a text",
        "RUN INPUT | RUN --prompt TEXT",
        "INPUT is an image, a folder of images, a .npy array (N, C, H, W), or a CSV file with the columns of the run's "
        "table. The CSV has the columns input, class and probability, or one per target or label for other tasks. "
        "A class per pixel is written as an array: --out FILE.npy.",
        groups={"options": "layerwise.cli.words:PredictOptions", "text": "layerwise.cli.words:PromptOptions"},
    ),
    "export": Command(
        "layerwise.cli.trained:export_command",
        "write the trained weights as one safetensors file, for your own model class",
        "RUN FILE",
        "The parameters have the model's own names. This also works for a run that many ranks have trained, and for "
        "one that is not finished.",
    ),
    "ls": Command(
        "layerwise.cli.listing:ls_command",
        "list rules, models, data sets or recipes",
        "rules|models|data|recipes",
        groups={"options": f"{CHOSEN}:Results"},
        choices=tuple(LISTS.values()),
    ),
    "describe": Command(
        "layerwise.cli.listing:describe_command",
        "show a rule's equations, locality, boundary, source, restrictions and options",
        "RULE",
    ),
    "bench": Command(
        "layerwise.cli.bench:bench_command",
        "measure memory (exact bytes by depth), speed (rules interleaved) or scaling (processes)",
        "memory|speed|scaling",
        "layerwise bench memory --help lists the options of a benchmark.",
        choices=("memory", "speed", "scaling"),
    ),
    "new-rule": Command(
        "layerwise.cli.new_rule:new_rule_command",
        "write a rule of your own and its tests, for you to change",
        "NAME [FOLDER]",
        "It writes NAME.py, a rule that trains, and test_NAME.py, its tests, into FOLDER (default: here). Nothing is "
        "overwritten.",
    ),
    "doctor": Command(
        "layerwise.cli.doctor:doctor_command",
        "show versions, devices, memory, data and extras, and anything that prevents training",
        groups={"options": f"{CHOSEN}:Results"},
    ),
    "validate": Command(
        "layerwise.cli.validate:validate_command",
        "check a rule's declared properties on this machine, or the files of a run",
        "[RUN]",
        groups={"options": "layerwise.cli.words:ValidateOptions"},
    ),
    "completion": Command(
        "layerwise.cli.completion:completion_command",
        "print a script that lets a shell complete commands, options and names",
        "bash|zsh|fish",
        'Bash: eval "$(layerwise completion bash)" in ~/.bashrc. Zsh: the same with zsh in ~/.zshrc, after compinit. '
        "Fish: layerwise completion fish > ~/.config/fish/completions/layerwise.fish.",
        choices=("bash", "zsh", "fish"),
    ),
}
DEVICE = {"model and batch": f"{BENCH}:Problem", "run": f"{BENCH}:DeviceProblem"}
BENCHES: dict[str, Command] = {
    "bench memory": Command(
        "", "measure the exact peak bytes of one training step, by depth", groups={
            "what is measured": f"{BENCH}:MemoryOptions", **DEVICE, "output": f"{BENCH}:Written"
        },
    ),
    "bench speed": Command(
        "", "measure the time per training step; rules are interleaved", groups={
            "what is measured": f"{BENCH}:SpeedOptions", **DEVICE, "output": f"{BENCH}:Written"
        },
    ),
    "bench scaling": Command(
        "", "measure throughput on several processes, which take turns",
        text="Ways: rule and backprop in one process; apart (independent processes: the limit of the machine); "
        "pipeline and data (ours); ddp (torch's DistributedDataParallel); torch's gpipe, 1f1b, zb1p and zbv (zero "
        "bubble). On the CPU.",
        groups={
            "what is measured": "layerwise.scaling.options:ScalingOptions",
            "model and batch": f"{BENCH}:Problem",
            "output": f"{BENCH}:Written",
        },
    ),
}  # fmt: skip
"""The benchmarks of `layerwise bench`."""
ANYWHERE = {
    "--help": "print this help",
    "--quiet": "print results and errors only: no progress and no notes",
    "--debug": "print the traceback of an error before its sentence",
}
"""Switches of every command, allowed anywhere on the line."""
