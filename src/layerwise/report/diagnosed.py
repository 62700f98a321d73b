"""Reads the diagnostics of a run, checked."""

from pathlib import Path

from layerwise.files import shown
from layerwise.records import damaged
from layerwise.report.confusion import classes_agree
from layerwise.report.filters import decoded
from layerwise.report.reading import ADVICE, Diagnostics, read_record


def read_diagnosed(folder: Path, place: str, command: str) -> Diagnostics:
    """The contents of a run's `diagnostics.json`.

    Args:
        folder: of the comparison, or of the run.
        place: of the file in it.
        command: of the run, as its `result.json` has it; diagnostics that name none are of an older version.

    Raises:
        MissingFile: the run has not been diagnosed.
        LayerwiseError: a file that cannot be read, is damaged, or is of another run.
    """
    found = read_record(folder, place, Diagnostics)
    confusion, filters = found.get("confusion"), found.get("filters")
    reason = None
    if found.get("command", command) != command:
        reason = "it is of another run"
    elif confusion is not None and not classes_agree(confusion):
        reason = "blocks are of different classes"
    elif filters and decoded(filters) is None:
        reason = "the filters are no pictures"
    if reason is not None:
        raise damaged(shown(folder / place), reason, ADVICE)
    return found
