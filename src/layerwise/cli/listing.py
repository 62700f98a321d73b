"""`layerwise ls` and `layerwise describe`: what there is. Lists, and answers to misspelt names, need no torch."""

import json

from layerwise.cli import catalogue
from layerwise.cli.early import check_names
from layerwise.errors import LayerwiseError, suggestion

LISTS = {
    "rules": catalogue.rules,
    "models": catalogue.models,
    "data": catalogue.data,
    "recipes": catalogue.recipes,
}


def ls_command(argv: list[str]) -> int:
    """`layerwise ls rules|models|data|recipes`: print one line per name, or an object."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: layerwise ls {'|'.join(LISTS)} [--json]")
        return 0
    as_json, argv = "--json" in argv, [word for word in argv if word != "--json"]
    if len(argv) != 1 or argv[0] not in LISTS:
        near = f"{argv[0]!r} is no list; {suggestion(argv[0], list(LISTS))}" if len(argv) == 1 else "one of the lists"
        raise LayerwiseError(f"say what to list: {near}; layerwise ls {'|'.join(LISTS)}.")
    rows = LISTS[argv[0]]()
    if as_json:
        print(json.dumps({name: " ".join(about.split()) for name, about in rows.items()}, indent=2))
        return 0
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {about}" for name, about in rows.items()))
    return 0


def describe_command(argv: list[str]) -> int:
    """`layerwise describe RULE`: print a rule's equations, facts and options."""
    names = list(catalogue.rules())
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: layerwise describe RULE\n\nrules: {', '.join(names)}")
        return 0
    if len(argv) != 1:
        raise LayerwiseError(f"name one rule: layerwise describe {'|'.join(names)}.")
    check_names("rule", argv)
    from layerwise.cli.describing import describe_rule

    print(describe_rule(argv[0]))
    return 0
