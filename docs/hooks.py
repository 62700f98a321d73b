"""MkDocs hooks: equations become MathML when the site is built, so that no page needs a script or a network; the page
of a rule shows the rule's options, and nothing else of its class; the READMEs of benchmarks and tests are pages too,
and a notebook is a file to load.
"""

import dataclasses
import html
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from layerwise import rules

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./((?:\.\./)*(?:benchmarks|notebooks|tests)/)")

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
OVERVIEW = re.compile(r"^\| (?:\[`(\w+)`\]|(rule) ).*\|$|^\|---\|---\|---\|---\|$", re.MULTILINE)
SEARCH = 'data-md-component="search" role="dialog"'
FOCUSABLE = '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block" tabindex="0">'
NO_HEADINGS = re.compile(r"<thead>\s*<tr>\s*(?:<th[^>]*></th>\s*)+</tr>\s*</thead>")
RULE = re.compile(r"^::: (layerwise\.rules\.\w+)\.(\w+)$", re.MULTILINE)
OPTIONS = """{found}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      show_bases: false
      inherited_members: true
      members: {fields}
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the READMEs of benchmarks and tests, and the notebooks, which lie outside of the folder of the pages."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, notebook.relative_to(ROOT).as_posix(), content=notebook.read_text()))
    for readme in [*sorted((ROOT / "benchmarks").rglob("README.md")), ROOT / "tests" / "README.md"]:
        place = readme.relative_to(ROOT).as_posix()
        page = File.generated(config, place, content=readme.read_text(), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Tell mkdocstrings which members of a rule are its options, and lead links out of the folder to what lies there.

    The overview of the rules gets columns of what each class declares, by which `site.js` filters.
    """
    if page.file.src_uri == "rules/index.md":
        markdown = OVERVIEW.sub(_with_facts, markdown)
        page.meta["hide"] = ["toc"]  # the table takes its place

    def with_options(found: re.Match[str]) -> str:
        fields = [field.name for field in dataclasses.fields(getattr(import_module(found[1]), found[2]))]
        return OPTIONS.format(found=found[0], fields=json.dumps(fields)) if fields else "None.\n"

    return RULE.sub(with_options, OUTSIDE.sub(r"](\1", markdown))


def _with_facts(row: re.Match[str]) -> str:
    """A row of the overview of the rules with three cells more."""
    if row[1] is None:
        return row[0] + (" task | unlabelled samples | runs blocks again |" if row[2] else "---|---|---|")
    rule = rules.get(row[1])
    tasks = ", ".join(task.replace("_", " ") for task in rule.tasks)
    return f"{row[0]} {tasks} | {'yes' if rule.unlabelled else 'no'} | {'no' if rule.runs_once else 'yes'} |"


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked as LaTeX."""
    content = BLOCK.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)
    content = INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
    # An equation that scrolls can be reached with the keyboard; a table without headings has no row of empty ones.
    content = content.replace('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">', FOCUSABLE)
    return NO_HEADINGS.sub("", content)


def on_post_page(output: str, **_: Any) -> str:
    """Give the theme's search a name, which screen readers tell."""
    return output.replace(SEARCH, f'{SEARCH} aria-label="Search"')
