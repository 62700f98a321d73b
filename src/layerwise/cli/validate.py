"""`layerwise validate`: checks a rule's declared properties on this machine, or the files of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerwise.cli.early import check_names
from layerwise.errors import LayerwiseError
from layerwise.parsing import parse
from layerwise.runs.layout import check_run


@dataclass(frozen=True)
class ValidateOptions:
    """Check a rule's declared properties on this machine; with a RUN, check that run's files instead."""

    rule: str = "sll"
    """Rule to check."""
    model: Literal["mlp", "vgg", "resnet", "vit", "sid_cascade", "noprop", "noprop_ct", "noprop_fm"] = "mlp"
    """Model to check it on."""


def validate_command(argv: list[str]) -> int:
    """`layerwise validate [RUN] [OPTIONS]`: print one line per check; exit code 2 where one fails."""
    if argv and not argv[0].startswith("-"):
        if len(argv) > 1:
            raise LayerwiseError("validate takes one RUN and then no options; see layerwise validate --help.")
        check_run(Path(argv[0]))
        from layerwise.measure.validate import run_findings

        findings = run_findings(Path(argv[0]))
    else:
        options = parse(ValidateOptions, argv, "validate")
        check_names("rule", [options.rule])
        from layerwise.measure.validate import rule_findings

        findings = rule_findings(options.rule, options.model)
    for holds, sentence in findings:
        print(f"{'ok  ' if holds else 'FAIL'}  {sentence}", flush=True)
    return 0 if all(holds for holds, _ in findings) else 2
