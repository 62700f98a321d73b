"""Options of commands that no other package declares. This module does not import torch."""

import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Results:
    """Where to write the results."""

    json: str | None = None
    """Write the results as JSON to this file (a name without .json as --json=FILE); alone, or with -,
    print them in place of the table."""


@dataclass(frozen=True)
class WhatToTrain:
    """What to train."""

    recipe: str = "digits"
    """Recipe whose options are the defaults below (layerwise ls recipes), or a TOML file."""
    rule: str = "sll"
    """Learning rule (layerwise ls rules), or FILE.py:Class."""
    model: str = "mlp"
    """Network (layerwise ls models), or FILE.py:function, hf:CONFIG_OR_FOLDER, timm:NAME."""
    resume: str | None = None
    """Folder of a run to continue with its own options; add only options of several processes and of results."""


@dataclass(frozen=True)
class Compared:
    """What to compare."""

    recipe: str = "digits"
    """Recipe whose options are the defaults below (layerwise ls recipes), or a TOML file."""
    model: str = "mlp"
    """Network (layerwise ls models), or FILE.py:function, hf:CONFIG_OR_FOLDER, timm:NAME."""


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
    """Write the results as JSON to this file (a name without .json as --json=FILE); alone, or with -,
    print them in place of the table."""


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
    """Write all results, with the history of the run, as JSON to this file (a name without .json as --json=FILE);
    alone, or with -, print them in place of the table."""
    plot: str | None = None
    """Draw entropy and divergence over depth to this file (.svg, .png, .pdf)."""


@dataclass(frozen=True)
class PromptOptions:
    """How a run on text continues a prompt."""

    prompt: str = ""
    """Text to continue."""
    tokens: int = 200
    """Number of tokens to generate."""
    temperature: float = 1.0
    """Divides the logits before a token is drawn; 0 takes the most likely one."""
    top_k: int | None = None
    """Draw among this many of the most likely tokens (default: all)."""
    seed: int = 0
    """Seed of the draws."""
    block: int | None = None
    """Predict with the readout of this block, from 1, without the blocks after it; with the whole network if not
    given."""


@dataclass(frozen=True)
class PredictOptions(PromptOptions):
    """What to predict, and where to write it."""

    out: str | None = None
    """Write the CSV, or the text, to this file instead of printing it."""
    device: str = "auto"
    """cpu | cuda | cuda:N | mps | xpu | auto."""


@dataclass(frozen=True)
class ExportOptions:
    """No options: an export needs only a run and a file."""


@dataclass(frozen=True)
class ValidateOptions:
    """What to check."""

    rule: str = "sll"
    """Rule to check."""
    model: Literal["mlp", "vgg", "resnet", "vit", "sid_cascade", "noprop", "noprop_ct", "noprop_fm"] = "mlp"
    """Model to check it on."""
    json: str | None = None
    """Write the findings as JSON to this file (a name without .json as --json=FILE); alone, or with -,
    print them in place of the lines."""


def put_json(where: str, found: Any) -> None:
    """Print JSON if `--json` is `-`, or write it to a file; without torch."""
    if where == "-":
        print(json.dumps(found, indent=2))
    else:
        from layerwise.runs.output import write_json

        write_json(where, found)
