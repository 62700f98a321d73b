"""The documentation says what the code does: names, links, facts of rules, and every block of code."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from support.pages import ROOT, blocks, run_page

import layerwise
from layerwise import rules

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READMES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").rglob("README.md"))]
MODULES = [module.name for module in pkgutil.walk_packages(layerwise.__path__, "layerwise.")]
PUBLIC = (
    "layerwise",
    "layerwise.rules",
    "layerwise.models",
    "layerwise.data",
    "layerwise.core.functional",
    "layerwise.memory.meter",
    "layerwise.measure.diagnostics",
)


def title(page):
    return str(page.relative_to(ROOT))


def flat(text):
    return " ".join(text.split())


def public(module):
    """Public names of a module: `__all__`, or else what it defines itself without a leading underscore."""
    found = importlib.import_module(module)
    own = [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module and callable(value)
    ]
    return [(module, name) for name in getattr(found, "__all__", own)]


NAMES = [pair for module in PUBLIC for pair in public(module)]
# Runs of several kinds, or on several ranks; guides that are also run as notebooks.
LONG = {
    *(DOCS / f"{name}.md" for name in ("compare", "first-hour", "two-machines", "quickstart", "your-own-network")),
    *(DOCS / f"{name}.md" for name in ("training", "restrictions", "writing-a-rule")),
    *(DOCS / "rules" / f"{name}.md" for name in ("sid_cascade", "noprop_ct", "noprop_fm")),
}
RUNNABLE = [page for page in PAGES if {"python", "pycon", "console"} & {language for language, _, _ in blocks(page)}]


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow if p in LONG else (), id=title(p)) for p in RUNNABLE]
)
def test_every_block_of_a_page_does_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")  # a page's table has a line for each row
    run_page(page)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda part: part)
def test_every_public_name_is_documented(module, name):
    value = getattr(importlib.import_module(module), name)
    if not isinstance(value, dict):
        assert inspect.getdoc(value), f"{module}.{name} has no docstring"
        inherited = any(value.__doc__ == base.__doc__ for base in getattr(value, "__mro__", ())[1:])
        assert not inherited, f"{module}.{name} has only the docstring of its base"
    text = "\n".join(page.read_text() for page in PAGES)
    shown = rf"^::: {module}\.{name}$|^::: {module}$|`(layerwise\.|{module}\.)?{name}`"  # it, its module, or a word
    assert re.search(shown, text, re.MULTILINE), f"no page shows {module}.{name}"


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda part: part)
def test_every_public_method_has_a_docstring(module, name):
    value = getattr(importlib.import_module(module), name)
    for method, function in vars(value).items() if inspect.isclass(value) else ():
        if method.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
            continue
        assert inspect.getdoc(getattr(value, method)), f"{module}.{name}.{method} has no docstring"


@pytest.mark.parametrize("name", [rule.name for rule in rules._BUILT_IN])
def test_every_rule_has_a_page_with_its_facts(name):
    rule = rules.get(name)
    page = DOCS / "rules" / f"{name}.md"
    assert page.is_file(), f"write {title(page)}"
    text = flat(page.read_text())
    facts = {
        "locality": f"`{rule.locality}`",
        "boundary": rule.boundary,
        "activations + gradients": ("constant in" if rule.flat_memory else "grow with") + " the number of blocks",
        "source": rule.source,
        "restrictions": rule.restrictions or "none known",
    }
    for fact, value in facts.items():
        assert f"| {fact} | {flat(value)} |" in text, f"{title(page)} should have the row | {fact} | {value} |"
    for heading in ("## Equations", "## Boundary and memory", "## Options", "## Figures"):
        assert heading in page.read_text(), f"{title(page)} has no section {heading}"
    options = f"::: {rule.__module__}.{rule.__qualname__}" if rule.__dataclass_fields__ else "None."
    assert options in text
    for overview in (ROOT / "README.md", DOCS / "rules" / "index.md"):
        assert re.search(rf"^\| \[`{name}`\]\(.*{name}\.md\) \|", overview.read_text(), re.MULTILINE), title(overview)


NAMED_AFTER_WHAT_THEY_HOLD = {"rules", "models", "replacements"}
"""Rooms whose files are listed by name: `layerwise ls rules`."""


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=title)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{title(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{title(page)} links to {target}"


def test_pictures_are_small():
    """A page with its pictures is read on a phone, and they stay in the repository for ever."""
    for file in (DOCS / "images").iterdir():
        assert file.stat().st_size < 150_000, file.name


def test_the_navigation_holds_every_page():
    listed = re.findall(r"^ +- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_tests_and_modules_that_the_architecture_names_are_there():
    text = (DOCS / "architecture.md").read_text()
    assert text.rpartition("\n## ")[2].startswith("Where is what")  # the page ends with the answers
    assert len(text.split()) < 1250  # five minutes
    assert len(set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text()))) > 50
    sources = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text + (ROOT / "tests" / "README.md").read_text()):
        assert f"def {name}(" in sources, name
    for name in re.findall(r"`(\w+\.py)`", text):
        assert list(ROOT.glob(f"src/layerwise/**/{name}")) + list(ROOT.glob(f"tests/**/{name}")), name
    for room in (ROOT / "src" / "layerwise").iterdir():
        if not room.name.startswith("__") and room.name != "py.typed":  # a marker for type checkers
            assert re.search(rf"\b{room.name}/?\b", text), f"{room.name} has no line in the tree"


@pytest.mark.parametrize(
    "room", sorted(p.parent for p in (ROOT / "src/layerwise").glob("*/__init__.py")), ids=lambda p: p.name
)
def test_a_large_room_has_a_map_of_its_files(room):
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    files = {file.name for file in room.glob("*.py")} - {"__init__.py"}
    listed = set(re.findall(r"^ {4,8}(\w+\.py)  +\S", doc, re.MULTILINE))
    assert listed <= files and (listed == files or room.name in NAMED_AFTER_WHAT_THEY_HOLD)


def test_the_page_on_rules_names_every_optional_piece_after_the_ordinary_contract():
    ordinary, optional = (ROOT / "docs" / "writing-a-rule.md").read_text().split("\n## Optional pieces\n")
    tree = ast.parse((ROOT / "src" / "layerwise" / "core" / "pieces.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert len(names) > 10
    assert not {name for name in names if f"`{name}`" not in optional}
    assert not {name for name in names if name in ordinary}


def test_only_the_engine_knows_the_update_order():
    order = re.compile(r"\.backward\(|\.zero_grad\(|\w*(optimizer|scaler)\w*\.step\(|(?<!def )\btake_step\(")
    for file in (ROOT / "src").rglob("*.py"):
        code = re.sub(r'r?""".*?"""', "", file.read_text(), flags=re.DOTALL)
        if file.name == "rank.py":  # the rivals, as their users write them: torch's data parallel and pipelines
            assert len(re.findall(r"\.backward\(", code)) == 1
        elif file.relative_to(ROOT / "src/layerwise") == Path("learner/optimizer.py"):  # shows all optimizers as one
            assert [found[0] for found in order.finditer(code)] == [".zero_grad("]
        elif file.relative_to(ROOT / "src/layerwise") == Path("core/stepping.py"):  # the step of one optimizer
            assert [found[0] for found in order.finditer(code)] == ["optimizer.step("]
        elif file.name != "engine.py":
            assert not order.search(code), f"{file.name}: {order.search(code)[0]}"
        else:
            assert [found[0] for found in order.finditer(code)] == [".backward(", "scaler.step(", "take_step("]


def test_a_rule_imports_nothing_that_is_not_its_business():
    allowed = re.compile(
        r"__future__|abc|collections\.abc|contextlib|dataclasses|itertools|typing|weakref|math|torch(\.nn(\.functional|\.attention)?|\.utils\.checkpoint)?"
        r"|layerwise(\.errors|\.core|\.core\.(augment|blocks|chunked|first_layer|functional|graphs|hidden_units|layers|layout|output_layer|perturbed_layers|phases|pieces|posteriors|pullback|randomness|ranges|rule|tasks)|\.rules(\.\w+)?)?"
    )
    for file in (ROOT / "src/layerwise/rules").glob("*.py"):
        if file.name in ("__init__.py", "words.py"):  # what finds rules, and reads their options
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("optim", "cuda", "distributed", "device"), f"{file.name}: torch.{node.attr}"
            for module in modules:
                assert allowed.fullmatch(module), f"{file.name} imports {module}"


def test_no_page_names_a_path_of_one_machine():
    for file in [*PAGES, *READMES, ROOT / "mkdocs.yml", ROOT / "pyproject.toml", ROOT / "constraints.txt"]:
        assert not re.search(r"(^|[\s`'\"(])/(home|root|work|tmp|Users)/", file.read_text()), title(Path(file))
