"""MkDocs hooks: equations become MathML when the site is built, so that no page needs a script or a network; the page
of a rule shows the rule's options, and nothing else of its class.
"""

import dataclasses
import html
import json
import re
from importlib import import_module
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
RULE = re.compile(r"^::: (layerwise\.rules\.\w+)\.(\w+)$", re.MULTILINE)
OPTIONS = """{found}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      show_bases: false
      inherited_members: true
      members: {fields}
"""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Tell mkdocstrings which members of a rule are its options: the fields of its class."""

    def with_options(found: re.Match[str]) -> str:
        fields = [field.name for field in dataclasses.fields(getattr(import_module(found[1]), found[2]))]
        return OPTIONS.format(found=found[0], fields=json.dumps(fields)) if fields else "None.\n"

    return RULE.sub(with_options, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked as LaTeX."""
    content = BLOCK.sub(lambda found: convert(html.unescape(found[1]), display="block"), content)
    return INLINE.sub(lambda found: convert(html.unescape(found[1])), content)
