"""What the layers contract cannot see: names of the lazy root, imports by name, and circles of files in a package."""

import ast
import re

import grimp
import networkx
import pytest
from support.pages import ROOT

SOURCES = sorted((ROOT / "src" / "layerwise").rglob("*.py"))
ENTRANCES = {"__init__.py", "cli/main.py"}
"""Files that import by name: the lazy root, and the dispatch of commands."""


def place(file):
    return str(file.relative_to(ROOT / "src" / "layerwise"))


def taken_from_the_root(code):
    """Imports of the root itself or of its lazy names: they hide from which room something comes."""
    if not re.search(r"import layerwise|from (layerwise +import|\.)", code):
        return
    rooms = {path.stem for path in (ROOT / "src" / "layerwise").iterdir()} | {"__version__"}
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.Import):
            yield from (name for name in names if name.partition(".")[0] == "layerwise")
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module == "layerwise"):
            yield from (name for name in names if node.level or name not in rooms)


def test_from_the_root_a_file_takes_rooms_and_the_version_alone():
    for file in SOURCES:
        assert list(taken_from_the_root(file.read_text())) == [], place(file)


@pytest.mark.parametrize(
    "line",
    [
        "from layerwise import Learner",
        "import layerwise",
        "import layerwise as lw",
        "import layerwise.rules",
        "from .. import Learner",
        "from . import X",
    ],
)
def test_a_lazy_name_of_the_root_is_noticed_inside_a_function(line):
    assert len(list(taken_from_the_root(f"def f():\n    {line}\n"))) == 1
    assert list(taken_from_the_root("def f():\n    from layerwise import __version__, rules\n")) == []


def test_only_the_entrances_import_by_name():
    for file in SOURCES:
        if place(file) not in ENTRANCES:
            assert not re.search(r"import_module\(f?\"layerwise", file.read_text()), place(file)


def test_no_files_import_each_other_in_a_circle():
    graph = grimp.build_graph("layerwise", exclude_type_checking_imports=False)
    arrows = networkx.DiGraph(
        (module, imported) for module in graph.modules for imported in graph.find_modules_directly_imported_by(module)
    )
    circles = [sorted(part) for part in networkx.strongly_connected_components(arrows) if len(part) > 1]
    assert circles == []
