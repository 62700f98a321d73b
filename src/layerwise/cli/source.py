"""Reads classes out of source files: their docstrings, fields and bases, without importing anything."""

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def place_of(module: str) -> Path:
    """The file of a module of this package.

    >>> place_of("layerwise.runs.settings").name
    'settings.py'
    """
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@cache
def tree(file: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def assigned(file: Path, name: str) -> ast.expr:
    """Return the value that a module assigns to a name.

    Raises:
        LookupError: it assigns no value to it.
    """
    for node in tree(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            assert value is not None
            return value
    raise LookupError(f"{file} assigns no {name}")


@cache
def imported(file: Path) -> dict[str, tuple[Path, str]]:
    """Map names that a module imports from this package to the file and the name there."""
    found = {}
    for node in tree(file).body:
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("layerwise."):
            source = place_of(node.module or "")
            found |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return found


def meaning(file: Path, name: str) -> tuple[Path, ast.expr]:
    """Return the value of a name in a module, or in the module that it is imported from.

    Raises:
        LookupError: no value is assigned to it.
    """
    try:
        return file, assigned(file, name)
    except LookupError:
        return meaning(*imported(file)[name])


def class_of(file: Path, name: str) -> ast.ClassDef:
    """Return a class that a module defines.

    Raises:
        LookupError: there is no such class.
    """
    for node in tree(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{file} defines no class {name}")


def bases(file: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    """Return a class and its bases in this package or the file, with their files."""
    node = class_of(file, name)
    yield file, node
    for base in node.bases:
        while isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name):
            own = any(isinstance(other, ast.ClassDef) and other.name == base.id for other in tree(file).body)
            place = (file, base.id) if own else imported(file).get(base.id)
            if place is not None:
                yield from bases(*place)


def first_line(node: ast.ClassDef) -> str:
    """The first line of a class's docstring."""
    return inspect.cleandoc(ast.get_docstring(node) or "").partition("\n")[0]
