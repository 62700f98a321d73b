"""`layerwise ls` and `layerwise describe`. Lists, and errors about misspelt names, need no torch."""

from layerwise.cli import catalogue
from layerwise.cli.early import check_names
from layerwise.cli.formulas import readable
from layerwise.cli.words import put_json
from layerwise.errors import LayerwiseError, suggestion
from layerwise.parsing import take_option
from layerwise.terminal import indented, terminal_width

LISTS = {
    "rules": catalogue.rules,
    "models": catalogue.models,
    "data": catalogue.data,
    "recipes": catalogue.recipes,
}


def ls_command(argv: list[str]) -> int:
    """`layerwise ls rules|models|data|recipes`: print one line per name, or an object."""
    argv = list(argv)
    where = take_option(argv, "json", "ls")
    if len(argv) != 1 or argv[0] not in LISTS:
        near = (
            f"there is no list {argv[0]!r}; {suggestion(argv[0], list(LISTS))}"
            if len(argv) == 1
            else "one of the lists"
        )
        raise LayerwiseError(f"say what to list: {near}; layerwise ls {'|'.join(LISTS)}.")
    rows = LISTS[argv[0]]()
    if where is not None:
        put_json(where, {name: _parts(about) if argv[0] == "rules" else about for name, about in rows.items()})
        return 0
    width, wide = max(map(len, rows)) + 2, terminal_width()
    for name, about in rows.items():
        print(indented(name, readable(about), width, wide))
    return 0


def _parts(about: str) -> dict[str, str | None]:
    """Locality and description of a rule; a form of name has no locality of its own."""
    locality, _, text = about.partition(" ")
    return {"locality": locality or None, "about": text.strip()}


def describe_command(argv: list[str]) -> int:
    """`layerwise describe RULE`: print a rule's equations, facts and options."""
    if len(argv) != 1:
        raise LayerwiseError("name one rule, such as layerwise describe sll; layerwise ls rules shows them all.")
    check_names("rule", argv)
    from layerwise.cli.describing import describe_rule

    print(describe_rule(argv[0]))
    return 0
