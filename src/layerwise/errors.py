"""The one exception that a user's mistake raises."""

import contextlib
import difflib
import json
import os
import time
from collections.abc import Sequence


class LayerwiseError(Exception):
    """A user error, explained in one sentence: what is wrong and how to fix it.

    The command line prints the sentence and exits with code 2; no traceback.
    """


def suggestion(given: str, legal: Sequence[str]) -> str:
    """The end of an error sentence: the nearest legal name, if one is near, and all of them.

    >>> suggestion("sl", ["sll", "backprop"])
    "did you mean 'sll'? legal names: sll, backprop"
    """
    near = difflib.get_close_matches(given, legal, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "legal names: " + ", ".join(legal)


def tell_torchrun(sentence: str) -> None:
    """Where torchrun has started this process, put the sentence into the report that torchrun prints at its end.

    torchrun prints a traceback of its own, and after it what each failed process has left in a file.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": f"layerwise: {sentence}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "w") as report:  # the sentence is printed in any case
            json.dump({"message": message}, report)
