"""The one exception that a user's mistake raises."""

import difflib
from collections.abc import Sequence


class LayerwiseError(Exception):
    """A mistake of the user's, told in one sentence that says what is wrong and what to do.

    The command line prints the sentence and exits with code 2; no traceback.
    """


def suggestion(given: str, legal: Sequence[str]) -> str:
    """The end of an error sentence: the nearest legal name, if one is near, and all of them.

    >>> suggestion("sl", ["sll", "backprop"])
    "did you mean 'sll'? legal names: sll, backprop"
    """
    near = difflib.get_close_matches(given, legal, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "legal names: " + ", ".join(legal)
