"""Backpropagation that updates each parameter as soon as its gradient is complete."""

from dataclasses import dataclass
from typing import ClassVar

from layerwise.core.pieces import StepsByParameter
from layerwise.core.rule import Locality
from layerwise.rules.backprop import Backprop


@dataclass(frozen=True)
class BackpropFused(StepsByParameter, Backprop):
    """Backpropagation with the optimizer's step in the backward pass: one gradient is in memory at a time.

    Autograd completes a parameter's gradient after the last use of the parameter in the backward pass. Its optimizer
    steps then, and the gradient is freed. Weights after the step are those of `backprop`, bit for bit, with every
    optimizer that treats each parameter by itself.
    """

    name: ClassVar[str] = "backprop_fused"
    locality: ClassVar[Locality] = "global"
    whole_batch: ClassVar[str] = "steps each parameter when its gradient is complete"
    boundary: ClassVar[str] = "as backprop; each parameter steps when its gradient is complete"
    source: ClassVar[str] = "Lv et al., LOMO, arXiv 2306.09782 (2023), with any optimizer; the hook is torch's"
    restrictions: ClassVar[str] = (
        "What needs all gradients at once is refused: clip, accumulate, nonfinite='skip', fp16, replicas. After a "
        "non-finite gradient the parameters nearer to the head have stepped already."
    )
