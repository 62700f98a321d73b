"""Whether losses, gradients and running statistics are finite, and what becomes of an update where they are not."""

import cmath

import torch
from torch import Tensor, nn

from layerwise.core.execution import Execution, gradients_of
from layerwise.core.failures import NonFinite
from layerwise.core.groups import Group
from layerwise.core.progress import Trace
from layerwise.core.trees import all_finite


class FiniteCheck:
    """Stops at a number that is not finite, or leaves the update of that group out, as `nonfinite` says.

    Args:
        execution: says which, and on what device.
    """

    def __init__(self, execution: Execution):
        self.execution = execution

    @property
    def skips(self) -> bool:
        """Whether updates are left out."""
        return self.execution.nonfinite == "skip"

    def begin(self, group: Group) -> None:
        """Remember the running statistics from before an update, which may be left out."""
        if self.skips:
            group.buffers = [(b, b.clone()) for unit in group.units for b in unit.buffers()]
            group.broken = False

    def give_up(self, group: Group) -> None:
        """From now on the current update will be left out: nothing of what is not finite stays until then."""
        group.broken = True
        for parameter in (*group.parameters, *self.execution.replicas.full_of(group.parameters)):
            if parameter.grad is not None:
                parameter.grad.zero_()  # not freed: all replicas have to average the same gradients
        self.put_back(group)

    def heed(self, group: Group, verdict: Tensor) -> None:
        """Give up the current update where another replica has."""
        if self.skips and not bool(torch.isfinite(verdict)):
            self.give_up(group)

    def put_back(self, group: Group) -> None:
        """Give the running statistics their values from before the update."""
        for buffer, before in group.buffers:
            buffer.copy_(before)

    def verdict(self, group: Group) -> Tensor:
        """In place of a loss: 0, or NaN where a batch of the current update was not finite."""
        return torch.full((), torch.nan if group.broken else 0.0, device=self.execution.device)

    def judge_resting(self, group: Group, out: Tensor) -> None:
        """Judge a group that does not learn by its output: where that is not finite, its buffers are put back.

        It has no update to skip, so it is not counted in `Trace.skipped`.
        """
        if self.skips:
            finite = bool(torch.isfinite(out).all()) and all(bool(torch.isfinite(t).all()) for t in group.running())
            if group.broken or not finite:
                self.give_up(group)

    def note(self, group: Group, h: Tensor, loss: Tensor, step: int, trace: Trace) -> None:
        """Look at a batch of an update that is not due yet: a later batch is not to be blamed for it."""
        if self.skips:
            tensors = [loss, *group.running()]
            if not group.scaler.is_enabled():  # an overflow of scaled gradients is the scaler's own affair
                tensors += gradients_of(self.execution.replicas.full_of(group.parameters))
            if not bool(torch.isfinite(_largest(tensors))):
                self.give_up(group)
            return
        finite = torch.isfinite(loss)
        if self.execution.device.type != "cpu":
            trace.finite[group.name] = finite
        elif not bool(finite):
            group.free()
            raise NonFinite(group.name, step, input_is_finite=all_finite(h))

    def may_step(
        self, group: Group, h: Tensor | None, loss: Tensor, norm: Tensor | complex, step: int, trace: Trace
    ) -> bool:
        """Whether signal and gradient are finite; an overflow of scaled gradients is the scaler's own affair."""
        if not self.skips and self.execution.device.type != "cpu":
            # Reading the flag here would wait for the device: it is read with the metrics.
            trace.finite[group.name] = torch.isfinite(loss if group.scaler.is_enabled() else loss + norm)
            return True
        numbers = [loss] if group.scaler.is_enabled() else [loss, norm]
        if self.skips:  # a finite batch may be too large for its variance
            numbers.append(_largest([loss, *group.running()]))
        if all(cmath.isfinite(number.item() if isinstance(number, Tensor) else number) for number in numbers):
            return True
        if self.skips:
            trace.skipped.add(group.name)
            self.put_back(group)
            return False
        group.free()
        raise NonFinite(group.name, step, input_is_finite=h is None or all_finite(h))


def _largest(tensors: list[Tensor]) -> Tensor:
    """Largest absolute number of tensors, one at least, which is finite if all of them are."""
    return nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()] or tensors, float("inf"))
