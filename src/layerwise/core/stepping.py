"""An optimizer's step on the host without the overhead around it, which each of many small groups would pay."""

from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from layerwise.errors import LayerwiseError, is_out_of_memory, why

_KERNELS = {
    torch.optim.Adam: torch._fused_adam_,  # pyright: ignore[reportPrivateImportUsage]
    torch.optim.AdamW: torch._fused_adamw_,  # pyright: ignore[reportPrivateImportUsage]
}

_ONE = torch.ones((), device="cpu")
"""Wrapped once: `count.add_(1)` would wrap the number for every tensor, and so does `_foreach_add_` on the host."""


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Do what `optimizer.step()` does, to the bit.

    torch's `step` reports itself to profilers, calls hooks, checks graph capture, and sorts tensors by device and type.
    That takes five times as long as the update of a small block. Without profilers and hooks, the step is called
    without its wrapper, and fused Adam and AdamW on the host call their kernel directly.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.ones(2)
    >>> take_step(torch.optim.SGD([weight], lr=0.5))
    >>> weight.detach()
    tensor([0.5000, 0.5000])
    """
    step: Any = type(optimizer).step
    watched = (
        "step" in vars(optimizer)  # a scheduler wraps it, for example
        or not getattr(step, "hooked", False)
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    )
    if watched:
        optimizer.step()
    elif type(optimizer) not in _KERNELS or not _fused_step(optimizer):
        step.__wrapped__(optimizer)


def _fused_step(optimizer: torch.optim.Optimizer) -> bool:
    """Step with the kernel of Adam or AdamW; return False, and change nothing, if that is not possible."""
    calls, counts = [], []
    for group in optimizer.param_groups:
        rate, (beta1, beta2) = group["lr"], group["betas"]
        plain = group.get("fused") and not (group["amsgrad"] or group["capturable"] or group["differentiable"])
        if not plain or type(rate) is not float or type(beta1) is not float or type(beta2) is not float:
            return False
        parameters, gradients, means, squares, steps = [], [], [], [], []
        for p in group["params"]:
            gradient = p.grad
            if gradient is None:
                continue
            state = optimizer.state.get(p)
            if not state or not (type(gradient) is torch.Tensor and gradient.is_cpu and p.is_cpu):
                return False  # the first step creates the state
            parameters.append(p)
            gradients.append(gradient)
            means.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])
        if not parameters:
            continue
        if len({p.dtype for p in (*parameters, *gradients)}) > 1:
            return False
        kernel = _KERNELS[type(optimizer)]
        if group.get("decoupled_weight_decay") and type(optimizer) is torch.optim.Adam:
            kernel = _KERNELS[torch.optim.AdamW]
        calls.append((kernel, (parameters, gradients, means, squares, [], steps), group, rate, beta1, beta2))
        counts += steps
    with torch.no_grad():
        for count in counts:
            count.add_(_ONE)
        for kernel, tensors, group, rate, beta1, beta2 in calls:
            kernel(
                *tensors,
                amsgrad=False,
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
                grad_scale=None,
                found_inf=None,
            )
    return True


class explained_step:
    """A context in which a step that fails becomes one sentence about the optimizer; the cause stays attached.

    Args:
        optimizer: what steps.
        name: of the blocks whose parameters it has.
    """

    __slots__ = ("name", "optimizer")

    def __init__(self, optimizer: torch.optim.Optimizer, name: str):
        self.optimizer, self.name = optimizer, name

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, reason: BaseException | None, traceback: Any) -> None:
        if not isinstance(reason, Exception) or isinstance(reason, LayerwiseError) or is_out_of_memory(reason):
            return
        who = type(self.optimizer).__name__
        if isinstance(reason, KeyError):
            raise LayerwiseError(
                f"{who} finds no {reason} in its state; an option that needs it (amsgrad, centered) is set when the "
                "optimizer is made, not in its parameter groups later."
            ) from reason
        if "sparse" in str(reason).lower():
            raise LayerwiseError(
                f"{who} cannot use the gradients of {self.name!r} ({reason}); sparse gradients need sgd with momentum "
                "0 or adagrad, both with weight_decay=0, or sparse=False in the embedding."
            ) from reason
        raise LayerwiseError(
            f"{who} fails at the update of {self.name!r} ({why(reason).rstrip('.')}); correct its options, or choose "
            "another optimizer."
        ) from reason
