"""The built package: types, one version, an sdist without the evidence, and checked layers."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.pages import ROOT

import layerwise


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built with the hatchling that is installed."""
    pytest.importorskip("hatchling", reason="the test extra is not installed")
    place = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", place], cwd=ROOT, check=True, capture_output=True)
    return place


@pytest.mark.slow
def test_a_project_that_uses_the_wheel_sees_its_types(built, tmp_path):
    """basedpyright on a project outside: it finds what is wrong, and what is right stays silent."""
    if shutil.which("basedpyright") is None:
        pytest.skip("basedpyright is not installed")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "layerwise/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "site")
    (tmp_path / "use.py").write_text(
        "import layerwise\n"
        "from layerwise import rule_names\n"
        "names: list[str] = rule_names()\n"
        "reveal_type(layerwise.Schedule)\n"
        "layerwise.rule_names(3)\n"
        "wrong: int = layerwise.create_rule('sll')\n"
    )
    (tmp_path / "pyrightconfig.json").write_text('{"extraPaths": ["site"], "include": ["use.py"]}')
    done = subprocess.run(
        ["basedpyright", "--project", tmp_path, "--level", "error", "--pythonpath", sys.executable],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    lines = {int(line) for line in re.findall(r"use\.py:(\d+):\d+ - error", done.stdout)}
    assert lines == {5, 6}, done.stdout


def test_the_sdist_holds_the_source_and_not_the_evidence(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    rooms = {name.partition("/")[0] for name in names}
    assert {"src", "tests", "docs", "README.md", "LICENSE", "pyproject.toml", "CHANGELOG.md"} <= rooms
    assert not {"benchmarks", ".ci", ".github", "runs", "site"} & rooms
    assert sdist.stat().st_size < 2_000_000
    assert not [name for name in names if "__pycache__" in name]


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and "version" not in project
    newest = re.search(r"^## \[(\d[^\]]*)\](?: - (\S+))?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = (ROOT / "CITATION.cff").read_text()
    assert newest[1] == layerwise.__version__
    assert f"version: {newest[1]}\n" in cited and f"date-released: {newest[2]}\n" in cited


def layers(place):
    return subprocess.run(
        [shutil.which("lint-imports"), "--no-cache"], cwd=place, capture_output=True, text=True,
        env={"PYTHONPATH": str(place / "src"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def test_the_layers_notice_an_import_that_points_up(tmp_path):
    """Also inside a function, for types, and through a lazy name of the root, where it breaks nothing when it runs."""
    if shutil.which("lint-imports") is None:
        pytest.skip("import-linter is not installed")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    kept = layers(tmp_path)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    for name, line in {
        "core/trees.py": "def _up():\n    from layerwise.runs import training\n    return training\n",
        "models/fcn.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from layerwise.report import page\n",
        "memory/malloc.py": "def _root():\n    import layerwise\n    return layerwise.Learner\n",
    }.items():
        file = tmp_path / "src" / "layerwise" / name
        file.write_text(f"{file.read_text()}\n\n{line}")
    broken = layers(tmp_path)
    assert broken.returncode != 0
    for lower, upper in (("core", "runs"), ("models", "report"), ("memory", "learner")):
        assert f"layerwise.{lower} is not allowed to import layerwise.{upper}" in broken.stdout


def test_a_new_package_needs_a_layer(tmp_path):
    """Without one, it could import anything and be imported from anywhere."""
    if shutil.which("lint-imports") is None:
        pytest.skip("import-linter is not installed")
    for room in ["", "cli", "attic"]:
        (tmp_path / "src" / "layerwise" / room).mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "layerwise" / room / "__init__.py").touch()
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(re.sub(r"\nlayers = \[.*?\]", '\nlayers = ["cli"]', text, flags=re.DOTALL))
    found = layers(tmp_path)
    assert found.returncode != 0
    assert "- layerwise.attic" in found.stdout and "- layerwise.cli" not in found.stdout, found.stdout


def test_just_and_ci_share_one_list_of_commands():
    recipes = set(re.findall(r"^([a-z]\w*)(?: [^:\n]*)?:(?!=)", (ROOT / "justfile").read_text(), re.MULTILINE))
    assert {"check", "test", "mutants", "docs", "bench", "campaigns"} <= recipes
    used = set(re.findall(r"\bjust (\w+)", (ROOT / ".ci" / "run").read_text()))
    assert used <= recipes
    assert used >= {"lint", "format", "types", "layers", "doctests", "test", "slow", "mutants", "docs", "campaigns"}
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for page in ("CONTRIBUTING.md", ".github/pull_request_template.md"):
        assert set(re.findall(r"`just (\w+)`", (ROOT / page).read_text())) <= recipes


def test_no_public_function_is_called_like_another_command():
    """`train` and `command` were four and five things; a command is called after what it does."""
    found = {}
    for file in Path(layerwise.__path__[0]).rglob("*.py"):
        for name in re.findall(r"^def (train|command)\(", file.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(file.name)
    assert all(len(files) == 1 for files in found.values()), found
