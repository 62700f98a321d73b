"""`layerwise validate`: checks a rule's declared properties on this machine, or the files of a run."""

from pathlib import Path

from layerwise.cli.early import check_names
from layerwise.cli.words import Results, ValidateOptions
from layerwise.parsing import parse
from layerwise.runs.layout import check_run


def validate_command(argv: list[str]) -> int:
    """`layerwise validate [RUN] [OPTIONS]`: print one line per check; exit code 2 if one fails."""
    if argv and not argv[0].startswith("-"):
        json = parse(Results, argv[1:], "validate").json
        check_run(Path(argv[0]))
        from layerwise.measure.validate import run_findings

        findings = run_findings(Path(argv[0]))
    else:
        options = parse(ValidateOptions, argv, "validate")
        check_names("rule", [options.rule])
        json = options.json
        from layerwise.measure.validate import rule_findings

        findings = rule_findings(options.rule, options.model)
    from layerwise.runs.output import check_json, write_json

    as_json, kept = check_json(json), []
    for holds, sentence in findings:
        kept.append({"holds": holds, "sentence": sentence})
        if not as_json:
            print(f"{'ok  ' if holds else 'FAIL'}  {sentence}", flush=True)
    write_json(json, kept)
    return 0 if all(found["holds"] for found in kept) else 2
