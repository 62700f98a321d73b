"""What the first layer of each rule's network looks for, as small pictures."""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layerwise.report import figures
from layerwise.report.sections import Origin, Section

COLUMNS = 8


def filters(found: Mapping[str, Mapping[str, Any]], origin: Origin) -> Section:
    """A figure per rule.

    Args:
        found: rule to what `layerwise.measure.filters.first_filters` gives.
        origin: the command and machine.
    """
    about = (
        "Weights of the first layer, of the units with the largest norm, each scaled to its own largest weight, of the "
        "first seed. "
    )
    grey = all(own["shape"][0] == 1 for own in found.values())
    about += "Red is positive, blue negative, white zero." if grey else "Grey is zero in each colour."
    section = Section("What the first layer looks for", about, folded=True)
    for rule, own in found.items():
        pictures = decoded(own)
        assert pictures is not None  # checked when it was read
        count, channels, height, width = pictures.shape
        section.draw(
            f"filters_{rule}",
            rule,
            f"Weights of {count} units of the first layer under {rule}, as pictures of {height} x {width} pixels.",
            lambda axes, pictures=pictures: figures.mosaic(axes, pictures, COLUMNS),
            figures.WIDTH * -(-count // COLUMNS) * (height + 1) / (COLUMNS * (width + 1)),
            f"{count} units, {height} x {width} pixels{' in colour' if channels == 3 else ''}.",
            origin,
        )
    return section


def decoded(found: Mapping[str, Any]) -> np.ndarray | None:
    """The pictures, bytes (N, C, h, w); None if the record is damaged.

    >>> decoded({"shape": [1, 1, 2], "pixels": ["gP8="]}).tolist(), decoded({"shape": [1, 1, 2], "pixels": ["gA=="]})
    ([[[[128, 255]]]], None)
    """
    shape: Sequence[int] = found["shape"]
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        return None
    try:
        rows = [base64.b64decode(text, validate=True) for text in found["pixels"]]
    except (ValueError, binascii.Error):
        return None
    if any(len(row) != math.prod(shape) for row in rows):
        return None
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), *shape)
