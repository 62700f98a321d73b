"""Checks a user's batch, splits off its labels, and moves it to the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.blocks import Partition
from layerwise.core.calls import CallPartition
from layerwise.core.trees import mapped, tensors
from layerwise.errors import LayerwiseError


def check_input(network: Partition, x: Any) -> None:
    """Raise LayerwiseError unless the network can take such an input."""
    if any(map(_is_differentiated, tensors(x))):
        raise LayerwiseError(
            "torch.func (grad, vjp, jacrev, ...) differentiates these inputs, and through a learner it would find "
            "zeros; apply it to learner.network, in evaluation mode."
        )
    if isinstance(network, CallPartition) and isinstance(x, (tuple, Mapping)):
        if not (held := tensors(x)):
            raise LayerwiseError("the batch holds no tensor; give what the model's forward takes.")
        if any(t.is_meta for t in held):
            raise LayerwiseError("the batch holds a tensor on the meta device, without numbers; give one with numbers.")
        return
    if isinstance(x, (tuple, Mapping)):
        raise LayerwiseError(
            f"the inputs are of type {type(x).__name__}, and this model was cut into functions of one tensor; cut "
            'it at its calls: cuts="auto", a pattern such as "layers.*", or cut_at_calls(model, [...]).'
        )
    if not isinstance(x, Tensor):
        hint = {"ndarray": "torch.from_numpy(x)", "list": "torch.tensor(x)"}.get(type(x).__name__, "one tensor")
        raise LayerwiseError(f"the inputs are of type {type(x).__name__}; give {hint}, of shape (B, ...).")
    check_dense(x, "inputs")
    if x.dim() == 0:
        raise LayerwiseError("the input is a single number; give a batch of shape (B, ...).")


def _is_differentiated(x: Tensor) -> bool:
    """Whether a transform of `torch.func` wants the gradient with respect to a tensor."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    own = functorch.is_gradtrackingtensor(x)
    return own and functorch.peek_interpreter_stack().key() == functorch.TransformType.Grad


def check_dense(given: Tensor, what: str) -> None:
    """Raise LayerwiseError unless a tensor holds its numbers one after the other."""
    kind = (
        "on the meta device, without numbers"
        if given.is_meta
        else "a nested tensor"
        if given.is_nested
        else "quantized"
        if given.is_quantized
        else "sparse"
        if given.layout is not torch.strided
        else ""
    )
    if kind:
        raise LayerwiseError(f"the {what} are {kind}; give an ordinary tensor of shape (B, ...).")


def check_label_tensor(y: Any, wanted: str) -> Tensor:
    """Return the labels if they are an ordinary tensor.

    Args:
        y: labels from the user.
        wanted: the task's description of labels, for the error.

    Raises:
        LayerwiseError: they are not.
    """
    if not isinstance(y, Tensor):
        raise LayerwiseError(f"the labels are of type {type(y).__name__}; give a tensor{wanted}.")
    check_dense(y, "labels")
    return y


def labelled(x: Any, y: Tensor | None) -> tuple[Any, Any]:
    """Split a batch into inputs and labels: as given, or the entry `labels` of a mapping, hidden from the model."""
    if y is None and isinstance(x, Mapping) and "labels" in x:
        x = dict(x)
        y = x.pop("labels")
    return x, y


def with_labels(x: Any, y: Tensor | None, wanted: str) -> tuple[Any, Tensor]:
    """Return inputs and labels, checked.

    Args:
        x: inputs, maybe including the labels.
        y: labels (default: those in `x`).
        wanted: the task's description of labels, for the error.

    Raises:
        LayerwiseError: the labels are not a tensor, or not one per input.
    """
    x, y = labelled(x, y)
    y = check_label_tensor(y, wanted)
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, [y, *tensors(x)])):  # pyright: ignore[reportAttributeAccessIssue]
        raise LayerwiseError("a training step cannot run inside a transform of torch.func; call it outside.")
    samples = len(x) if isinstance(x, Tensor) else max(1, y.dim() and len(y))
    if y.dim() == 0 or samples == 0 or samples != len(y):
        labels = "one number" if y.dim() == 0 else f"{len(y)}"
        raise LayerwiseError(
            f"the batch has {samples} inputs and {labels} labels; give one label per input, and at least one of each."
        )
    return x, y


def placed(x: Any, device: torch.device, channels_last: bool = False) -> Any:
    """Move a batch to the device, as tensors that can enter a graph.

    Args:
        x: a tensor, or containers of tensors.
        device: the target.
        channels_last: whether images get that memory order.
    """
    if not isinstance(x, Tensor):
        return mapped(x, lambda t: placed(t, device, channels_last))
    x = x.to(device, non_blocking=True)
    if x.is_inference() and not torch.is_inference_mode_enabled():
        x = x.clone()  # tensors from inference mode cannot enter a graph
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def ordinary(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it comes from inference mode, which autograd refuses."""
    return tensor.clone() if tensor.is_inference() else tensor
