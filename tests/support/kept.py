"""What a function keeps for its backward pass."""

import torch
from torch import nn


def kept_bytes(function, x):
    """Bytes that the backward pass needs beside parameters, each storage once."""
    kept, own = {}, function.parameters() if isinstance(function, nn.Module) else ()
    parameters = {parameter.data_ptr() for parameter in own}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(x.clone().requires_grad_())
    del out
    return sum(kept.values())
