"""The copy of the network's output matrix that blocks read if they cannot, or must not, read the matrix itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.output_layer import output_weight
from layerwise.core.pieces import ReadsOutputMatrix
from layerwise.errors import LayerwiseError
from layerwise.learner.setup import Setup

PART = "output_matrix"
"""Key of the copy in a learner's state."""


class OutputCopy:
    """Refreshes the copy as often as the rule says: before every step whose number `refresh` divides.

    The last rank of a pipeline sends the matrix before such a step; shards are gathered then.

    Args:
        setup: the learner's parts.
        layer: the network's output layer, with its weights.
    """

    def __init__(self, setup: Setup, layer: nn.Linear):
        rule = setup.rule
        assert isinstance(rule, ReadsOutputMatrix)
        self.setup, self.layer, self.refresh = setup, layer, rule.matrix_refresh() or 1
        self.name = next(name for name, own in setup.network.model.named_parameters() if own is layer.weight)
        self.done = 0
        """Steps so far."""
        # Every rank has the initial weights; in one process the user may still change them.
        self.version = 0 if self.travels and not setup.stage.last else -1
        """Version of the copy: the matrix after `refresh * version` steps."""
        # The last rank of a pipeline has the matrix, and reads it directly, as one process does.
        keeps = self.refresh > 1 or not setup.stage.last or setup.replicas.shares_parameters
        setup.network.__dict__.update(output_copy=self._whole().clone() if keeps else None)

    @property
    def travels(self) -> bool:
        """Whether the matrix is on another rank than some of its readers."""
        return not (self.setup.stage.first and self.setup.stage.last)

    def begin(self, step: int | None) -> None:
        """Refresh the copy if it is due; `step` is the number of the step that begins, None for an evaluation."""
        done = self.done if step is None else step
        while self.copy is not None and self.version < done // self.refresh:
            if self.travels and not self.setup.stage.last:
                self.version += 1
                self._take(self.setup.stage.receive_matrix())
            else:
                self.version = done // self.refresh
                self._take(self._whole())
        if step is not None:
            self.done = step + 1

    def end(self, steps: int) -> None:
        """Send the matrix to the other ranks if this is due after `steps` steps."""
        if self.travels and self.setup.stage.last and steps % self.refresh == 0:
            self.setup.stage.send_matrix(self._whole())

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint: a copy that is older than the matrix."""
        return {PART: self.copy} if self.refresh > 1 else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a learner's state.

        Raises:
            LayerwiseError: it lacks the copy, or has another one.
        """
        self.done = state["steps"]
        if self.copy is None:
            return
        # After this many steps the copy is refreshed anyway before it is read.
        renewed = self.done % self.refresh == 0
        given = state["model"][self.name] if renewed else state.get(PART)
        if not isinstance(given, Tensor) or given.shape != self.copy.shape:
            raise LayerwiseError(
                f"the checkpoint does not fit: the copy of the output matrix, {PART!r}, is missing or of another "
                "shape; take a checkpoint of a run with the same rule."
            )
        self._take(given)
        self.version = self.done // self.refresh

    @property
    def copy(self) -> Tensor | None:
        """The copy `(K, D)`; None on the last rank if it reads the matrix itself."""
        return self.setup.network.output_copy

    def _take(self, matrix: Tensor) -> None:
        assert self.copy is not None
        self.copy.copy_(matrix)

    def _whole(self) -> Tensor:
        """The current matrix, gathered if ranks have shards of it."""
        with torch.no_grad():
            return output_weight(self.setup.network).to(self.setup.device)


class NoCopy:
    """Replaces `OutputCopy` if nobody reads the matrix, or all read the matrix itself."""

    def begin(self, step: int | None) -> None:
        """Nothing is renewed."""

    def end(self, steps: int) -> None:
        """Nothing is sent."""

    def state(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""


def output_copy(setup: Setup, layer: nn.Linear | None) -> OutputCopy | NoCopy:
    """Make the copy that a learner needs; none if its blocks read the matrix itself, or do not read it."""
    setup.network.__dict__.update(output_copy=None)
    rule = setup.rule
    refresh = rule.matrix_refresh() if isinstance(rule, ReadsOutputMatrix) else None
    if refresh is None or layer is None:
        return NoCopy()
    elsewhere = not setup.stage.last or setup.replicas.shares_parameters
    needed = refresh > 1 or elsewhere or not setup.stage.first
    return OutputCopy(setup, layer) if needed else NoCopy()
