"""`layerwise describe RULE`: describes a rule in words for a terminal."""

import inspect
from dataclasses import fields

from layerwise import rules
from layerwise.core.rule import LOCALITIES
from layerwise.rules.ahead import LooksAhead


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
    width = max(map(len, facts)) + 2
    lines = [name, "", text, "", *(f"{key:<{width}}{value}" for key, value in facts.items())]
    options = [f"  --rule.{f.name.replace('_', '-')} (default: {f.default})" for f in fields(rule)]
    return "\n".join([*lines, "", "options:" if options else "no options", *options])
