"""The state of a learner as a mapping: whether it fits, which part of it is here, the whole out of its parts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from layerwise.errors import LayerwiseError


def check_same_tensors(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise LayerwiseError unless both hold tensors of the same names and shapes."""
    missing, extra = own.keys() - given.keys(), given.keys() - own.keys()
    if missing or extra:
        name = sorted(missing or extra)[0]
        where = "is missing from the checkpoint" if missing else "is not part of this one"
        raise LayerwiseError(
            f"the checkpoint is of another {what}: {name!r} {where}; build the {what} with the options "
            "that the checkpoint was made with."
        )
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise LayerwiseError(
                f"the checkpoint is of another {what}: {name!r} has shape {tuple(given[name].shape)} "
                f"there and {tuple(tensor.shape)} here; build the {what} with the options that the "
                "checkpoint was made with."
            )


def without_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are on this rank."""
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of one whole learner out of those of all stages, in the order of the ranks."""
    whole = dict(states[-1])
    for part in ("model", "auxiliary", "optimizer", "gradients", "scaler"):
        whole[part] = {name: value for state in states for name, value in state[part].items()}
    return whole
