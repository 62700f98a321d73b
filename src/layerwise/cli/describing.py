"""`layerwise describe RULE`: describes a rule in words for a terminal."""

import inspect
import re
import textwrap

from layerwise import rules
from layerwise.cli.catalogue import class_of_rule
from layerwise.cli.formulas import formula, readable
from layerwise.cli.help import columns, described, entry, written
from layerwise.cli.options import options_of
from layerwise.core.rule import LOCALITIES
from layerwise.rules.ahead import LooksAhead
from layerwise.terminal import indented


def describe_rule(name: str) -> str:
    """Describe a rule: equations, locality, what crosses a boundary, source, restrictions and options.

    Raises:
        LayerwiseError: there is no such rule.

    >>> print(describe_rule("backprop").splitlines()[0])
    backprop
    """
    rule = rules.get(name)
    text = (inspect.getdoc(rule) or "").partition(">>>")[0].rstrip()
    facts = {
        "locality": f"{rule.locality} ({LOCALITIES[rule.locality]})",
        "backpropagation": "through the whole network" if rule.locality == "global" else "inside a group of blocks",
        "boundary": rule.boundary,
        "memory": "activations + gradients do not grow with the number of blocks"
        if rule.flat_memory
        else "activations + gradients grow with the number of blocks",
        "source": rule.source,
        "restrictions": rule.restrictions or "none known",
    }
    if issubclass(rule, LooksAhead):
        facts["ahead"] = (
            "learned or momentum adds a copy of the next block's first layer to every head, and its forward and "
            "backward pass; both adds two. A moving average has no gradient and no optimizer state; it gets the "
            "layer's parameters once per update, over a boundary between ranks too"
        )
    width, margin = columns(), max(map(len, facts)) + 2
    lines = [name, "", *said(text, width), *(indented(key, value, margin, width) for key, value in facts.items())]
    place = class_of_rule(name)
    options = [] if place is None else options_of(*place, prefix="rule.")
    lines += ["", "options:" if options else "no options"]
    for option in options:
        lines += entry(written(option), described(option), width)
    return "\n".join(lines)


def said(text: str, width: int) -> list[str]:
    r"""The lines of a docstring with its formulas as plain text, wrapped at a width.

    >>> said("With a loss\n$\\lambda_i$:\n\n$$L_i = 1, \\qquad\n  L_j = 2$$", 72)
    ['With a loss λᵢ:', '', '    Lᵢ = 1,', '    Lⱼ = 2', '']
    """
    lines = []
    for paragraph in text.split("\n\n"):
        for part in re.split(r"(\$\$.+?\$\$|\n(?=- ))", paragraph, flags=re.DOTALL):
            if part.startswith("$$"):
                for row in re.split(r"\\qquad|\n", part.strip("$")):
                    lines += textwrap.wrap(formula(row), width, initial_indent="    ", subsequent_indent="      ")
            else:
                hanging = "  " if part.startswith("- ") else ""
                words = " ".join(readable(part).split())
                lines += textwrap.wrap(words, width, subsequent_indent=hanging, break_on_hyphens=False)
        lines.append("")
    return lines
