"""What goes wrong while a user's own modules run, in a sentence that names the block."""

from typing import Any

import torch
from torch import nn

from layerwise.core.trees import tensors
from layerwise.errors import LayerwiseError

KNOWN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NameError, ArithmeticError, AssertionError)
"""What a module's `forward` raises where it, or its input, is wrong."""


def told_by(reason: BaseException) -> str:
    """The first line of what a module has raised, without its full stop.

    >>> told_by(KeyError("mask")), told_by(AssertionError()), told_by(ValueError("too long."))
    ("KeyError: 'mask'", 'AssertionError', 'too long')
    """
    lines, kind = str(reason).strip().splitlines(), type(reason).__name__
    if not lines:
        return kind
    return f"{kind}: {lines[0]}" if isinstance(reason, (KeyError, AssertionError)) else lines[0].rstrip(".")


ADVICE = {
    "Expected more than 1 value per channel": "batch norm cannot train on one value, so give batches of more samples",
    "Expected more than 1 spatial element": "instance norm cannot train on one pixel, so give larger inputs",
    "use_reentrant": "call torch's checkpoint with use_reentrant=False",
}
"""What to do about errors of torch whose cause is neither the rule nor the shape of the input, by a part of them."""


def advice_on(said: str, otherwise: str) -> str:
    """What to do about an error of torch.

    Args:
        said: its first line.
        otherwise: what to do where it is none of the known ones.

    >>> advice_on("Expected more than 1 value per channel when training", "correct the rule")
    'batch norm cannot train on one value, so give batches of more samples'
    """
    return next((advice for part, advice in ADVICE.items() if part in said), otherwise)


class NonFinite(LayerwiseError):
    """A signal or a gradient is NaN or infinite."""

    def __init__(self, block: str, step: int, input_is_finite: bool):
        if input_is_finite:
            cause = (
                "lower the learning rate, clip gradients (clip=1.0), or count and skip such steps (nonfinite='skip')"
            )
        else:
            cause = "its input already holds NaN or infinity, so look at the data or the block before it"
        super().__init__(f"block {block!r} has a non-finite loss or gradient at step {step}: {cause}.")


class NonFiniteAnswer(NonFinite):
    """What the network answers in an evaluation is NaN: an update has broken it, or its input is out of all range."""

    def __init__(self) -> None:
        LayerwiseError.__init__(
            self,
            "the network answers with NaN; lower the learning rate, clip gradients (clip=1.0), or look for values out "
            "of all range in the data.",
        )


class in_a_sentence:
    """A context that turns what a user's own modules raise into a sentence that names them; the cause stays attached.

    Args:
        who: what is run, such as "block '2'".
        what: what it fails to do with its input.
        h: the input.
        by_rule: whether a rule runs the modules: its own errors stay as they are.
    """

    __slots__ = ("by_rule", "h", "what", "who")

    def __init__(self, who: str, what: str, h: Any, by_rule: bool = False):
        self.who, self.what, self.h, self.by_rule = who, what, h, by_rule

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, reason: BaseException | None, traceback: Any) -> None:
        if not isinstance(reason, KNOWN) or isinstance(reason, torch.OutOfMemoryError):
            return
        if self.by_rule and not _in_a_module(traceback):
            return
        said = told_by(reason)
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors(self.h))
        advice = advice_on(said, "look at its modules, and at the batch")
        raise LayerwiseError(f"{self.who} {self.what} of shape {shapes} ({said}); {advice}.") from reason


def _in_a_module(traceback: Any) -> bool:
    """Whether an error comes from the forward pass of a module."""
    while traceback is not None:
        if traceback.tb_frame.f_code is nn.Module._call_impl.__code__:
            return True
        traceback = traceback.tb_next
    return False
