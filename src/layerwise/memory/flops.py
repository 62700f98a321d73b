"""Floating-point operations, counted by torch's formulas: matrix products, convolutions and attention."""

from typing import Any

from torch.utils.flop_counter import flop_registry

from layerwise.memory.watching import WatchingMode


class FlopMeter(WatchingMode):
    """Context manager that counts the operations of the code inside, backward passes too; read `total` afterwards.

    The formulas are those of `torch.utils.flop_counter.FlopCounterMode`. That class also follows modules through the
    graph, with hooks under which a rule that asks autograd for gradients itself cannot run.

    >>> import torch
    >>> with FlopMeter() as meter:
    ...     product = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> meter.total  # a multiplication and an addition for each of 2 * 3 * 5
    60
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def watch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, and add its cost."""
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result
