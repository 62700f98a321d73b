"""Lists rules, models and data sets from the source files, because importing the rules imports torch.

`layerwise ls` and the answers to misspelt names use this. The tests compare it with the imported classes.
"""

import ast
import importlib.machinery
import tomllib
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path

from layerwise.cli.source import PACKAGE, assigned, bases, class_of, first_line, imported, tree


def rules() -> dict[str, str]:
    """Map every rule to its locality and the first line of its docstring, the built-in ones first.

    >>> list(rules())[0], rules()["sll"].split()[0]
    ('sll', 'local')
    """
    found = {name: _line(*place) for name, place in _rule_classes().items()}
    for point in sorted(entry_points(group="layerwise.rules"), key=lambda point: point.name):
        if point.name not in found:
            file = _file(point)
            found[point.name] = _line(file, point.attr) if file else f"{'':<13} from the package {_package(point)}"
    forms = ast.literal_eval(assigned(PACKAGE / "rules" / "__init__.py", "FORMS"))
    return found | {form: f"{'':<13} {about}" for form, about in forms.items()}


def models() -> dict[str, str]:
    """Map every model to the first line of its docstring.

    >>> models()["mlp"]
    'Fully connected network: block i is a linear layer, norm, activation and dropout.'
    """
    found = {name: first_line(class_of(*place)) for name, place in _model_classes().items()}
    return found | ast.literal_eval(assigned(PACKAGE / "models" / "outside.py", "FORMS"))


def data() -> dict[str, str]:
    """Map every data set, or form of name, to one line about it.

    >>> data()["cifar10"]
    '60,000 photographs, 32x32 RGB, 10 classes'
    """
    return ast.literal_eval(assigned(PACKAGE / "data" / "catalogue.py", "DESCRIPTIONS"))


def is_text(name: str) -> bool:
    """Whether a data set is a text.

    >>> is_text("text:book.txt"), is_text("digits")
    (True, False)
    """
    return name.partition(":")[0] in ast.literal_eval(assigned(PACKAGE / "data" / "catalogue.py", "TEXTS"))


def recipes() -> dict[str, str]:
    """Map every recipe to its description, with the measured accuracy if it has one.

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


def class_of_rule(name: str) -> tuple[Path, str] | None:
    """Return the file and the class of a rule, also from elsewhere; None if its source cannot be found.

    >>> class_of_rule("sll")[1], class_of_rule("nothing")
    ('SLL', None)
    """
    if ".py:" in name:
        return _in_own_file(name)
    if (found := _rule_classes(name).get(name)) is not None:
        return found
    for point in entry_points(group="layerwise.rules", name=name):
        file = _file(point)
        return (file, point.attr) if file else None
    return None


def class_of_model(name: str) -> tuple[Path, str] | None:
    """Return the file and the class, or function, of a model; None if there is none."""
    for prefix, kind in (("hf:", "HFModel"), ("timm:", "TimmModel")):
        if name.startswith(prefix):
            return PACKAGE / "models" / "outside.py", kind
    return _in_own_file(name) if ".py:" in name else _model_classes().get(name)


def _in_own_file(name: str) -> tuple[Path, str] | None:
    """Find a class or function in a file of the user, if the file exists and can be read."""
    path, _, attribute = name.rpartition(":")
    try:
        held = {getattr(node, "name", None) for node in tree(Path(path)).body}
    except (OSError, SyntaxError, ValueError):
        return None
    return (Path(path), attribute) if attribute in held else None


def _rule_classes(wanted: str | None = None) -> dict[str, tuple[Path, str]]:
    """Map every built-in rule, or one of them, to its file and class, in order."""
    file = PACKAGE / "rules" / "__init__.py"
    table = assigned(file, "_BUILT_IN")
    assert isinstance(table, ast.Tuple)
    places = [imported(file)[entry.id] for entry in table.elts if isinstance(entry, ast.Name)]
    if wanted is not None:  # parsing takes time, so only files that contain the name are parsed
        places = [place for place in places if f'"{wanted}"' in place[0].read_text(encoding="utf-8")]
    return {_attribute(*place, "name"): place for place in places}


def _model_classes() -> dict[str, tuple[Path, str]]:
    """Map every model of the zoo to its file and class, in order."""
    file = PACKAGE / "models" / "__init__.py"
    table = assigned(file, "_MODELS")
    assert isinstance(table, ast.Dict)
    found = {}
    for name, entry in zip(table.keys, table.values, strict=True):
        assert isinstance(name, ast.Constant)
        assert isinstance(entry, ast.Name)
        found[name.value] = imported(file)[entry.id]
    return found


def _line(file: Path, name: str) -> str:
    """Describe a rule in one line: its locality, and the first line of its docstring."""
    return f"{_attribute(file, name, 'locality'):<13} {first_line(class_of(file, name))}"


def _attribute(file: Path, name: str, attribute: str) -> str:
    """Return a string that a class, or one of its bases, assigns in its body."""
    for _, node in bases(file, name):
        for line in node.body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            value = getattr(line, "value", None)
            if any(isinstance(target, ast.Name) and target.id == attribute for target in targets) and isinstance(
                value, ast.Constant
            ):
                return str(value.value)
    return ""


def _file(point: EntryPoint) -> Path | None:
    """Find the source of another package's rule without importing it; None if it is not a plain file."""
    paths, spec = None, None
    for part in point.module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, paths)
        if spec is None:
            return None
        paths = spec.submodule_search_locations
    file = Path(spec.origin) if spec is not None and spec.origin else None
    try:
        assert file is not None
        class_of(file, point.attr)
    except (AssertionError, LookupError, OSError, SyntaxError, ValueError):
        return None
    return file


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]
