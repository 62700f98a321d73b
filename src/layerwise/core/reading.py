"""What goes into a model's forward pass, and where the tensors that matter are in what its modules return."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from layerwise.core.trees import tensors
from layerwise.errors import LayerwiseError, suggestion

Output = Callable[[Any], Tensor] | str | None
Read = Callable[[Any], Tensor] | Mapping[str, Callable[[Any], Tensor]] | None


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward pass: a tensor, a tuple of arguments, or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    return (batch, {}) if isinstance(batch, tuple) else ((batch,), {})


def places(batch: Any) -> list[tuple[str, Any]]:
    """The values of a batch by their places in it."""
    if isinstance(batch, Mapping):
        return [(str(name), t) for name, value in batch.items() for t in tensors(value)]
    if isinstance(batch, tuple):
        return [(f"argument {i}", t) for i, value in enumerate(batch) for t in tensors(value)]
    return [("the input", batch)]


def readers(cuts: Sequence[str], read: Read) -> dict[str, Callable[[Any], Tensor]]:
    """By the name of each cut, the function from its module's output to the tensor that teaches its block."""
    if isinstance(read, Mapping):
        for name in read:
            if name not in cuts:
                raise LayerwiseError(f"read names no cut {name!r}; {suggestion(name, list(cuts))}.")
        return {name: reading(name, read.get(name)) for name in cuts}
    return {name: reading(name, read) for name in cuts}


def reading(name: str, read: Callable[[Any], Any] | None) -> Callable[[Any], Tensor]:
    """A function from a cut module's output to the tensor that teaches its block, checked."""

    def found(out: Any) -> Tensor:
        held = tensors(out)
        teaching = read(out) if read is not None else next((t for t in held if t.is_floating_point()), None)
        if not isinstance(teaching, Tensor) or not any(teaching is t for t in held):
            what = "no tensor of real numbers" if read is None else "with read=... something that is no tensor of it"
            raise LayerwiseError(
                f"cut {name!r} returns {type(out).__name__}, and {what} can be passed on from it; give read=..., a "
                "function from the output to one tensor in it, or cut elsewhere."
            )
        return teaching

    return found


def logits_in(out: Any, output: Output, model: str) -> Tensor:
    """The logits in a model's own output.

    Args:
        out: what the forward pass has returned.
        output: where they are in it: a function, or the name of an entry; not needed for a tensor or an entry `logits`.
        model: name of its class, for the error.

    Raises:
        LayerwiseError: no tensor is there.
    """
    found = out
    if callable(output):
        found = output(out)
    elif output is not None:
        found = out.get(output) if isinstance(out, Mapping) else getattr(out, output, None)
    elif not isinstance(out, Tensor):
        found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if not isinstance(found, Tensor):
        raise LayerwiseError(
            f"{model} returns {type(out).__name__}, and no tensor of logits is known in it"
            f"{f' under the name {output!r}' if isinstance(output, str) else ''}; "
            "give output=..., a function such as lambda out: out.logits, or the name of the entry."
        )
    return found
