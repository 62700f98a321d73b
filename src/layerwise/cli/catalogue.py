"""What there is to choose from, read from the source files, because importing the rules imports torch.

`layerwise ls` and the answers to misspelt names use this. The tests compare it with the imported classes.
"""

import ast
import importlib.machinery
import inspect
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def rules() -> dict[str, str]:
    """Name of every rule to its locality and the first line of its docstring, the built-in ones first.

    >>> list(rules())[0], rules()["sll"].split()[0]
    ('sll', 'local')
    """
    found = {}
    classes = _imported(PACKAGE / "rules" / "__init__.py")
    table = _assigned(PACKAGE / "rules" / "__init__.py", "_BUILT_IN")
    assert isinstance(table, ast.Tuple)
    for entry in table.elts:
        assert isinstance(entry, ast.Name)
        file, name = classes[entry.id]
        found[_attribute(file, name, "name")] = _line(file, name)
    for point in sorted(entry_points(group="layerwise.rules"), key=lambda point: point.name):
        if point.name not in found:
            file = _file(point)
            found[point.name] = _line(file, point.attr) if file else f"{'':<13} from the package {_package(point)}"
    forms = ast.literal_eval(_assigned(PACKAGE / "rules" / "__init__.py", "FORMS"))
    return found | {form: f"{'':<13} {about}" for form, about in forms.items()}


def models() -> dict[str, str]:
    """Name of every model to the first line of its docstring.

    >>> models()["mlp"]
    'Fully connected network: block i is a linear layer, norm, activation and dropout.'
    """
    file = PACKAGE / "models" / "__init__.py"
    classes, table = _imported(file), _assigned(file, "_MODELS")
    assert isinstance(table, ast.Dict)
    found = {}
    for name, entry in zip(table.keys, table.values, strict=True):
        assert isinstance(name, ast.Constant)
        assert isinstance(entry, ast.Name)
        found[name.value] = _first_line(_class(*classes[entry.id]))
    return found | ast.literal_eval(_assigned(PACKAGE / "models" / "outside.py", "FORMS"))


def data() -> dict[str, str]:
    """Name of every data set, or form of name, to one line about it.

    >>> data()["cifar10"]
    '60,000 photographs, 32x32 RGB, 10 classes'
    """
    return ast.literal_eval(_assigned(PACKAGE / "data" / "catalogue.py", "DESCRIPTIONS"))


def recipes() -> dict[str, str]:
    """Name of every recipe to its description, with the measured accuracy where it has one.

    >>> "digits" in recipes()
    True
    """
    found = {}
    for file in sorted(files("layerwise.runs.recipes").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            recipe = tomllib.loads(file.read_text())
            accuracy = recipe.get("expected", {}).get("test_accuracy")
            measured = f" Measured: {accuracy} % on the test split." if accuracy else ""
            found[file.name.removesuffix(".toml")] = recipe.get("about", "") + measured
    return found


def _line(file: Path, name: str) -> str:
    """A rule in one line: its locality, and the first line of its docstring."""
    return f"{_attribute(file, name, 'locality'):<13} {_first_line(_class(file, name))}"


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _assigned(file: Path, name: str) -> ast.expr:
    """The value that a module assigns to a name."""
    for node in _tree(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            assert value is not None
            return value
    raise LookupError(f"{file} assigns no {name}")


@cache
def _imported(file: Path) -> dict[str, tuple[Path, str]]:
    """Names that a module imports from modules of this package: to the file, and the name there."""
    found = {}
    for node in _tree(file).body:
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("layerwise."):
            place = PACKAGE.joinpath(*(node.module or "").split(".")[1:])
            source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            found |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return found


def _class(file: Path, name: str) -> ast.ClassDef:
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{file} defines no class {name}")


def _bases(file: Path, name: str) -> Iterator[ast.ClassDef]:
    """A class and those that it inherits from, as far as this package defines them."""
    node = _class(file, name)
    yield node
    for base in node.bases:
        while isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name):
            own = any(isinstance(other, ast.ClassDef) and other.name == base.id for other in _tree(file).body)
            place = (file, base.id) if own else _imported(file).get(base.id)
            if place is not None:
                yield from _bases(*place)


def _attribute(file: Path, name: str, attribute: str) -> str:
    """A string that the body of a class, or of one that it inherits from, assigns."""
    for node in _bases(file, name):
        for line in node.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            value = getattr(line, "value", None)
            if any(isinstance(target, ast.Name) and target.id == attribute for target in targets) and isinstance(
                value, ast.Constant
            ):
                return str(value.value)
    return ""


def _first_line(node: ast.ClassDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "").partition("\n")[0]


def _file(point: EntryPoint) -> Path | None:
    """The source of another package's rule, found without importing it; None where that is not a plain file."""
    paths, spec = None, None
    for part in point.module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, paths)
        if spec is None:
            return None
        paths = spec.submodule_search_locations
    file = Path(spec.origin) if spec is not None and spec.origin else None
    try:
        assert file is not None
        _class(file, point.attr)
    except (AssertionError, LookupError, OSError, SyntaxError, ValueError):
        return None
    return file


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]
