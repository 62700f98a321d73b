"""Where cotangents begin and how they pass a block: the error at the outputs, and one block linearised."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from layerwise.core.functional import wide
from layerwise.core.tasks import Task

Pullback = Callable[[Tensor], Tensor]
"""From a cotangent on the output of a block to the one on its input; it may be called several times."""


def linearized(run: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Pullback]:
    r"""Run `f` at `h`: the output without history, and the map $v \mapsto J_f(h)^\top v$.

    The graph reaches from `h` to the output and no further. It lives as long as the map does.

    Args:
        run: the function f, such as a block.
        h: its input, of real numbers.

    >>> out, back = linearized(torch.square, torch.tensor([1.0, 3.0]))
    >>> out, back(torch.ones(2))
    (tensor([1., 9.]), tensor([2., 6.]))
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (h.clone() if h.is_inference() else h.detach()).requires_grad_()
        out = run(leaf)

    def back(cotangent: Tensor) -> Tensor:
        if out.grad_fn is None:  # it does not depend on its input
            return torch.zeros_like(leaf)
        (found,) = torch.autograd.grad(out, leaf, cotangent.to(out.dtype), retain_graph=True, allow_unused=True)
        return torch.zeros_like(leaf) if found is None else found

    return out.detach(), back


@contextmanager
def without_gradient(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A context in which parameters want no gradient, so that a graph keeps nothing for them."""
    frozen = [p for p in parameters if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def output_error(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    """The gradient of the task's mean loss on the network's outputs, `(B, ..., K)` of the outputs' shape.

    >>> from layerwise.core.tasks import Classification
    >>> output_error(Classification(2), torch.zeros(2, 2), torch.tensor([0, 1]))  # (softmax - onehot) / 2
    tensor([[-0.2500,  0.2500],
            [ 0.2500, -0.2500]])
    """
    with torch.enable_grad():
        leaf = wide(outputs.detach()).requires_grad_()
        return torch.autograd.grad(task.loss(leaf, y), leaf)[0]
