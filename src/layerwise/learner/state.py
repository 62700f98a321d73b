"""The state of a learner as a mapping: whether it fits, which part of it is here, the whole out of its parts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def without_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are on this rank."""
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of one whole learner out of those of all stages, in the order of the ranks."""
    whole = dict(states[-1])
    for part in ("model", "auxiliary", "optimizer", "gradients", "scaler"):
        whole[part] = {name: value for state in states for name, value in state[part].items()}
    return whole
