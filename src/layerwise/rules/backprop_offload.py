"""Backpropagation with activations in host memory or on disk."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from layerwise.core.pieces import MovesActivations
from layerwise.core.rule import Locality
from layerwise.rules.backprop import Backprop


@dataclass(frozen=True)
class BackpropOffload(MovesActivations, Backprop):
    """Backpropagation with saved activations in host memory or on disk until the backward pass.

    The gradients are those of `backprop`, bit for bit. A storage is moved once, however many saved tensors share it; it
    is written while the forward pass continues, and read back before the backward pass needs it.

    >>> BackpropOffload(where="disk").activations_to()
    'disk'
    """

    where: Literal["host", "disk"] = "host"
    """Where activations are kept: host | disk (a file in the folder of `--offload-folder`)."""

    name: ClassVar[str] = "backprop_offload"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "as backprop; saved activations are moved away and back"
    source: ClassVar[str] = "torch.autograd.graph.saved_tensors_hooks; disk: after SSDTrain, arXiv 2408.10013 (2024)"
    restrictions: ClassVar[str] = (
        "On the CPU, host saves nothing: activations are there anyway. All gradients are in memory at the end of the "
        "backward pass. Disk needs as many bytes as the activations, and is as fast as the disk."
    )

    def activations_to(self) -> Literal["host", "disk"]:
        """Where activations are kept."""
        return self.where
