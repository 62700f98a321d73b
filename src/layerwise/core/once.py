"""Backward passes of one's own that have no graph, and say so where somebody wants one."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from layerwise.errors import LayerwiseError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of a `torch.autograd.Function` refuse to be differentiated itself.

    torch's decorator of this name puts a node there that fails when it is run. It is not run where gradients of chosen
    parameters are asked for, as the engine does, and a term would be missing without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise LayerwiseError(
                "a module or loss that keeps less for the backward pass has no gradient of its gradient; leave it out "
                "(--replace, the model reversible, positions_at_once of LanguageModel), or choose another rule."
            )
        return backward(ctx, *gradients)

    return checked
