"""What the layers contract cannot see: the lazy root, imports by name, and import cycles inside a package."""

import ast
import re

import grimp
import networkx
from support.pages import ROOT

SOURCES = sorted((ROOT / "src" / "layerwise").rglob("*.py"))
ENTRANCES = {"__init__.py", "cli/main.py"}
"""Files that import by name: the lazy root, and the dispatch of commands."""


def place(file):
    return str(file.relative_to(ROOT / "src" / "layerwise"))


def test_from_the_root_a_file_takes_rooms_and_the_version_alone():
    rooms = {path.stem for path in (ROOT / "src" / "layerwise").iterdir()} | {"__version__"}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "layerwise":
                assert {alias.name for alias in node.names} <= rooms, place(file)


def test_only_the_entrances_import_by_name():
    for file in SOURCES:
        if place(file) not in ENTRANCES:
            assert not re.search(r"import_module\(f?\"layerwise", file.read_text()), place(file)


def test_no_files_import_each_other_in_a_circle():
    graph = grimp.build_graph("layerwise", exclude_type_checking_imports=True)
    arrows = networkx.DiGraph(
        (module, imported) for module in graph.modules for imported in graph.find_modules_directly_imported_by(module)
    )
    circles = [sorted(part) for part in networkx.strongly_connected_components(arrows) if len(part) > 1]
    assert circles == []
