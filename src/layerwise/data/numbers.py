"""Numbers as labels: finds their columns, and checks them for the task."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerwise.core.ranges import DataTask
from layerwise.data.naming import LABEL_NAMES, few, pick
from layerwise.errors import LayerwiseError

EXACT = 2**53
"""From here on, a float64 no longer tells one whole number from the next."""
MOST_LOST = 1e-3
"""Largest allowed error of rounding to float32, as a share of a target's standard deviation."""


def chosen_targets(targets: Sequence[str], columns: Sequence[str], task: DataTask, title: str) -> tuple[str, ...]:
    """Names of the columns that hold labels: those that were named, or the one with a usual name.

    Raises:
        LayerwiseError: a column that does not exist, no column, or several columns of classes.
    """
    absent = next((name for name in targets if name not in columns), None)
    if absent is not None:
        raise LayerwiseError(f"{title} has no column {absent!r}; its columns are {few(columns)}.")
    if len(set(targets)) < len(targets):
        raise LayerwiseError(f"a column is named twice among the targets {few(targets)}; name each once.")
    if task == "classification" and len(targets) > 1:
        raise LayerwiseError(f"{len(targets)} columns of classes are named; name one, or use --task multilabel.")
    if task == "multilabel" and len(targets) < 2:
        raise LayerwiseError(
            f"several labels are several columns of zeros and ones; name those of {title} with "
            f"--data.label-column, out of {few(columns)}."
        )
    if targets:
        return tuple(targets)
    return (pick("label", [name for name in columns if name in LABEL_NAMES], LABEL_NAMES, columns, title),)


def checked_numbers(
    values: Tensor, task: DataTask, columns: Sequence[str], where: Callable[[int], str] = "row {}".format
) -> Tensor:
    """Labels as float32 (N, D).

    Args:
        values: labels (N, D).
        task: what they are.
        columns: their names.
        where: gives the place of a row, for the error message.

    Raises:
        LayerwiseError: numbers that are not finite; for several labels, numbers other than 0 and 1; or numbers so much
            larger than their differences that float32 would merge them.
    """
    given = torch.as_tensor(values, device="cpu").double()
    found = torch.as_tensor(values, device="cpu").to(torch.float32)
    bad = ~torch.isfinite(found)
    wanted = "a finite number"
    if task == "multilabel":
        bad, wanted = (found != 0) & (found != 1), "0 or 1"
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise LayerwiseError(
            f"{where(row)} has {float(found[row, column]):g} in the column {columns[column]!r}, which is not {wanted}; "
            "correct it or take it out."
        )
    # The computed deviation of equal numbers may be a rounding error.
    spread, varies = given.std(0, correction=0), given.amax(0) > given.amin(0)
    lost = varies & ((found.double() - given).abs().amax(0) > MOST_LOST * spread)
    if bool(lost.any()):
        raise LayerwiseError(
            f"the numbers in the column {columns[int(lost.nonzero()[0])]!r} are so large compared with their "
            "differences that float32 would merge them; subtract a constant from them."
        )
    return found


def target_statistics(labels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each target of (N, D); the deviation is 1 for one that is constant."""
    values = labels.double()
    std = values.std(0, correction=0)
    return tuple(values.mean(0).tolist()), tuple(std.where(std > 0, 1.0).tolist())
