"""Finds further terms of a loss that a forward pass leaves beside its output: no rule trains them.

The balance of a router, a divergence, a penalty: a plain training loop adds them to its loss, wherever the forward pass
has put them (an attribute, a list, a second output). Here each is a single number that depends on parameters, that
somebody still holds when the pass is over, and that the rule's signal does not contain.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef


class SingleNumbers(TorchFunctionMode):
    """Notes the single numbers with a history that torch's functions return; it keeps none of them alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[TensorWeakRef] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 0 and out.grad_fn is not None:
            self._made.append(TensorWeakRef(out))
        return out

    def alive(self) -> list[Tensor]:
        """Those that somebody still holds."""
        return [number for ref in self._made if (number := ref()) is not None]


def warn_of_further_terms(left: Mapping[str, Sequence[Tensor]], signals: Sequence[Tensor]) -> bool:
    """Warn of a single number that blocks have left, unless it is a part of what the rule learns from.

    Args:
        left: numbers by the name of the block.
        signals: losses, and outputs of blocks; the graph behind them is searched only where numbers are left.

    Returns:
        Whether there was one; further ones are not named.
    """
    if not any(left.values()):
        return False
    behind = _nodes_behind(signals)
    for name, numbers in left.items():
        further = [number for number in numbers if number.grad_fn not in behind]
        if further:
            value = float(further[-1].detach())
            warnings.warn(
                f"block {name!r} leaves a single number ({value:.4g}) beside its output that depends on "
                "its parameters; if it is a further term of the loss (the balance of a router, a penalty), it does not "
                "train, because a rule computes its own loss: let the block add its gradient (docs: Your own network, "
                "Further terms of the loss), or take the number off the graph with .detach().",
                stacklevel=2,
            )
            return True
    return False


def _nodes_behind(ends: Sequence[Tensor]) -> set[Any]:
    """The nodes of the graphs of tensors."""
    found: set[Any] = set()
    waiting = [end.grad_fn for end in ends]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return found
