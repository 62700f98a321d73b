"""Weights drawn anew, module by module, in the way that each module or its model knows."""

from torch import nn


def draw(module: nn.Module, model: nn.Module | None = None) -> type[nn.Module] | None:
    """Draw the weights of a module and of all that it holds, where they lie.

    The inner ones first, so that a module may change what those that it holds have drawn.

    Args:
        module: whose weights are drawn.
        model: the model that it is a part of, see `draw_own`.

    Returns:
        The class of a module that holds tensors and cannot draw them; None if there is none.

    >>> draw(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> draw(nn.ParameterList([nn.Parameter(nn.Linear(1, 1).weight)])).__name__
    'ParameterList'
    """
    for child in module.children():
        unable = draw(child, model)
        if unable is not None:
            return unable
    return None if draw_own(module, model) or not holds_tensors(module) else type(module)


def draw_own(module: nn.Module, model: nn.Module | None = None) -> bool:
    """Draw what one module holds: by the model's `_init_weights(module)`, which models of `transformers` have, or by
    the module's own `reset_parameters()`.

    Returns:
        Whether there was a way.
    """
    by_model = getattr(model, "_init_weights", None)
    own = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(by_model):
        by_model(module)
    elif callable(own):
        own()
    return callable(by_model) or callable(own)


def holds_tensors(module: nn.Module) -> bool:
    """Whether a module itself, not one inside it, holds parameters or buffers."""
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])
