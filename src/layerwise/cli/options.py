"""The options of a command, of a rule and of a model, read from the source of their dataclasses.

They are not imported, so help and completion answer at once, also for a class in a file of the user.
"""

import ast
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layerwise.cli.formulas import readable
from layerwise.cli.source import bases, class_of, meaning, place_of, tree

GIVEN = ("classes", "outputs", "shape", "self")
"""Parameters of a user's function that are not options (`models/outside.py` fills them in)."""
NUMBERS = {"int": "N", "float": "X", "PositiveInt": "N", "NonNegativeInt": "N"}
"""Maps types of whole numbers to a placeholder for their value; the other ranges are of decimal numbers."""

STANDS = {"json": "[FILE.json]", "out": "PATH", "plot": "FILE", "resume": "RUN", "offload_folder": "FOLDER"}
"""Placeholders for the values of options, where they differ from the option's name."""


class Option(NamedTuple):
    """An option, as help and completion show it."""

    flag: str
    """The flag, with its dashes."""
    value: str
    """Placeholder for its value; empty for a switch."""
    choices: tuple[str, ...]
    """Its legal values, if there is a list."""
    several: bool
    """Whether it takes several values."""
    default: str | None
    about: str


def options_of(file: Path, name: str, prefix: str = "", inherited: bool = True) -> list[Option]:
    """Return the options of a dataclass, or of the parameters of a function, in the order of the source.

    Args:
        file: the source file.
        name: of the class or function.
        prefix: of every flag, such as `rule.`.
        inherited: include those of its bases.

    >>> [option.flag for option in options_of(place_of("layerwise.models.mlp"), "MLP", "model.")][:2]
    ['--model.depth', '--model.width']
    """
    functions = [node for node in tree(file).body if isinstance(node, ast.FunctionDef) and node.name == name]
    if functions:
        return [_parameter(file, *found, prefix) for found in _defaults(functions[0])]
    found: dict[str, Option] = {}
    for place, node in bases(file, name) if inherited else [(file, class_of(file, name))]:
        own = [_field(place, line, about, prefix) for line, about in _fields(node)]
        new = {option.flag: option for option in own if option.flag not in found}
        found = found | new if place == file else new | found
    return list(found.values())


def group(where: str, hidden: Sequence[str] = ()) -> list[Option]:
    """Return the options that a class, `module:Class`, declares itself.

    >>> [option.flag for option in group("layerwise.runs.launch:ParallelOptions")]
    ['--parallel', '--stages', '--replicas', '--timeout']
    """
    module, _, name = where.partition(":")
    found = options_of(place_of(module), name, inherited=False)
    return [option for option in found if option.flag.removeprefix("--").replace("-", "_") not in hidden]


def _fields(node: ast.ClassDef) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Return the fields of a dataclass, each with the docstring below it."""
    for line, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(line, ast.AnnAssign) or "ClassVar" in ast.unparse(line.annotation):
            continue
        if line.value is not None:
            text = after.value if isinstance(after, ast.Expr) else None
            about = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
            yield line, plain(about)


def _field(file: Path, line: ast.AnnAssign, about: str, prefix: str) -> Option:
    assert isinstance(line.target, ast.Name)
    name = line.target.id
    kind = line.annotation
    if isinstance(kind, ast.Subscript) and isinstance(kind.slice, ast.Tuple) and ast.unparse(kind.value) == "Annotated":
        kind, *facts = kind.slice.elts
        for fact in facts:
            if isinstance(fact, ast.Call) and ast.unparse(fact.func) == "arg":
                name = str(_literal(file, next(word.value for word in fact.keywords if word.arg == "name")))
    return _option(file, name, kind, line.value, about, prefix)


def _defaults(function: ast.FunctionDef) -> Iterator[tuple[ast.arg, ast.expr]]:
    """Return the parameters of a function that have a default."""
    positional = [*function.args.posonlyargs, *function.args.args]
    count = len(function.args.defaults)
    pairs = [*zip(positional[len(positional) - count :], function.args.defaults, strict=True)]
    named = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    pairs += [(word, value) for word, value in named if value]
    return ((word, value) for word, value in pairs if word.arg not in GIVEN)


def _parameter(file: Path, word: ast.arg, value: ast.expr, prefix: str) -> Option:
    kind = word.annotation
    if kind is None:
        kind = ast.Name(type(_literal(file, value)).__name__)
    return _option(file, word.arg, kind, value, "", prefix)


def _option(file: Path, name: str, kind: ast.expr, value: ast.expr | None, about: str, prefix: str) -> Option:
    stands, choices, several = _values(file, kind)
    if stands == "TEXT":
        stands = STANDS.get(name, name.rpartition(".")[2].upper())
    return Option(
        f"--{prefix}{name.replace('_', '-')}", stands, choices, several, in_words(_literal(file, value)), about
    )


def _values(file: Path, kind: ast.expr) -> tuple[str, tuple[str, ...], bool]:
    """For an option of this type: a placeholder for its value, its choices, and whether it takes several values."""
    if isinstance(kind, ast.BinOp):  # a union: None says nothing about the value, and a tuple holds one as well
        found = [_values(file, part) for part in (kind.left, kind.right) if ast.unparse(part) != "None"]
        stands, choices, _ = found[0]
        return stands, choices, any(several for _, _, several in found)
    if isinstance(kind, ast.Subscript):
        of, inner = ast.unparse(kind.value), kind.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if of == "Literal":
            return "TEXT", tuple(str(ast.literal_eval(part)) for part in parts), False
        if of == "Annotated":
            return _values(file, parts[0])
        if of == "dict":
            return "NAME X", (), True
        stands, choices, _ = _values(file, parts[0])
        if of == "tuple" and len(parts) > 1 and ast.unparse(parts[1]) != "...":
            return " ".join([stands] * len(parts)), choices, False
        return stands, choices, True
    name = ast.unparse(kind)
    if name == "bool":
        return "", (), False
    if name in NUMBERS or name.endswith(("Float", "Fraction")):
        return NUMBERS.get(name, "X"), (), False
    if name in ("str", "Any", "Path", "NoneType"):
        return "TEXT", (), False
    try:
        return _values(*meaning(file, name))
    except LookupError:
        return "TEXT", (), False


def _literal(file: Path, node: ast.expr | None) -> Any:
    """The value of a default in the source; None if only running the code could tell."""
    if node is None:
        return None
    if isinstance(node, ast.Subscript):
        return _literal(file, node.value)[_literal(file, node.slice)]
    if isinstance(node, ast.Name):
        try:
            return _literal(*meaning(file, node.id))
        except LookupError:
            return None
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        return next((_literal(file, word.value) for word in node.keywords if word.arg == "default"), None)
    if ast.unparse(node) == "math.inf":
        return float("inf")
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def in_words(value: Any) -> str | None:
    """A default as on the command line; None if there is nothing to show."""
    if value in (None, "", (), [], {}):
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def plain(text: str) -> str:
    r"""Put a description on one line, with its formulas as plain text.

    >>> plain("Factor $\\lambda_i$ of $\\mathrm{KL}$;\n    at most `d0`.")
    'Factor λᵢ of KL; at most d0.'
    """
    return " ".join(readable(inspect.cleandoc(text)).replace("`", "").split())
